"""Runs of video pipelines from settings to files: frames, animations, stills, metrics per frame, and what a
tracker gets.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from families.instances_b import INSTANCES
from PIL import Image
from support.run_job import run_job

from int8run.metrics.key_frames import select_key_frames
from int8run.pipeline import process_cache
from int8run.tasks.run import RunResult

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = {"wan": 5, "ltx": 9, "ltx2": 9}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    """One run of two prompts for each pipeline, and the lines of its log."""
    made = {}
    for name in FRAMES:
        folder, instance = tmp_path_factory.mktemp(name), INSTANCES[name]
        instance.build().save_pretrained(folder / "model")
        process_cache.clear()
        sampling = instance.sampling
        extra = [f"+sampler.extra.{key}={value}".replace(" ", "") for key, value in sampling.extra.items()]
        size = [f"sampler.{key}={getattr(sampling, key)}" for key in ("steps", "height", "width", "guidance")]
        about = [
            f"model.location={folder / 'model'}",
            "model.dtype=float32",
            "prompts.prompts=[a b,b]",
            "tracker=none",
            "backend=reference",
        ]
        made[name] = run_job([*about, *size, *extra], folder / "out")
    return made


@pytest.mark.parametrize("name", FRAMES)
def test_a_run_leaves_animations_stills_and_a_grid(runs: dict[str, RunResult], name: str) -> None:
    result, count = runs[name], FRAMES[name]
    keys = ["000_a-b_s0", "001_b_s0"]
    files = {p.name for p in (result.output_dir / "images").iterdir()}
    kinds = [".webp", *(f"_{which}.png" for which in ("first", "middle", "last"))]

    assert files == {f"{key}{who}{kind}" for key in keys for who in ("", "_float") for kind in kinds}
    for generation, who in ((result.candidate, ""), (result.baseline, "_float")):
        assert [len(frames) for frames in generation.frames] == [count] * 2
        for key, frames in zip(keys, generation.frames, strict=True):
            assert Image.open(result.output_dir / "images" / f"{key}{who}.webp").n_frames == count
            for which, number in select_key_frames(count).items():
                assert (
                    Image.open(result.output_dir / "images" / f"{key}{who}_{which}.png").tobytes()
                    == frames[number].tobytes()
                )

    # each sample has a caption and three rows of images, enlarged to 192 pixels; three columns
    sheet, side = Image.open(result.output_dir / "grid.png"), 192

    assert sheet.size == (12 + 3 * (side + 12), 24 + 2 * (24 + 3 * (24 + side + 12)) + 12)

    frames = {
        (i, number): result.candidate.frames[i][number]
        for i in range(2)
        for number in select_key_frames(count).values()
    }
    for (i, number), frame in frames.items():
        row = sorted(frames).index((i, number)) % 3
        top = 36 + i * (24 + 3 * 228) + 24 + row * 228 + 20
        cell = sheet.crop((12 + side + 12, top, 12 + 2 * side + 12, top + side))

        assert cell.tobytes() == frame.resize((side, side), Image.Resampling.NEAREST).tobytes(), (i, number)


@pytest.mark.parametrize("name", FRAMES)
def test_metrics_are_those_of_the_frames(runs: dict[str, RunResult], name: str) -> None:
    result, count = runs[name], FRAMES[name]
    saved = json.loads((result.output_dir / "metrics.json").read_text())
    for image, ours, floats in zip(
        saved["images"], result.candidate.frames, result.baseline.frames, strict=True
    ):
        decibels = []
        for a, b in zip(ours, floats, strict=True):
            error = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
            decibels.append(10 * np.log10(255**2 / np.mean(error**2)) if error.any() else np.inf)

        # infinity is a word in JSON; frames of the tiny Wan may be equal
        assert [float(frame["psnr_db"]) for frame in image["frames"]] == pytest.approx(decibels, abs=1e-3)
        assert len(decibels) == count
        # equal frames do not count in the mean where others differ
        finite = [value for value in decibels if np.isfinite(value)]
        assert float(image["psnr_db"]) == pytest.approx(np.mean(finite or decibels), abs=1e-3)
        assert image["ssim"] == pytest.approx(np.mean([frame["ssim"] for frame in image["frames"]]))
        assert 0 < image["latent_rel_err"] < 0.1
        assert (result.output_dir / image["file"]).suffix == ".webp"
        assert all((result.output_dir / still).is_file() for still in image["stills"])
        assert len(image["stills"]) == 3
    metrics = saved["metrics"]

    assert float(metrics["quality/psnr_db"]) == pytest.approx(
        np.mean([float(image["psnr_db"]) for image in saved["images"]])
    )
    assert name == "wan" or metrics["quality/psnr_db"] < 100
    for who in ("speed", "float"):
        assert metrics[f"{who}/frames_per_s"] == pytest.approx(count * metrics[f"{who}/images_per_s"])


def test_a_record_has_a_value_per_frame_and_names_the_stills_of_both_models(
    runs: dict[str, RunResult],
) -> None:
    saved = json.loads((runs["ltx"].output_dir / "metrics.json").read_text())
    expected = [np.mean([image["frames"][i]["psnr_db"] for image in saved["images"]]) for i in range(9)]

    assert saved["series"]["series/frame_psnr_db"] == pytest.approx(expected)
    for image in saved["images"]:
        assert image["stills"] == [
            f"images/{image['key']}_{which}.png" for which in ("first", "middle", "last")
        ]
        assert image["float_stills"] == [
            f"images/{image['key']}_float_{which}.png" for which in ("first", "middle", "last")
        ]
        assert (image["file"], image["float"]) == (
            f"images/{image['key']}.webp",
            f"images/{image['key']}_float.webp",
        )
        assert all(
            (runs["ltx"].output_dir / name).is_file()
            for name in (*image["stills"], *image["float_stills"], image["float"])
        )


def test_a_video_of_one_frame_is_an_image(runs: dict[str, RunResult], tmp_path: Path) -> None:
    folder = runs["wan"].output_dir.parent / "model"
    about = [
        f"model.location={folder}",
        "model.dtype=float32",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
    ]
    size = ["sampler.steps=1", "sampler.height=48", "sampler.width=48", "+sampler.extra.num_frames=1"]
    result = run_job([*about, *size], tmp_path)

    assert {p.name for p in (tmp_path / "images").iterdir()} == {"000_a_s0.png", "000_a_s0_float.png"}

    (image,) = json.loads((tmp_path / "metrics.json").read_text())["images"]

    assert image["file"] == "images/000_a_s0.png"
    assert not {"frames", "stills"} & set(image)
    assert "speed/frames_per_s" not in result.metrics
    assert image["float"] == "images/000_a_s0_float.png"
    assert "float_stills" not in image
    assert "series/frame_psnr_db" not in json.loads((tmp_path / "metrics.json").read_text())["series"]


def test_sound_is_left_out_with_one_line(
    runs: dict[str, RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = runs["ltx2"].output_dir.parent / "model"
    about = [
        f"model.location={folder}",
        "model.dtype=float32",
        "prompts.prompts=[a,b]",
        "tracker=none",
        "backend=reference",
    ]
    size = [
        "sampler.steps=1",
        "sampler.height=32",
        "sampler.width=32",
        "+sampler.extra.num_frames=9",
        "metrics.baseline=none",
    ]
    with caplog.at_level(logging.INFO, "int8run"):
        result = run_job([*about, *size], tmp_path)

    assert result.candidate.has_sound
    assert not runs["ltx"].candidate.has_sound
    assert [m for m in caplog.messages if "sound" in m] == [
        "LTX2Pipeline makes sound with its videos; it is neither compared nor kept"
    ]

    (first, second) = json.loads((tmp_path / "metrics.json").read_text())["images"]

    assert first["file"] != second["file"]
    assert "frames" not in first
    assert len(first["stills"]) == 3
