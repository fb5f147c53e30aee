"""The drawings as tensors: names and images in three styles, rasterised at 64x64 on white."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64
STYLES = ("flat", "ink", "gloss")
# what the shipped model was trained on where there was no GPU; "all" takes every drawing that exists in the
# three styles
CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities")


def rasterise_svg(body: str) -> np.ndarray:
    """Draw one SVG body on white. Returns uint8 [SIZE, SIZE, 3]."""
    import resvg_py  # not installed where the drawings are there already

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 32 32" width="{SIZE}" height="{SIZE}" color="#111">{body}</svg>'
    )
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    return np.asarray(Image.alpha_composite(page, drawing).convert("RGB"))


def draw_all(bodies: list[str]) -> Tensor:
    """SVG bodies as uint8 [len(bodies), 3, SIZE, SIZE]."""
    drawn = np.stack([rasterise_svg(body) for body in bodies])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def load_drawings(work: Path) -> tuple[list[str], dict[str, Tensor]]:
    """All names that exist in the three styles, and their images.

    Returns:
        names, and per style a uint8 tensor [len(names), 3, SIZE, SIZE]; cached in `<work>/drawn_images.pt`.
    """
    cache = work / "drawn_images.pt"
    if not cache.exists():
        bodies = {style: json.loads((work / f"{style}.json").read_text())["bodies"] for style in STYLES}
        names = sorted(set.intersection(*map(set, bodies.values())))
        images = {style: draw_all([bodies[style][name] for name in names]) for style in STYLES}
        torch.save({"names": names, "images": images}, cache)
    saved = torch.load(cache, weights_only=True)
    return saved["names"], saved["images"]


def load_trained_names(work: Path) -> list[str]:
    """The names that the base model in `<work>/base.pt` was trained on."""
    state = torch.load(work / "base.pt", weights_only=True, map_location="cpu")
    names: list[str] = state["names"]
    return names


def pick_names(work: Path, names: list[str], categories: tuple[str, ...]) -> list[int]:
    """Positions in `names` of the drawings in the given categories ("all": every one)."""
    if categories == ("all",):
        return list(range(len(names)))
    listed = json.loads((work / "flat.json").read_text())["categories"]
    unknown = [category for category in categories if category not in listed]
    if unknown:
        raise SystemExit(f"no category {unknown}; choose from {sorted(listed)} or all")
    wanted: set[str] = set()
    for category in categories:
        wanted.update(listed[category])
    return [i for i, name in enumerate(names) if name in wanted]


def make_caption(name: str) -> str:
    """The prompt of a drawing: `red-apple` -> `red apple`."""
    return name.replace("-", " ")


def to_float(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in -1..1, the range of the VAE."""
    return images.float() / 127.5 - 1
