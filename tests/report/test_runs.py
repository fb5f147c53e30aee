"""How a report names its runs, and how it tells in which settings they differ."""

import math

import pytest
from report.run_folders import make_metrics, write_run

from int8run.report.columns import PSNR_DB, STEP_MS
from int8run.report.runs import format_list, format_tags, name_runs
from int8run.tracking.run_record import find_records
from int8run.tracking.setting_names import find_varying_keys, shorten_keys


def test_runs_are_told_apart_by_the_overrides_that_differ(tmp_path):
    for n, (option, more) in enumerate((("none", {}), ("convrot", {"outlier.group_size": "256"}))):
        overrides = ["model=tiny", f"+outlier={option}", "tracker=none" if n else "tracker=mlflow"]
        write_run(tmp_path, n, overrides, {"outlier": option, **more}, metrics={})

    runs = name_runs(find_records(tmp_path))

    assert [dict(run.varied_settings) for run in runs] == [{"outlier": "none"}, {"outlier": "convrot"}]


def test_runs_with_equal_overrides_are_told_apart_by_all_settings(tmp_path):
    for n in range(2):
        write_run(tmp_path, n, ["model=tiny"], {"backend": "ab"[n]}, metrics={})

    runs = name_runs(find_records(tmp_path))

    assert [run.name for run in runs] == ["#0 backend=a", "#1 backend=b"]


def test_runs_with_equal_numbers_are_numbered_by_position(tmp_path):
    runs = name_runs([write_run(tmp_path / side, 3, metrics={}) for side in "ab"])

    assert [run.tag for run in runs] == ["#0", "#1"]


def test_a_run_of_another_task_does_not_change_the_labels(tmp_path):
    write_run(tmp_path, 0, ["outlier=none"], {"task": "run"}, make_metrics(10, 2, 40))
    write_run(tmp_path, 1, ["outlier=convrot"], {"task": "run"}, make_metrics(11, 1.9, 45))
    write_run(tmp_path, 2, ["task=quantize", "outlier=none"], environment=None)

    runs = name_runs(find_records(tmp_path))

    assert [run.label for run in runs] == ["outlier=none", "outlier=convrot", "outlier=none"]


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["lora.strength", "outlier"], ["strength", "outlier"]),
        (
            ["lora.strength", "lora.adapters.0.strength", "lora.adapters.1.strength"],
            ["lora.strength", "0.strength", "1.strength"],
        ),
        (["a.b", "b"], ["a.b", "b"]),
    ],
)
def test_shortened_keys_are_unique(keys, short):
    assert list(shorten_keys(keys).values()) == short


@pytest.mark.parametrize(
    ("tags", "text"), [(["#0"], "#0"), (["#0", "#1"], "#0, #1"), (["#0", "#1", "#2", "#7"], "#0–#2, #7")]
)
def test_three_tags_in_a_row_become_a_range(tags, text):
    assert format_tags(tags) == text


def test_metrics_of_an_unfinished_run_do_not_count(tmp_path):
    (run,) = name_runs([write_run(tmp_path, metrics=make_metrics(), state="KILLED")])

    assert run.get_metric(STEP_MS) is None


def test_a_metric_that_is_not_a_number_does_not_count(tmp_path):
    (run,) = name_runs([write_run(tmp_path, metrics={PSNR_DB: math.nan})])

    assert run.get_metric(PSNR_DB) is None


def test_a_key_that_only_some_runs_have_varies():
    settings = [{"model": "tiny", "outlier": "none"}, {"model": "tiny", "outlier": "none", "seed": "1"}]

    assert find_varying_keys(settings) == ["seed"]
    assert find_varying_keys(settings[:1]) == [] and find_varying_keys([]) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("['a fox, red', \"it's an owl\"]", "a fox, red; it's an owl"),
        ("[]", "[]"),
        ("[0.5, 1]", "[0.5, 1]"),
        ("[fox,owl]", "[fox,owl]"),
        ("[" * 5000, "[" * 5000),
        ("none", "none"),
    ],
)
def test_a_list_of_texts_is_shown_without_its_quotes(value, shown):
    assert format_list(value) == shown
