"""What a sweep shows while it runs: how each job ended, and whose number is the best so far."""

import io
import math

import pytest
from report.sweep_jobs import JOB_METRICS, write_job
from rich.console import Console
from support.hostile_texts import HOSTILE_TEXTS

from int8run.report import console, sweep_progress
from int8run.report.ranking import varies_content
from int8run.report.sweep_progress import SweepProgress, choose_better
from int8run.tracking.run_record import Record
from int8run.utils.text import UNSAFE_BUT_LINES, make_visible


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("quality/psnr_db", [50, 55, 52], 1),
        ("quality/latent_rel_err", [0.02, 0.01, 0.03], 1),
        ("speed/step_ms_p50", [3, 2, 1], 2),
        ("speed/ratio_vs_float", [1, 3, 2], 1),
        ("memory/denoiser_bytes", [5, 6, 7], 0),
        ("quality/psnr_db", [math.nan, 1, 0.5], 1),
    ],
)
def test_the_best_job_has_the_smallest_error_or_the_largest_quality(tmp_path, metric, values, best):
    best_so_far = None

    for number, value in enumerate(values):
        job = write_job(tmp_path, number, f"a={number}", **{metric: "nan" if math.isnan(value) else value})
        best_so_far = choose_better(best_so_far, job, metric)

    assert best_so_far is not None and best_so_far.number == best


def test_a_failed_job_is_not_the_best(tmp_path):
    failed = write_job(tmp_path, 0, "a=1", "FAILED", **JOB_METRICS)

    assert choose_better(None, failed, "quality/psnr_db") is None


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=repr)
def test_names_and_errors_of_jobs_are_shown_as_they_are(tmp_path, monkeypatch, text):
    terminal = Console(width=4000, file=TerminalFile(), color_system=None)
    monkeypatch.setattr(console, "get_console", lambda: terminal)
    job = write_job(tmp_path, 0, "", **JOB_METRICS)
    finished = Record(job.folder, {**job.status, "name": f"prompt={text}"})
    failed = Record(job.folder, {**job.status, "name": "a=1", "state": "FAILED", "error": f"no file {text}"})

    progress = SweepProgress(4, [job], "quality/psnr_db", enabled=True)
    progress.report_start(0, f"prompt={text}")
    progress.report_end(finished)
    progress.report_end(failed)

    written = terminal.file.getvalue()
    assert written.count(f"prompt={make_visible(text)}") >= 2
    assert not UNSAFE_BUT_LINES.search(written)


class TerminalFile(io.StringIO):
    """What a console writes to a terminal."""

    def isatty(self):
        return True


def test_a_terminal_shows_a_line_for_every_job(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    terminal = Console(width=200, file=TerminalFile(), color_system=None)
    monkeypatch.setattr(console, "get_console", lambda: terminal)
    times = iter([0.0, 60.0, 90.0])
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: next(times))

    earlier = write_job(tmp_path, 0, "outlier=convrot", **(JOB_METRICS | {"quality/psnr_db": 54.0}))
    progress = SweepProgress(4, [earlier], "quality/psnr_db", enabled=True)
    progress.report_start(1, "outlier=[none]")
    progress.report_end(write_job(tmp_path, 1, "outlier=none", **JOB_METRICS))
    progress.report_end(write_job(tmp_path, 2, "outlier=quarot", "FAILED"))

    assert [line.rstrip() for line in terminal.file.getvalue().splitlines()] == [
        "Job 1 outlier=[none] …",
        "Job 1 (outlier=none): PSNR 55.1 dB, 2.40× float's speed, 7.1 ms per step"
        " · 2 of 4 done, 1:00 elapsed, about 2:00 left · highest PSNR so far 55.1 dB: outlier=none",
        "Job 2 (outlier=quarot): FAILED: broken on purpose"
        " · 3 of 4 done, 1:30 elapsed, about 0:45 left · highest PSNR so far 55.1 dB: outlier=none",
    ]


def test_a_job_that_an_earlier_sweep_finished_may_be_the_best(tmp_path):
    earlier = write_job(tmp_path, 0, "outlier=convrot", **(JOB_METRICS | {"quality/psnr_db": 60.0}))
    progress = SweepProgress(2, [earlier], "quality/psnr_db", enabled=False)

    progress.report_end(write_job(tmp_path, 1, "outlier=none", **JOB_METRICS))

    assert progress.describe_best() == ["highest PSNR so far 60.0 dB: outlier=convrot"]


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("quality/psnr_db", "highest PSNR so far 60.0 dB [58.0, 62.0]: outlier=convrot"),
        ("quality/lpips", "lowest quality/lpips so far 0.1 [0.05, 0.15]: outlier=convrot"),
    ],
)
def test_the_best_number_so_far_has_its_interval_and_is_no_verdict(tmp_path, objective, text):
    metrics = {"quality/psnr_db": 60.0, "quality/psnr_db_low": 58.0, "quality/psnr_db_high": 62.0}
    metrics |= {"quality/lpips": 0.1, "quality/lpips_low": 0.05, "quality/lpips_high": 0.15}
    earlier = write_job(tmp_path, 0, "outlier=convrot", **(JOB_METRICS | metrics))
    progress = SweepProgress(2, [earlier], objective, enabled=False)

    progress.report_end(write_job(tmp_path, 1, "outlier=none", **(JOB_METRICS | {"quality/lpips": 0.2})))

    assert progress.describe_best() == [text]


@pytest.mark.parametrize(
    ("objective", "values", "best"),
    [
        ("speed/images_per_s", (2.0, 3.0), "seed=1"),
        ("speed/step_ms_p50", (2.0, 3.0), "seed=0"),
        ("quant/macs_int8_share", (0.5, 0.9), "seed=1"),
        ("lora/clipped_share", (0.5, 0.9), "seed=0"),
        ("lora/modules_unmatched", (4, 0), "seed=1"),
        ("quality/lpips", (0.2, 0.1), "seed=1"),
        ("budget/memory_ratio", (1.5, 1.2), "seed=1"),
    ],
)
def test_the_best_job_has_the_most_or_the_least_of_a_metric(tmp_path, objective, values, best):
    progress = SweepProgress(2, [], objective, enabled=False)
    for number, value in enumerate(values):
        metrics = JOB_METRICS | {objective: value}
        progress.report_end(write_job(tmp_path, number, f"seed={number}", **metrics))

    assert progress.best.label == best


def test_no_job_is_best_by_a_metric_of_which_more_is_not_better(tmp_path):
    progress = SweepProgress(2, [], "lora/layers_bake", enabled=False)
    for number in range(2):
        metrics = JOB_METRICS | {"lora/layers_bake": number}
        progress.report_end(write_job(tmp_path, number, f"seed={number}", **metrics))

    assert progress.describe_best() == []


def test_no_strength_of_a_lora_is_the_best(tmp_path):
    progress = SweepProgress(2, [], None, enabled=False)
    for number in range(2):
        progress.report_end(write_job(tmp_path, number, f"lora.strength={number}", **JOB_METRICS))

    assert progress.describe_best() == []


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (["lora.strength"], True),
        (["lora.adapters.0.strength", "seed"], True),
        (["prompts.prompts"], True),
        (["lora.strength", "outlier"], True),
        (["outlier", "backend"], False),
        ([], False),
    ],
)
def test_settings_of_the_content(keys, answer):
    assert varies_content(keys) == answer
