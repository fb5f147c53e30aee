"""`model=tiny_edit` end to end: it edits the image that it is given, and INT8 does not change that."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.run_job import run_job

from int8run.utils.paths import ASSETS_FOLDER

EXAMPLE = ASSETS_FOLDER / "images" / "teapot.png"
DRAWINGS = Path(__file__).parents[1] / "data" / "drawings.png"
CELL = 64
# of those in drawings.png, the ones that the LoRA has not seen
HELD_OUT = ("strawberry", "scorpion", "worm", "potted-plant", "spouting-whale")
Pixels = NDArray[np.float32]


def read_pixels(path: Path) -> Pixels:
    """An image file as numbers from 0 to 255."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)


def mean_square(a: Pixels, b: Pixels) -> float:
    """Mean squared difference of two images."""
    return float(np.square(a - b).mean())


def read_drawings() -> dict[str, Pixels]:
    """The flat drawings of the tests, by name."""
    names = DRAWINGS.with_suffix(".txt").read_text().split()
    sheet = read_pixels(DRAWINGS)
    columns = sheet.shape[1] // CELL
    drawings = {}
    for number, name in enumerate(names):
        y, x = number // columns * CELL, number % columns * CELL
        drawings[name] = sheet[y : y + CELL, x : x + CELL]
    return drawings


def find_nearest(pixels: Pixels, candidates: Mapping[tuple[str, str], Pixels]) -> tuple[str, str]:
    """The edit and the drawing with the least difference."""
    return min(candidates, key=lambda key: mean_square(pixels, candidates[key]))


def find_images(folder: Path) -> list[Path]:
    """The INT8 images of a run, in the order of its prompts; beside them are inputs and float images."""
    return sorted(path for path in (folder / "images").glob("0*.png") if "float" not in path.name)


def test_the_example_is_mirrored_without_any_setting(tmp_path: Path) -> None:
    words = ["model=tiny_edit", "prompts.prompts=[mirror it]", "sampler.steps=4", "tracker=none"]

    metrics = run_job([*words, "metrics.layers=false"], tmp_path).metrics

    (made,) = find_images(tmp_path)
    before = read_pixels(EXAMPLE)
    mirrored = before[:, ::-1]
    assert mean_square(read_pixels(made), mirrored) < mean_square(read_pixels(made), before) / 4
    assert metrics["quality/psnr_db"] >= 30


def test_an_image_of_another_size_is_edited_at_the_models_own(tmp_path: Path) -> None:
    wide = Image.new("RGB", (400, 200), "white")
    wide.paste(Image.open(EXAMPLE).resize((200, 200)), (100, 0))
    wide.save(tmp_path / "wide.png")
    words = ["model=tiny_edit", "prompts.prompts=[mirror it]", f"prompts.image={tmp_path / 'wide.png'}"]

    run_job([*words, "sampler.steps=1", "tracker=none", "metrics.baseline=none"], tmp_path / "out")

    (made,) = find_images(tmp_path / "out")
    assert Image.open(made).size == (64, 64)


@pytest.mark.slow
def test_edits_of_drawings_that_were_not_trained_are_right(tmp_path: Path) -> None:
    drawings = read_drawings()
    candidates = {}
    for name, pixels in drawings.items():
        candidates["as it was", name] = pixels
        candidates["mirror it", name] = pixels[:, ::-1]
        darkest = pixels.min(axis=2, keepdims=True)
        chroma = pixels.max(axis=2, keepdims=True) - darkest
        candidates["make it blue", name] = darkest + chroma * np.array([0, 0.35, 1], dtype=np.float32)
    rows = ["prompt,image"]
    asked = []
    for name in HELD_OUT:
        Image.fromarray(drawings[name].astype(np.uint8)).save(tmp_path / f"{name}.png")
        for prompt in ("mirror it", "make it blue"):
            rows.append(f"{prompt},{name}.png")
            asked.append((prompt, name))
    (tmp_path / "edits.csv").write_text("\n".join(rows))
    words = ["model=tiny_edit", "prompts=file", f"prompts.path={tmp_path / 'edits.csv'}", "tracker=none"]

    metrics = run_job(words, tmp_path / "out").metrics

    found = [find_nearest(read_pixels(path), candidates) for path in find_images(tmp_path / "out")]
    right = [answer == question for answer, question in zip(found, asked, strict=True)]
    assert sum(right) / len(right) >= 0.8, list(zip(asked, found, strict=True))
    assert metrics["quality/psnr_db"] >= 30
