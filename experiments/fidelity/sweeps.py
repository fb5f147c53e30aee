"""What is read of a sweep over the tiny model.

Its jobs, and how many of the images show what was asked for.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

DRAWINGS = Path(__file__).parents[2] / "tests" / "data" / "drawings.png"
CELL = 64


def read_jobs(sweep: Path) -> list[dict[str, Any]]:
    """Settings and results of the jobs of a multirun."""
    read = []
    for folder in sorted(
        (f for f in sweep.iterdir() if (f / "metrics.json").is_file()), key=lambda f: int(f.name)
    ):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        read.append({"folder": folder, "config": config, **json.loads((folder / "metrics.json").read_text())})
    return read


def read_drawings() -> tuple[list[str], np.ndarray]:
    """Names, and pixels [D, 64 * 64 * 3], of everything that the model was trained on."""
    names = DRAWINGS.with_suffix(".txt").read_text().split()
    sheet = np.asarray(Image.open(DRAWINGS).convert("RGB"), dtype=np.float32)
    columns = sheet.shape[1] // CELL
    cells = [sheet[i // columns * CELL :, i % columns * CELL :][:CELL, :CELL] for i in range(len(names))]
    return names, np.stack(cells).reshape(len(names), -1)


def compute_top1(files: list[Path], prompts: list[str], names: list[str], known: np.ndarray) -> float:
    """Share of images whose nearest drawing has the prompt's name."""
    found = []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32).reshape(1, -1)
        found.append(names[int(((known - pixels) ** 2).mean(1).argmin())])
    return sum(f == p.replace(" ", "-") for f, p in zip(found, prompts, strict=True)) / len(files)
