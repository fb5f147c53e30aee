"""Sweeps in which something goes wrong that no setting is to blame for.

`experiments/faults/run.py` does the same to real processes.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from support.cli_process import Command

import int8run.tasks.run
from int8run.tracking.run_record import FAILED, FINISHED, KILLED, find_records

SMALL = [
    "sampler.width=16",
    "sampler.steps=1",
    "prompts.prompts=[a]",
    "metrics.baseline=none",
    "metrics.system_s=0",
    "backend=reference",
    "cache.limit_gb=0",
    "hydra.sweep.dir=sweep",
]


def make_run_that_fails(seed: int, error: BaseException) -> Callable[..., object]:
    """Make a stand-in for `tasks.run.run` that raises an error for one seed."""
    real_run = int8run.tasks.run.run

    def run(spec: int8run.tasks.run.RunSpec, job: int8run.tasks.run.Job) -> object:
        if spec.seed == seed:
            raise error
        return real_run(spec, job)

    return run


def read_states(command: Command) -> dict[int, str]:
    return {record.number: record.state for record in find_records(command.folder / "sweep")}


def read_tracked_states(command: Command) -> list[tuple[str, str]]:
    """The seed and the state of each run in MLflow."""
    client = mlflow.MlflowClient(f"sqlite:///{command.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    return sorted((run.data.params["seed"], run.info.status) for run in runs)


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_which_goes_on_later(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["-m", "seed=0,1,2", "sampler.height=16", model, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(int8run.tasks.run, "run", make_run_that_fails(1, KeyboardInterrupt()))
        outcome = command(*arguments)
    assert outcome.code == 130
    assert outcome.message == "interrupted; the same command with resume=true goes on"
    assert read_states(command) == {0: FINISHED, 1: KILLED}

    resumed = command(*arguments, "resume=true")

    assert resumed.code == 0
    assert read_states(command) == dict.fromkeys(range(3), FINISHED)
    assert read_tracked_states(command) == [
        ("0", FINISHED),
        ("1", FINISHED),
        ("1", KILLED),
        ("2", FINISHED),
    ]


def test_a_bug_in_one_job_leaves_a_traceback_in_its_log(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8run.tasks.run, "run", make_run_that_fails(0, ZeroDivisionError("a bug")))

    outcome = command("-m", "seed=0,1", "sampler.height=16", model, "tracker=none", *SMALL)

    assert outcome.code == 1
    assert "Traceback" not in outcome.out
    assert outcome.message.splitlines()[1:] == ["  job 0 (seed=0) FAILED: ZeroDivisionError: a bug"]
    assert read_states(command) == {0: FAILED, 1: FINISHED}
    log = (command.folder / "sweep" / "0" / "int8run.log").read_text()
    assert "Traceback" in log
    assert "raise error" in log
    assert "make_run_that_fails" not in outcome.err


@pytest.fixture
def small_disk(command: Command) -> Iterator[Path]:
    """A disk of 256 KB as the sweep's folder."""
    folder = command.folder / "sweep"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    is_root = os.getuid() == 0
    if not is_root or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("nobody but root can mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_fails_one_job_alone(command: Command, model: str, small_disk: Path) -> None:
    """The image of the second job does not fit and leaves no file; there is room for the third job."""
    outcome = command("-m", "sampler.height=16,4096,32", model, "tracker=none", *SMALL)

    assert outcome.code == 3
    assert "Traceback" not in outcome.out + outcome.err
    summary, line = outcome.message.splitlines()
    assert summary.startswith("1 of 3 jobs did not finish")
    assert line.startswith("  job 1 (sampler.height=4096) FAILED: the disk is full, and ")
    assert read_states(command) == {0: FINISHED, 1: FAILED, 2: FINISHED}
    assert "the disk is full" in (small_disk / "report.html").read_text()
    assert list((small_disk / "1" / "images").iterdir()) == []
