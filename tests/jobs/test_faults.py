"""Sweeps in which something goes wrong that is nobody's setting. `experiments/faults/run.py` does the same to real processes."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from support.cli_process import Command, command_in
from support.tiny_pipeline import save_random_pipeline

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.location={save_random_pipeline(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def int8run_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    with command_in(tmp_path / "work", monkeypatch, capsys) as command:
        yield command


def in_seed(seed: int, error: BaseException) -> Callable[..., object]:
    """A run that ends with an error for one seed."""
    real = int8run.tasks.run.run

    def run(spec: int8run.tasks.run.RunSpec, job: int8run.tasks.run.Job) -> object:
        if spec.seed == seed:
            raise error
        return real(spec, job)

    return run


def states(command: Command) -> dict[int, str]:
    return {record.number: record.state for record in find_records(command.folder / "sweep")}


def test_ctrl_c_ends_the_sweep_which_goes_on_later(
    int8run_command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", "seed=0,1,2", "sampler.height=16", model, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(int8run.tasks.run, "run", in_seed(1, KeyboardInterrupt()))
        outcome = int8run_command(*words)
    assert (outcome.code, outcome.message) == (130, "interrupted; the same command with resume=true goes on")
    assert states(int8run_command) == {0: FINISHED, 1: KILLED}
    assert int8run_command(*words, "resume=true").code == 0
    assert states(int8run_command) == dict.fromkeys(range(3), FINISHED)
    client = mlflow.MlflowClient(f"sqlite:///{int8run_command.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    found = sorted((run.data.params["seed"], run.info.status) for run in runs)
    assert found == [("0", FINISHED), ("1", FINISHED), ("1", KILLED), ("2", FINISHED)]


def test_a_bug_in_one_job_is_told_whole_in_its_log(
    int8run_command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8run.tasks.run, "run", in_seed(0, ZeroDivisionError("a bug")))
    outcome = int8run_command("-m", "seed=0,1", "sampler.height=16", model, "tracker=none", *SMALL)
    assert outcome.code == 1 and "Traceback" not in outcome.out
    assert outcome.message.splitlines()[1:] == ["  job 0 (seed=0) FAILED: ZeroDivisionError: a bug"]
    assert states(int8run_command) == {0: FAILED, 1: FINISHED}
    log = (int8run_command.folder / "sweep" / "0" / "int8run.log").read_text()
    assert "Traceback" in log and "in_seed" not in outcome.err and "raise error" in log


@pytest.fixture
def small_disk(int8run_command: Command) -> Iterator[Path]:
    """A disk of 256 KB as the sweep's folder."""
    folder = int8run_command.folder / "sweep"
    folder.mkdir()
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("nobody but root can mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_jobs_failure(int8run_command: Command, model: str, small_disk: Path) -> None:
    """The picture of the second job does not fit and is not left half; the third job has the room."""
    outcome = int8run_command("-m", "sampler.height=16,4096,32", model, "tracker=none", *SMALL)
    assert outcome.code == 3 and "Traceback" not in outcome.out + outcome.err
    head, line = outcome.message.splitlines()
    assert head.startswith("1 of 3 jobs did not finish") and line.startswith(
        "  job 1 (sampler.height=4096) FAILED: the disk is full, and "
    )
    assert states(int8run_command) == {0: FINISHED, 1: FAILED, 2: FINISHED}
    assert "the disk is full" in (small_disk / "report.html").read_text() and not list(
        (small_disk / "1" / "images").iterdir()
    )
