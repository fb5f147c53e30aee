"""The table that ends a sweep."""

import io
import json

import pytest
from report.sweep_jobs import JOB_METRICS, write_job
from rich.cells import cell_len
from rich.console import Console

from int8run.report import console, formatting, sweep_table
from int8run.report.console import print_lines
from int8run.report.sweep_table import build_sweep_table, count_warnings


@pytest.fixture
def print_sweep_table(monkeypatch):
    """A function that prints the table on a terminal of some width, and returns the words of each line."""

    def print_table(width, records, varying):
        terminal = Console(width=width, file=io.StringIO())
        monkeypatch.setattr(sweep_table, "get_console", lambda: terminal)
        monkeypatch.setattr(console, "get_console", lambda: terminal)
        print_lines(build_sweep_table(records, varying))
        lines = terminal.file.getvalue().splitlines()
        return [line.split() for line in lines if line.strip() and "─" not in line]

    return print_table


def test_a_wide_terminal_shows_all_metrics_of_a_job(tmp_path, print_sweep_table):
    lines = print_sweep_table(100, [write_job(tmp_path, 3, "outlier=none", **JOB_METRICS)], ["outlier"])

    assert lines == [
        ["PSNR", "speed", "step", "denoiser", "latent"],
        ["job", "outlier", "dB", "×", "float", "ms", "MB", "error,", "%"],
        ["3", "none", "55.1", "2.40×", "7.10", "28.0", "0.93"],
    ]


def test_a_sweep_over_int8_parts_shows_what_each_costs(tmp_path, print_sweep_table):
    part = {"quant/attention_sqnr_db_mean": 41.26, "vae/psnr_db": 56.51, "vae/decode_ratio": 2.5}
    shares = [{"quant/macs_int8_share": share} for share in (0.957, 0.99)]
    jobs = [
        write_job(tmp_path, 0, "int8.vae=float", **JOB_METRICS, **shares[0]),
        write_job(tmp_path, 1, "int8.vae=int8", **JOB_METRICS, **shares[1], **part),
    ]

    wide = print_sweep_table(150, jobs, ["int8.vae"])
    narrow = print_sweep_table(50, jobs, ["int8.vae"])

    few = ["55.1", "2.40×", "7.10"]
    assert wide[2] == ["0", "float", *few, "–", "–", "–", "28.0", "0.93", "95.7"]
    assert wide[3] == ["1", "int8", *few, "56.5", "2.50×", "41.3", "28.0", "0.93", "99.0"]
    assert "int8.vae=float" in " ".join(wide[4]), "why there is none"
    assert ["1", "int8", *few, "56.5", "2.50×"] in narrow


def test_a_share_that_is_the_same_in_all_jobs_has_no_column(tmp_path, print_sweep_table):
    metrics = {**JOB_METRICS, "quant/macs_int8_share": 0.957}
    jobs = [write_job(tmp_path, number, f"seed={number}", **metrics) for number in (0, 1)]

    lines = print_sweep_table(150, jobs, ["seed"])

    assert lines[2] == ["0", "0", *NUMBERS]


def test_on_a_narrow_terminal_metrics_make_room_for_settings(tmp_path, print_sweep_table):
    overrides = "lora.mode=stochastic outlier=hadanorm backend=torch_int_mm"
    job = write_job(tmp_path, 0, overrides, **JOB_METRICS)

    lines = print_sweep_table(55, [job], ["lora.mode", "outlier", "backend"])

    assert lines[2] == ["0", "stochastic", "hadanorm", "torch_int_mm", "55.1"]


SETTING_VALUES = ["0.5", "[[0,1],[0.5,0]]", "x" * 5000, "[red]", "狐狸" * 50, "a\x1b[2Jb"]
NUMBERS = ["55.1", "2.40×", "7.10", "28.0", "0.93"]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize(
    "value", ["0.5", "[[0,1],[0.5,0]]", "x" * 5000, "[red]", "狐狸" * 50, "a\x1b[2Jb"], ids=len
)
def test_a_narrow_table_drops_columns_and_cuts_no_number(tmp_path, print_sweep_table, width, value):
    keys = ["lora.adapters.0.strength", "lora.adapters.1.strength", "outlier", "model.location"]
    jobs = []
    for number in (8, 10):
        job = write_job(tmp_path, number, "", **JOB_METRICS)
        job.status["overrides"] = [f"{key}={value}" for key in keys]
        jobs.append(job)

    lines = print_sweep_table(width, jobs, keys)

    rows = [line for line in lines if line[0] in ("8", "10")]
    assert [row[0] for row in rows] == ["8", "10"], "the number of each job"
    for row in rows:
        shown = [word for word in row if word in NUMBERS]
        assert shown == NUMBERS[: len(shown)] and shown, "whole numbers, the first metric at least"
        assert cell_len("   ".join(row)) <= width


