"""What a sweep shows on the terminal while it runs and when it is done."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from int8run.report import console
from int8run.report.console import (
    SweepProgress,
    build_sweep_table,
    choose_better,
    count_warnings,
    format_duration,
)
from int8run.tracking.run_record import Record, end_record, start_record

IDENTITY = {
    "task": "run",
    "params": {},
    "choices": {},
    "config_hash": "c",
    "build_key": "b",
    "objective": "quality/psnr_db",
    "sweep": "s",
}
NUMBERS = {
    "quality/psnr_db": 55.14,
    "speed/ratio_vs_float": 2.4,
    "speed/step_ms_p50": 7.1,
    "memory/denoiser_bytes": 28e6,
    "quality/latent_rel_err": 0.0093,
}


def record(
    folder: Path,
    number: int,
    words: str,
    state: str = "FINISHED",
    warnings: tuple[str, ...] = (),
    **metrics: float,
) -> Record:
    begun = start_record(
        folder / str(number), {**IDENTITY, "number": number, "name": words, "overrides": words.split()}
    )
    (begun.folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    return end_record(begun, state, None if state == "FINISHED" else "broken on purpose", warnings)


def shown(
    monkeypatch: pytest.MonkeyPatch, width: int, records: list[Record], varying: list[str]
) -> list[str]:
    terminal = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(console, "get_console", lambda: terminal)
    terminal.print(build_sweep_table(records, varying))
    return [
        line.split() for line in terminal.file.getvalue().splitlines() if line.strip() and "─" not in line
    ]


def test_a_line_per_job_with_all_numbers_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(monkeypatch, 100, [record(tmp_path, 3, "outlier=none", **NUMBERS)], ["outlier"])
    assert lines == [
        ["job", "outlier", "PSNR", "dB", "×", "float", "step", "ms", "MB", "latent", "err", "%"],
        ["3", "none", "55.1", "2.40", "7.1", "28.0", "0.93"],
    ]


def test_numbers_make_room_for_settings_and_no_word_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "lora.mode=stochastic outlier=hadanorm backend=torch_int_mm"
    lines = shown(
        monkeypatch, 60, [record(tmp_path, 0, words, **NUMBERS)], ["lora.mode", "outlier", "backend"]
    )
    assert lines[1] == ["0", "stochastic", "hadanorm", "torch_int_mm", "55.1"]


def test_a_job_that_did_not_finish_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(tmp_path, 0, "seed=0", **NUMBERS), record(tmp_path, 1, "seed=1", "KILLED")]
    lines = shown(monkeypatch, 100, records, ["seed"])
    assert lines[2] == ["1", "1", "–", "–", "–", "–", "–", "KILLED"] and "FINISHED" not in str(lines)


def test_each_warning_is_said_once_with_its_count(tmp_path: Path) -> None:
    records = [
        record(tmp_path, 0, "a=1", warnings=("odd", "odd")),
        record(tmp_path, 1, "a=2", warnings=("odd", "rare")),
    ]
    assert count_warnings(records) == ["odd (2 of 2 jobs)", "rare (1 of 2 jobs)"]
    assert count_warnings(records[1:]) == ["odd", "rare"]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("quality/psnr_db", [50, 55, 52], 1),
        ("quality/latent_rel_err", [0.02, 0.01, 0.03], 1),
        ("speed/step_ms_p50", [3, 2, 1], 2),
        ("speed/ratio_vs_float", [1, 3, 2], 1),
        ("memory/denoiser_bytes", [5, 6, 7], 0),
        ("quality/psnr_db", [float("nan"), 1, 0.5], 1),
    ],
)
def test_the_best_is_the_smallest_error_or_the_largest_quality(
    tmp_path: Path, metric: str, values: list[float], best: int
) -> None:
    held = None
    for number, value in enumerate(values):
        held = choose_better(
            held,
            record(tmp_path, number, f"a={number}", **{metric: "nan" if value != value else value}),
            metric,
        )
    assert held is not None and held.number == best


def test_a_failed_job_is_not_the_best(tmp_path: Path) -> None:
    assert choose_better(None, record(tmp_path, 0, "a=1", "FAILED", **NUMBERS), "quality/psnr_db") is None


def test_a_line_for_every_job_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "get_console", lambda: terminal)
    moments = iter([0.0, 60.0, 90.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(moments))
    progress = SweepProgress(4, 1, "quality/psnr_db", enabled=True)
    progress.report_start(1, "outlier=[none]")
    progress.report_end(record(tmp_path, 1, "outlier=none", **NUMBERS))
    progress.report_end(record(tmp_path, 2, "outlier=quarot", "FAILED"))
    assert [line.rstrip() for line in terminal.file.getvalue().splitlines()] == [
        "job 1 outlier=[none] …",
        "job 1 (outlier=none) PSNR 55.1 dB, 2.40× float's speed, 7.1 ms a step · 2 of 4, 1:00 gone · about 2:00 left"
        " · best quality/psnr_db 55.1 dB: outlier=none",
        "job 2 (outlier=quarot) FAILED: broken on purpose · 3 of 4, 1:30 gone · about 0:45 left"
        " · best quality/psnr_db 55.1 dB: outlier=none",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_times_of_a_clock(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
