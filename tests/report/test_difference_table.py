"""The tables of differences: what is told apart, by how much, and how many more samples would tell."""

import json
import math

import numpy as np
import pytest
from report.run_folders import make_metrics, write_run, write_runs

from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import bound_by_student
from int8run.report.comparison import compare_runs
from int8run.report.difference_table import build_difference_tables, describe_tables
from int8run.report.differences import collect_sample_psnrs, read_interval_settings
from int8run.report.runs import name_runs
from int8run.report.verdict import recommend
from int8run.tracking.run_record import find_records


def test_each_setting_stands_beside_the_best_one(tmp_path):
    metrics = [make_metrics(10, 2.0, 40.0), make_metrics(20, 1.0, 50.0), make_metrics(20, 1.0, 49.99)]

    tables = recommend(write_runs(tmp_path, metrics, "abc", num_samples=8)).differences

    quality, speed = tables
    assert quality.heading == "Quality beside #1 outlier=b"
    assert [row.name for row in quality.rows] == ["#2 outlier=c", "#0 outlier=a"]
    assert not quality.rows[0].is_told_apart
    assert quality.rows[0].conclusion.startswith("not told apart: 8 samples do not tell")
    assert quality.rows[1].difference.startswith(("10.0", "9.9"))
    assert quality.rows[1].conclusion == "further from float" and quality.rows[1].count == "8 samples"
    assert speed.heading == "Speed beside #0 outlier=a"
    assert {row.conclusion for row in speed.rows} == {"slower"}
    assert all(row.difference.startswith(("50.0 % [", "49.9 % [")) for row in speed.rows), "half of the speed"


def test_the_terminal_has_a_line_for_each_setting(tmp_path):
    runs = write_runs(tmp_path, [make_metrics(10, 2.0, 40.0), make_metrics(20, 1.0, 50.0)], num_samples=8)

    lines = describe_tables(build_difference_tables(compare_runs(runs)))

    assert lines[0] == "Quality beside #1 outlier=convrot, PSNR behind:"
    assert lines[1].startswith("  #0 outlier=none: ") and lines[1].endswith("(8 samples), further from float")
    assert lines[2] == "Speed beside #0 outlier=none, slower by:"


def test_images_that_equal_floats_count_as_almost_equal(tmp_path):
    metrics = [make_metrics(10, 2.0, 50.0), make_metrics(10, 2.0, math.inf)]
    runs = write_runs(tmp_path, metrics, num_samples=8)

    limited = collect_sample_psnrs(compare_runs(runs).candidates[1])
    (row,) = recommend(runs).differences[0].rows

    # one step of 255 in one color of one of 64 x 64 pixels
    one_step = 20 * math.log10(255) + 10 * math.log10(3 * 64 * 64)
    assert list(limited.values()) == pytest.approx([one_step] * 8)
    assert row.conclusion == "further from float"


def test_the_closest_is_the_one_that_is_ahead_sample_by_sample(tmp_path):
    """A mean without identical images says less good of a setting that has some."""
    metrics = [make_metrics(10, 2.0, 50.0), make_metrics(20, 1.0, math.inf)]
    write_runs(tmp_path, metrics, num_samples=8)
    of_second = tmp_path / "1" / "metrics.json"
    written = json.loads(of_second.read_text())
    written["metrics"]["quality/psnr_db"] = 45.0
    of_second.write_text(json.dumps(written))

    runs = name_runs(find_records(tmp_path))
    found = recommend(runs)

    assert found.differences[0].heading == "Quality beside #1 outlier=convrot"
    assert found.differences[0].rows[0].conclusion == "further from float"
    one_step = 20 * math.log10(255) + 10 * math.log10(3 * 64 * 64)
    mean_of_first = np.mean([sample["psnr_db"] for sample in runs[0].record.images])
    assert f"#1 outlier=convrot is {one_step - mean_of_first:.1f} dB closer to float" in found.verdict


def test_of_many_settings_every_pair_shares_the_level(tmp_path):
    metrics = [make_metrics(psnr=50.0 + number) for number in range(5)]

    comparison = compare_runs(write_runs(tmp_path, metrics, "abcde", num_samples=8))

    first, *_, best = (list(collect_sample_psnrs(candidate).values()) for candidate in comparison.candidates)
    low, high = bound_by_student(np.subtract(best, first), 1 - 0.05 / 10)
    interval = comparison.quality_standings[0].difference.interval
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_seeds_of_a_prompt_count_as_one(tmp_path):
    metrics = [make_metrics(psnr=50.0), make_metrics(psnr=50.01)]
    for run in write_runs(tmp_path, metrics, num_samples=12):
        path = run.record.folder / "metrics.json"
        written = json.loads(path.read_text())
        for number, entry in enumerate(written["images"]):
            entry |= {"prompt": f"p{number // 2}", "seed": number % 2}
        path.write_text(json.dumps(written))

    (row,) = recommend(name_runs(find_records(tmp_path))).differences[0].rows

    assert row.count == "6 prompts, 12 samples"
    assert row.conclusion.startswith("not told apart: 6 prompts do not tell")


def test_strengths_of_a_sample_are_one_sample(tmp_path):
    for number, (strength, outlier) in enumerate([(0, "a"), (0, "b"), (1, "a"), (1, "b")]):
        overrides = [f"lora.strength={strength}", f"outlier={outlier}"]
        metrics = make_metrics(psnr=50.0 + number)
        write_run(tmp_path, number, overrides, metrics=metrics, num_samples=4)

    runs = name_runs(find_records(tmp_path))
    first, second = compare_runs(runs).candidates

    assert len(collect_sample_psnrs(first)) == len(collect_sample_psnrs(second)) == 4


def test_the_level_is_that_of_the_runs(tmp_path):
    runs = write_runs(tmp_path, [make_metrics()] * 2)
    text = "metrics:\n  intervals:\n    _target_: x\n    level: 0.9\n    resamples: 999\n"
    (runs[0].record.folder / "config.yaml").write_text(text)

    assert read_interval_settings(runs) == IntervalSettings(level=0.9, resamples=999)
    assert read_interval_settings(runs[1:]) == IntervalSettings()