def test_a_setting_without_room_is_named(tmp_path, print_sweep_table):
    job = write_job(tmp_path, 0, "lora.mode=stochastic outlier=hadanorm backend=torch_int_mm", **JOB_METRICS)

    lines = print_sweep_table(30, [job], ["lora.mode", "outlier", "backend"])

    assert " ".join(lines[-1]) == "no room for backend; a wider terminal or the report shows it"


def test_settings_of_the_same_name_have_different_heads(tmp_path, print_sweep_table):
    job = write_job(tmp_path, 0, "lora.strength=1 lora.adapters.0.strength=0.5 seed=3", **JOB_METRICS)

    lines = print_sweep_table(100, [job], ["lora.strength", "lora.adapters.0.strength", "seed"])

    assert lines[1][:4] == ["job", "lora.strength", "0.strength", "seed"]


def test_the_work_of_a_table_grows_with_its_jobs(tmp_path, print_sweep_table, monkeypatch):
    measured = []

    def measure(text):
        measured.append(len(text))
        return cell_len(text)

    monkeypatch.setattr(sweep_table, "cell_len", measure)
    monkeypatch.setattr(formatting, "cell_len", measure)

    def count(num_jobs):
        measured.clear()
        jobs = []
        for number in range(num_jobs):
            job = write_job(tmp_path, 0, "", **JOB_METRICS)
            job.status["overrides"] = [f"{key}={'x' * 3000}{number}" for key in "abcdefgh"]
            jobs.append(job)
        print_sweep_table(80, jobs, list("abcdefgh"))
        return sum(measured)

    few, many = count(5), count(20)
    assert many < 5 * few


def test_a_job_that_did_not_finish_shows_its_state(tmp_path, print_sweep_table):
    finished = write_job(tmp_path, 0, "seed=0", **JOB_METRICS)
    killed = write_job(tmp_path, 1, "seed=1", "KILLED")

    lines = print_sweep_table(100, [finished, killed], ["seed"])

    assert lines[3] == ["1", "1", "–", "–", "–", "–", "–", "KILLED"]
    assert "FINISHED" not in json.dumps(lines)


def test_each_warning_is_listed_once_with_its_count(tmp_path):
    records = [
        write_job(tmp_path, 0, "a=1", warnings=("odd", "odd")),
        write_job(tmp_path, 1, "a=2", warnings=("odd", "rare")),
    ]

    assert count_warnings(records) == ["odd (2 of 2 jobs)", "rare (1 of 2 jobs)"]
    assert count_warnings(records[1:]) == ["odd", "rare"]


def test_the_table_of_a_sweep_says_why_cells_are_empty(tmp_path, print_sweep_table):
    without_float = {"speed/step_ms_p50": 7.1}
    jobs = [write_job(tmp_path, 0, "metrics.baseline=run", **JOB_METRICS)]
    for number in (1, 2):
        job = write_job(tmp_path, number, "metrics.baseline=none", **without_float)
        job.status["params"] = {"metrics.baseline": "none"}
        jobs.append(job)
    jobs.append(write_job(tmp_path, 3, "metrics.baseline=run", state="FAILED"))

    lines = print_sweep_table(160, jobs, ["metrics.baseline"])

    notes = " ".join(" ".join(line) for line in lines if line[0] not in ("0", "1", "2", "3"))
    assert "– in jobs 1, 2: metrics.baseline=none: the float model did not run" in notes
    assert "– in jobs 1, 2: not measured" in notes, "the denoiser's memory"
    assert "jobs 3" not in notes and "job 3" not in notes, "its state says why"
