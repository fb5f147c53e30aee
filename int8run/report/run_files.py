"""The files that a run leaves in its output folder."""

import csv
import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageChops, ImageDraw, ImageFont

from int8run.layers.plan import LayerPlan
from int8run.utils.hardware import get_cpu_name

# a picture smaller than this is enlarged in the grid, by a whole factor and without smoothing
GRID_MIN_SIDE = 192
DIFFERENCE_GAIN = 8
# characters at the end of a caption that are never cut: ` · seed 12`
CAPTION_END = 10
# of WebP; lossless, a noisy video takes seven times the bytes, and the PNGs beside it are exact
ANIMATION_QUALITY = 95
ANIMATION_EFFORT = 2  # half the time of WebP's usual 4 for as many bytes
LAYER_COLUMNS = (
    "name",
    "out_features",
    "in_features",
    "quantized",
    "why_not",
    "outlier",
    "outlier_why_not",
    "rounding",
    "backend_asked",
    "backend_used",
    "weight_sqnr_db",
    "output_sqnr_db",
    "saturated_share",
)


def make_difference_image(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| times DIFFERENCE_GAIN, clipped: black where equal."""
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).point(
        lambda v: min(255, v * DIFFERENCE_GAIN)
    )


def make_image_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Pictures in rows with a caption above each row and a heading above each column.

    A row without pictures is a caption for the rows below it: those of one video.
    """
    side = max(im.width for _, images in rows for im in images)
    factor = max(1, -(-GRID_MIN_SIDE // side))
    width, height = (d * factor for d in next(images[0].size for _, images in rows if images))
    # words grow with the pictures: a large sheet is looked at from further away
    gap, text = 12, max(16, width // 24)
    font = ImageFont.load_default(size=text)
    line = text + 8
    heights = [line + (height + gap if images else 0) for _, images in rows]
    sheet = Image.new("RGB", (len(columns) * (width + gap) + gap, line + sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for c, heading in enumerate(columns):
        draw.text((gap + c * (width + gap), gap // 2), heading, fill="black", font=font)
    for top, (caption, images) in zip(accumulate(heights, initial=line + gap), rows, strict=False):
        draw.text(
            (gap, top - 2),
            shorten_caption(caption, sheet.width - 2 * gap, font.getlength),
            fill="#555",
            font=font,
        )
        for c, image in enumerate(images):
            resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(resized, (gap + c * (width + gap), top + line - 4))
    return sheet


def save_sample(
    frames: Sequence[Image.Image], shown: Mapping[str, int], folder: Path, name: str, frames_per_second: float
) -> list[str]:
    """A picture as PNG; a video as an animation, and some of its frames as PNG.

    Args:
        shown: numbers of these frames, by what they are called.

    Returns:
        names of the files in `folder`; the first is the whole sample.
    """
    if len(frames) == 1:
        frames[0].save(folder / f"{name}.png")
        return [f"{name}.png"]
    # when each frame ends, to the millisecond, so that no error adds up
    ends = [round(1000 * i / frames_per_second) for i in range(len(frames) + 1)]
    times = [b - a for a, b in pairwise(ends)]
    first, *others = frames
    animation = folder / f"{name}.webp"
    first.save(
        animation,
        save_all=True,
        append_images=others,
        duration=times,
        loop=0,
        quality=ANIMATION_QUALITY,
        method=ANIMATION_EFFORT,
    )
    stills = {f"{name}_{which}.png": frames[number] for which, number in shown.items()}
    for file, frame in stills.items():
        frame.save(folder / file)
    return [animation.name, *stills]


def shorten_caption(text: str, width: float, length: Callable[[str], float]) -> str:
    """A text that is no longer than a width: its beginning, `…` and its end, where the seed stands."""
    if length(text) <= width:
        return text
    end = text[-CAPTION_END:]
    return next(
        (cut for n in range(len(text), 0, -1) if length(cut := f"{text[:n].rstrip()}…{end}") <= width), end
    )


def write_layers_csv(plans: Sequence[LayerPlan], path: Path) -> None:
    """`layers.csv`: every Linear of the denoiser, once."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS)
        writer.writeheader()
        for p in plans:
            writer.writerow(
                {
                    "name": p.name,
                    "out_features": p.out_features,
                    "in_features": p.in_features,
                    "quantized": str(p.skip_reason is None).lower(),
                    "why_not": p.skip_reason or "",
                    "outlier": p.outlier,
                    "outlier_why_not": p.outlier_skip_reason,
                    "rounding": p.rounding,
                    "backend_asked": p.backend_asked,
                    "backend_used": p.backend_used,
                    **{name: f"{value:.6g}" for name, value in p.measured.items()},
                }
            )


def write_json(data: object, path: Path) -> None:
    """JSON for people; values that JSON has no number for become the strings `inf`, `-inf`, `nan`."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(replace_non_finite(data), indent=2) + "\n")
    new.replace(path)  # a job that is killed meanwhile leaves no half of it


def replace_non_finite(value: object) -> object:
    """A value with non-finite floats as strings, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): replace_non_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(v) for v in value]
    return value


def write_yaml(data: object, path: Path) -> None:
    """The resolved config."""
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def collect_environment(device: torch.device, versions: Mapping[str, str]) -> dict[str, object]:
    """Versions, device and git revision of the folder that the command ran in."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": dict(versions),
        "git": read_git_revision(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    else:
        facts["cpu"] = get_cpu_name()
    return facts


def read_git_revision() -> str | None:
    """The revision of the working folder, `-dirty` when changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
