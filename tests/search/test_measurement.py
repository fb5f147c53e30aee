"""What a trial measured, from run folders: PSNR of files to the reference, time, memory; what is missing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from int8run.errors import FileError
from int8run.metrics.interval_settings import IntervalSettings
from int8run.search.measurement import Measurement, measure_trial
from int8run.tracking.run_record import Record

SETTINGS = IntervalSettings()
GRAY = 100


def write_run(
    folder: Path,
    level: int,
    *,
    float_level: int | None = None,
    metrics: dict[str, float] | None = None,
    size: int = 8,
) -> Record:
    """A run of two samples whose images have one level each."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    for number, prompt in enumerate(["a fox", "nan"]):
        entry = {"prompt": prompt, "seed": 7 + number, "file": f"{number}.png", "width": size, "height": size}
        save(folder / f"{number}.png", level, size)
        if float_level is not None:
            entry["float"] = f"{number}_float.png"
            save(folder / f"{number}_float.png", float_level, size)
        images.append(entry)
    if metrics is None:
        metrics = {
            "speed/images_per_s": 4.0,
            "memory/denoiser_bytes": 100.0,
            "memory/text_encoder_bytes": 20.0,
        }
    results = {
        "metrics": metrics,
        "images": images,
        "series": {"series/block_step_ms": [10.0, 11.0, 10.5, 9.5]},
    }
    (folder / "metrics.json").write_text(json.dumps(results))
    return Record(folder, {"state": "FINISHED"})


def save(path: Path, level: int, size: int) -> None:
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(path)


def test_the_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "0", GRAY + 9, float_level=GRAY)
    record = write_run(tmp_path / "1", GRAY + 5)

    measured = measure_trial(record, reference, SETTINGS)

    assert measured.quality_db == pytest.approx(-20 * math.log10(5 / 255))
    assert measured.prompts == ("a fox", "nan")
    assert measured.seconds == 0.25
    assert measured.seconds_low < 0.25 < measured.seconds_high
    assert measured.bytes == 120
    assert not measured.scatters


def test_identical_images_have_a_finite_quality(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "0", GRAY, float_level=GRAY)

    measured = measure_trial(reference, reference, SETTINGS)

    assert math.isfinite(measured.quality_db)
    assert measured.quality_db > 60


def test_stills_of_a_video_count_together(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "0", GRAY, float_level=GRAY)
    record = write_run(tmp_path / "1", GRAY)
    for path, level in (("a", 0), ("b", 8)):
        save(tmp_path / "1" / f"{path}.png", GRAY + level, 8)
    for one, names in ((record, ["a.png", "b.png"]), (reference, [])):
        facts = json.loads((one.folder / "metrics.json").read_text())
        for entry in facts["images"]:
            entry["stills"] = names or ["x.png"]
            entry["float_stills"] = [entry.get("float")] * 2
        (one.folder / "metrics.json").write_text(json.dumps(facts))

    measured = measure_trial(Record(record.folder, {}), Record(reference.folder, {}), SETTINGS)

    assert measured.quality_db == pytest.approx(-10 * math.log10((8 / 255) ** 2 / 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "0.png").unlink(), r"0\.png cannot be read"),
        (lambda folder: (folder / "0.png").write_text("no image"), r"0\.png cannot be read"),
        (lambda folder: save(folder / "0.png", 3, 4), r"have different sizes"),
        (lambda folder: (folder / "metrics.json").write_text("{}"), r"has no speed or no memory"),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path: Path, change: Any, message: str) -> None:
    reference = write_run(tmp_path / "0", GRAY, float_level=GRAY)
    record = write_run(tmp_path / "1", GRAY)
    change(record.folder)

    with pytest.raises(FileError, match=message):
        measure_trial(Record(record.folder, {}), reference, SETTINGS)


def test_a_reference_without_float_images_is_named(tmp_path: Path) -> None:
    reference, record = write_run(tmp_path / "0", GRAY), write_run(tmp_path / "1", GRAY)

    with pytest.raises(FileError, match=r"has no float image of 'a fox', seed 7, to compare"):
        measure_trial(record, reference, SETTINGS)


def test_a_measurement_comes_back_from_json() -> None:
    measured = Measurement((30.0, 31.0), ("nan", "b"), 1.0, 0.9, 1.1, 5.0, scatters=True)

    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured
