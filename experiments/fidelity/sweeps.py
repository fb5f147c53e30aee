"""What is read of a sweep over the tiny model.

Its jobs, and how many of the images show what was asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

DRAWINGS = Path(__file__).parents[2] / "tests" / "data" / "drawings.png"
CELL = 64


def read_jobs(sweep: Path) -> list[dict[str, Any]]:
    """Settings and results of the jobs of a multirun."""
    finished = [folder for folder in sweep.iterdir() if (folder / "metrics.json").is_file()]
    jobs = []
    for folder in sorted(finished, key=lambda folder: int(folder.name)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        results = json.loads((folder / "metrics.json").read_text())
        jobs.append({"folder": folder, "config": config, **results})
    return jobs


@dataclass(frozen=True)
class Drawings:
    """Everything that the tiny model was trained on.

    Args:
        names: such as `red-apple`.
        pixels: of each, [len(names), 64 * 64 * 3], 0 to 255.
    """

    names: list[str]
    pixels: np.ndarray

    def find_nearest(self, image: Path) -> str:
        """The name of the drawing with the least mean squared error to an image of 64 x 64."""
        pixels = read_pixels(image).reshape(1, -1)
        errors = ((self.pixels - pixels) ** 2).mean(axis=1)
        return self.names[int(errors.argmin())]


def read_pixels(image: Path) -> np.ndarray:
    """[H, W, 3], 0 to 255."""
    return np.asarray(Image.open(image).convert("RGB"), dtype=np.float32)


def read_drawings() -> Drawings:
    """Cut the sheet of drawings into its cells."""
    names = DRAWINGS.with_suffix(".txt").read_text().split()
    sheet = read_pixels(DRAWINGS)
    columns = sheet.shape[1] // CELL
    cells = []
    for number in range(len(names)):
        top, left = number // columns * CELL, number % columns * CELL
        cells.append(sheet[top : top + CELL, left : left + CELL])
    return Drawings(names, np.stack(cells).reshape(len(names), -1))


def compute_top1(files: Sequence[Path], prompts: Sequence[str], drawings: Drawings) -> float:
    """Share of images whose nearest drawing has the prompt's name."""
    hits = 0
    for file, prompt in zip(files, prompts, strict=True):
        hits += drawings.find_nearest(file) == prompt.replace(" ", "-")
    return hits / len(files)
