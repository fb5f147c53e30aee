r"""Edit drawings that the edit LoRA has not seen with the INT8 model and with the float model, and compare.

    python experiments/tiny/edit_strip.py --work work --out experiments/tiny/edit.png

Every held-out drawing gets one edit, each edit in turn, by `int8run model=tiny_edit`. Prints the score of
`evaluate_edit.py` for both models and the PSNR of one to the other. Draws some further pairs: the input, what
each model makes of it, and their difference.
"""

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import load_drawings
from edits import PROMPTS, apply_edit, list_held_out
from evaluate_edit import look_up
from hydra import compose, initialize_config_module
from PIL import Image
from torch import Tensor

from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.job import Job
from int8run.report.image_files import DIFFERENCE_GAIN, make_difference_image, make_image_grid
from int8run.tasks.run import RunResult, run

# held-out drawings to show, and their edits
SHOWN = {"guide-dog": "mirror", "teapot": "blue", "strawberry": "3d", "sailboat": "high_contrast"}
COLUMNS = ["input", "float", "INT8", f"difference x {DIFFERENCE_GAIN}"]


@dataclass(frozen=True)
class Pair:
    """One edit of one drawing, by its name and its position among all."""

    name: str
    drawing: int
    edit: str


def list_pairs(names: list[str], count: int) -> list[Pair]:
    """One edit of each held-out drawing, each edit in turn."""
    edits = list(PROMPTS)
    drawings = list_held_out(len(names))[:count]
    return [Pair(names[at], at, edits[i % len(edits)]) for i, at in enumerate(drawings)]


def to_image(drawing: Tensor) -> Image.Image:
    """uint8 [3, H, W] as an image."""
    return Image.fromarray(drawing.permute(1, 2, 0).contiguous().numpy())


def write_table(pairs: list[Pair], drawings: Tensor, folder: Path) -> Path:
    """A prompt table of the pairs, with their drawings beside it."""
    with (folder / "edits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "image"])
        for pair in pairs:
            to_image(drawings[pair.drawing]).save(folder / f"{pair.name}.png")
            writer.writerow([PROMPTS[pair.edit][0], f"{pair.name}.png"])
    return folder / "edits.csv"


def run_table(table: Path, steps: int) -> RunResult:
    """What `int8run model=tiny_edit` makes of a prompt table.

    Args:
        table: the file.
        steps: of the sampler.
    """
    overrides = ["model=tiny_edit", "prompts=file", f"prompts.path={table}", "tracker=none"]
    overrides += ["metrics.layers=false", "cache.limit_gb=0", f"sampler.steps={steps}"]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", overrides)
    job = Job(get_plain_config(config), {"model": "tiny_edit"}, overrides, table.parent / "out")
    return run(create_run_spec(config), job)


def score_pairs(pairs: list[Pair], images: list[Image.Image], candidates: dict[str, Tensor]) -> float:
    """The share of the images that are nearest to what they should be.

    Args:
        pairs: what they should be.
        images: one for each pair.
        candidates: by edit, all drawings after it.
    """
    right = 0
    for edit in candidates:
        chosen = [i for i, pair in enumerate(pairs) if pair.edit == edit]
        if chosen:
            arrays = [np.asarray(images[i].convert("RGB")) for i in chosen]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            found = look_up(pixels, edit, [pairs[i].drawing for i in chosen], candidates)
            right += int(found.right.sum())
    return right / len(pairs)


def draw_strip(pairs: list[Pair], drawings: Tensor, result: RunResult) -> Image.Image:
    """Rows of input, float, INT8 and their difference.

    Args:
        pairs: the last ones of the run.
        drawings: flat, uint8 [N, 3, H, W].
        result: of the run.
    """
    rows = []
    float_images, int8_images = get_images(result)
    shown = slice(-len(pairs), None)
    for pair, a, b in zip(pairs, float_images[shown], int8_images[shown], strict=True):
        before = to_image(drawings[pair.drawing])
        rows.append((PROMPTS[pair.edit][0], [before, a, b, make_difference_image(a, b)]))
    return make_image_grid(rows, COLUMNS)


def get_images(result: RunResult) -> tuple[list[Image.Image], list[Image.Image]]:
    """The images of the float model and of the INT8 model."""
    assert result.baseline is not None, "the float model did not run"
    return list(result.baseline.images), list(result.candidate.images)


def main() -> None:
    """Print a line of JSON, and draw the strip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names, images = load_drawings(args.work)
    pairs = list_pairs(names, args.count)
    shown = [Pair(name, names.index(name), edit) for name, edit in SHOWN.items() if name in names]
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(pairs + shown, images["flat"], Path(folder))
        result = run_table(table, args.steps)
    candidates = {edit: apply_edit(edit, images) for edit in PROMPTS}
    float_images, int8_images = (images[: len(pairs)] for images in get_images(result))
    line = {
        "pairs": len(pairs),
        "steps": args.steps,
        "float": score_pairs(pairs, float_images, candidates),
        "int8": score_pairs(pairs, int8_images, candidates),
        "psnr_db": round(result.metrics["quality/psnr_db"], 1),
        "ssim": round(result.metrics["quality/ssim"], 4),
    }
    print(json.dumps(line))
    draw_strip(shown or pairs, images["flat"], result).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
