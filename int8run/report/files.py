"""The files that a run leaves in its output folder."""

import csv
import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageChops, ImageDraw, ImageFont

from int8run.machine import cpu_name
from int8run.quantize import LayerPlan

# a picture smaller than this is enlarged in the grid, by a whole factor and without smoothing
GRID_MIN_SIDE = 192
DIFFERENCE_GAIN = 8
# characters at the end of a caption that are never cut: ` · seed 12`
CAPTION_END = 10
LAYER_COLUMNS = (
    "name", "out_features", "in_features", "quantized", "why_not", "outlier", "outlier_why_not", "rounding",
    "backend_asked", "backend_used", "weight_sqnr_db", "output_sqnr_db", "saturated_share",
)  # fmt: skip


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| times DIFFERENCE_GAIN, clipped: black where equal."""
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).point(lambda v: min(255, v * DIFFERENCE_GAIN))


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Pictures in rows with a caption above each row and a heading above each column."""
    side = max(im.width for _, images in rows for im in images)
    factor = max(1, -(-GRID_MIN_SIDE // side))
    width, height = (d * factor for d in rows[0][1][0].size)
    gap, text = 12, 16
    font = ImageFont.load_default(size=text)
    line = text + 8
    sheet = Image.new("RGB", (len(columns) * (width + gap) + gap, line + len(rows) * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for c, heading in enumerate(columns):
        draw.text((gap + c * (width + gap), gap // 2), heading, fill="black", font=font)
    for r, (caption, images) in enumerate(rows):
        top = line + gap + r * (height + line + gap)
        draw.text((gap, top - 2), fitting(caption, sheet.width - 2 * gap, font.getlength), fill="#555", font=font)
        for c, image in enumerate(images):
            resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(resized, (gap + c * (width + gap), top + line - 4))
    return sheet


def fitting(text: str, width: float, length: Callable[[str], float]) -> str:
    """A text that is no longer than a width: its beginning, `…` and its end, where the seed stands."""
    if length(text) <= width:
        return text
    end = text[-CAPTION_END:]
    return next((cut for n in range(len(text), 0, -1) if length(cut := f"{text[:n].rstrip()}…{end}") <= width), end)


def write_layers(plans: Sequence[LayerPlan], path: Path) -> None:
    """`layers.csv`: every Linear of the denoiser, once."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS)
        writer.writeheader()
        for p in plans:
            writer.writerow(
                {
                    "name": p.name, "out_features": p.out_features, "in_features": p.in_features,
                    "quantized": str(p.keep_float is None).lower(), "why_not": p.keep_float or "", "outlier": p.outlier,
                    "outlier_why_not": p.outlier_why_not, "rounding": p.rounding,
                    "backend_asked": p.backend_asked, "backend_used": p.backend_used,
                    **{name: f"{value:.6g}" for name, value in p.measured.items()},
                }
            )  # fmt: skip


def write_json(data: object, path: Path) -> None:
    """JSON for people; values that JSON has no number for become the strings `inf`, `-inf`, `nan`."""
    path.write_text(json.dumps(plain(data), indent=2) + "\n")


def plain(value: object) -> object:
    """A value with non-finite floats as strings, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def write_yaml(data: object, path: Path) -> None:
    """The resolved config."""
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def environment(device: torch.device, versions: Mapping[str, str]) -> dict[str, object]:
    """Versions, device and git revision of the folder that the command ran in."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": dict(versions),
        "git": git_revision(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    else:
        facts["cpu"] = cpu_name()
    return facts


def git_revision() -> str | None:
    """The revision of the working folder, `-dirty` when changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
