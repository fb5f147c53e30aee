"""One run that begins with images: what it leaves about them, on a random FluxInpaintPipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.run_job import run_job
from support.tiny_pipeline import save_random_pipeline

from int8run.metrics.edits import EditSource, measure_regions
from int8run.tasks.run import RunResult

SIDE = 16
SHOWN_SIDE = 192  # of an image in the grid


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White on its left half."""
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (0, 0, SIDE // 2, SIDE))
    return image


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory, cat: Image.Image, mask: Image.Image) -> RunResult:
    """A run of two prompts, an image and a mask."""
    folder = tmp_path_factory.mktemp("edit")
    cat.save(folder / "cat.png")
    mask.save(folder / "mask.png")
    overrides = [
        f"model.location={save_random_pipeline(folder / 'model')}",
        "model.mode=inpaint",
        f"sampler.height={SIDE}",
        f"sampler.width={SIDE}",
        "sampler.steps=3",
        "prompts.prompts=[a,b]",
        f"prompts.image={folder / 'cat.png'}",
        f"prompts.mask_image={folder / 'mask.png'}",
        "prompts.strength=0.6",
        "tracker=none",
        "backend=reference",
    ]
    return run_job(overrides, folder / "out")


def read_entries(result: RunResult) -> list[dict[str, object]]:
    """The samples in metrics.json."""
    saved = json.loads((Path(result.output_dir) / "metrics.json").read_text())
    return saved["images"]


def test_metrics_json_names_the_inputs(edit: RunResult) -> None:
    for entry in read_entries(edit):
        assert [(given["column"], given["name"]) for given in entry["inputs"]] == [
            ("image", "cat.png"),
            ("mask_image", "mask.png"),
        ]
        assert entry["strength"] == 0.6


def test_each_input_is_shown_once_for_all_samples(edit: RunResult, cat: Image.Image) -> None:
    first, second = read_entries(edit)

    assert first["inputs"] == second["inputs"]
    (name,) = first["inputs"][0]["images"]
    assert Image.open(edit.output_dir / name).tobytes() == cat.tobytes()


def test_the_error_is_measured_on_both_sides_of_the_mask(edit: RunResult, mask: Image.Image) -> None:
    frames = zip(edit.candidate.frames, edit.baseline.frames, strict=True)
    alone = [measure_regions(ours, floats, EditSource(masks=[mask])) for ours, floats in frames]

    for name in ("masked_psnr_db", "unmasked_psnr_db", "masked_share"):
        mean = np.mean([values[name] for values in alone])
        assert edit.metrics[f"quality/{name}"] == pytest.approx(mean)
    assert edit.metrics["quality/masked_share"] == 0.5


def test_inputs_are_the_first_column_of_the_grid(edit: RunResult, cat: Image.Image) -> None:
    sheet = Image.open(edit.output_dir / "grid.png")

    top = 36 + 2 * 24 - 4  # below the headings and two captions
    cell = sheet.crop((12, top, 12 + SHOWN_SIDE, top + SHOWN_SIDE))
    enlarged = cat.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.NEAREST)
    assert cell.tobytes() == enlarged.tobytes()
    # image and mask side by side, then float, INT8 and difference
    gap = 4 * SHOWN_SIDE // SIDE
    assert sheet.width == 12 + (2 * SHOWN_SIDE + gap + 12) + 3 * (SHOWN_SIDE + 12)


def test_image_and_mask_are_parted_by_white_and_have_a_heading_each(edit: RunResult) -> None:
    sheet = Image.open(edit.output_dir / "grid.png").convert("RGB")

    top = 36 + 2 * 24 - 4
    gap = 4 * SHOWN_SIDE // SIDE
    left_of_mask = 12 + SHOWN_SIDE + gap
    between = sheet.crop((12 + SHOWN_SIDE, top, left_of_mask, top + SHOWN_SIDE))
    heading = sheet.crop((left_of_mask, 0, left_of_mask + SHOWN_SIDE, 30)).convert("L")
    assert between.getcolors() == [(gap * SHOWN_SIDE, (255, 255, 255))]
    assert heading.getextrema()[0] < 128, "there is text above the mask"


def test_steps_that_a_strength_leaves_out_are_not_called_rounded(edit: RunResult) -> None:
    saved = json.loads((Path(edit.output_dir) / "metrics.json").read_text())

    assert saved["sampling"]["steps"] == 2
    assert saved["rounded"] == {}
