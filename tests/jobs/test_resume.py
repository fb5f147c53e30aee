"""`resume=true`: what is finished is not run again, and nothing is lost or mixed up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from support.cli_process import Command, Outcome

from int8run.jobs.manifest import read_manifest
from int8run.jobs.resume import SweepFolder, find_sweep_folder
from int8run.tracking.run_record import (
    FAILED,
    FINISHED,
    KILLED,
    Record,
    find_records,
    read_record,
    update_record,
)

SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=1",
    "prompts.prompts=[a]",
    "metrics.baseline=none",
    "backend=reference",
    "cache.limit_gb=0",
]
UNTRACKED = [*SMALL, "tracker=none"]
COMPARED = [override for override in UNTRACKED if "baseline" not in override]
WAIT_S = 300  # for what takes a few seconds on a quiet machine


def read_records(command: Command) -> list[Record]:
    return find_records(command.folder / "multirun")


def read_start_times(command: Command) -> dict[str, float]:
    return {record.name: record.started for record in read_records(command)}


def find_only_sweep(command: Command) -> Path:
    (folder,) = {path.parent for path in (command.folder / "multirun").rglob("sweep.json")}
    return folder


def read_tracked_runs(folder: Path) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("int8run").experiment_id])


def join_lines(text: str) -> str:
    """The terminal's line breaks depend on its width."""
    return " ".join(text.split())


def test_only_what_is_missing_runs_in_the_folder_of_the_sweep(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1,2", model, *UNTRACKED).code == 0
    started_before = read_start_times(command)
    folder = find_only_sweep(command)
    manifest = read_manifest(folder)
    failed_folder = read_records(command)[1].folder
    update_record(read_record(failed_folder), state=FAILED, error="on purpose")

    outcome = command("-m", "seed=0,1,2", model, *UNTRACKED, "resume=true")

    assert outcome.code == 0
    assert "2 of 3 jobs are finished already" in join_lines(outcome.out)
    started = read_start_times(command)
    assert {name for name in started if started[name] != started_before[name]} == {"seed=1"}
    assert find_only_sweep(command) == folder
    assert read_manifest(folder) == manifest
    jobs = [(record.number, record.state, record.folder.name) for record in read_records(command)]
    assert jobs == [(n, FINISHED, str(n)) for n in range(3)]


@pytest.mark.slow
def test_a_wider_sweep_in_another_order_keeps_what_it_finds(command: Command, model: str) -> None:
    assert command("-m", "seed=1,2", model, *UNTRACKED).code == 0
    started_before = read_start_times(command)

    assert command("-m", "seed=3,2,1,0", model, *UNTRACKED, "resume=true").code == 0

    records = {record.name: record for record in read_records(command)}
    assert set(records) == {f"seed={n}" for n in range(4)}
    assert {name: records[name].started for name in started_before} == started_before
    assert (records["seed=1"].folder.name, records["seed=2"].folder.name) == ("0", "1")
    assert {records["seed=0"].folder.name, records["seed=3"].folder.name} == {"2", "3"}
    for record in records.values():
        assert record.config["seed"] == int(record.name[-1])
        assert record.folder.name == str(record.number)


@pytest.mark.slow
def test_another_setting_is_another_job(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1", model, *UNTRACKED).code == 0

    outcome = command("-m", "seed=0,1", "sampler.guidance=2", model, *UNTRACKED, "resume=true")

    assert outcome.code == 0
    assert "has one of these jobs" in join_lines(outcome.out)
    assert len(list((command.folder / "multirun").rglob("sweep.json"))) == 2
    assert len(read_records(command)) == 4


def test_another_sweep_of_the_same_second_does_not_go_on(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1", model, *UNTRACKED).code == 0
    (manifest,) = (command.folder / "multirun").rglob("sweep.json")
    hydra_settings = {"sweep": {"dir": str(manifest.parent)}, "overrides": {"hydra": []}}
    other_job = OmegaConf.create({"seed": 7, "resume": True, "hydra": hydra_settings})

    folder = find_sweep_folder([other_job])

    assert folder == SweepFolder(manifest.parent, goes_on=False)


@pytest.mark.slow
def test_without_resume_a_sweep_is_a_new_one(command: Command, model: str) -> None:
    for _ in range(2):
        assert command("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here").code == 0

        records = find_records(command.folder / "here")
        assert len(records) == 2
        assert {record.sweep for record in records} == {read_manifest(command.folder / "here").id}


@pytest.mark.slow
def test_a_job_that_still_runs_is_not_run_beside_itself(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1", model, *UNTRACKED).code == 0
    update_record(read_records(command)[1], state="RUNNING", ended=None)  # this process, which is alive

    outcome = command("-m", "seed=0,1", model, *UNTRACKED, "resume=true")

    assert outcome.code == 2
    message = f"job 1 of this sweep runs in process {os.getpid()}; wait for it, or end it, then resume"
    assert outcome.message == message


def test_a_single_run_has_nothing_to_resume(command: Command, model: str) -> None:
    outcome = command(model, *UNTRACKED, "resume=true")

    assert outcome.code == 2
    message = (
        "resume=true goes on with a sweep or a search, and this is a single run; add -m, or leave resume out"
    )
    assert outcome.message == message
    assert command.made() == []


@pytest.mark.slow
def test_jobs_that_only_the_tracker_has_are_downloaded(command: Command, model: str) -> None:
    """The folder is gone; MLflow knows the jobs by their hashes."""
    assert command("-m", "seed=0,1", model, *SMALL).code == 0
    (command.folder / "multirun").rename(command.folder / "elsewhere")

    outcome = command("-m", "seed=2,1,0", model, *SMALL, "resume=true")

    assert outcome.code == 0
    assert "2 of 3 jobs are finished already" in join_lines(outcome.out)
    records = read_records(command)
    assert [(record.number, record.name, record.uploaded) for record in records] == [
        (0, "seed=2", True),
        (1, "seed=1", True),
        (2, "seed=0", True),
    ]
    assert {record.name: record.state for record in records} == {f"seed={n}": FINISHED for n in range(3)}
    assert all((record.folder / record.images[0]["file"]).is_file() for record in records)
    tracked_seeds = sorted(run.data.params["seed"] for run in read_tracked_runs(command.folder))
    assert tracked_seeds == ["0", "1", "2"], "none twice"


def kill_in_third_job(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start a sweep, and kill its process (SIGKILL) once two jobs are finished and the third one runs."""
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + WAIT_S
        while True:
            states = [record.state for record in find_records(folder)]
            if states.count(FINISHED) >= 2 and len(states) >= 3:
                break
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path, model: str) -> None:
    """With MLflow: four jobs finished, none twice, the killed one not running for ever."""
    command = [sys.executable, "-m", "int8run.cli", "-m", "seed=0,1,2,3", model, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    kill_in_third_job(command, tmp_path, environment)
    states = [record.state for record in find_records(tmp_path)]
    # killed while it ran, or a moment after it ended
    assert states in ([FINISHED, FINISHED, KILLED], [FINISHED] * 3)

    resumed = subprocess.run(
        [*command, "resume=true"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert resumed.returncode == 0, resumed.stderr
    records = find_records(tmp_path)
    assert [(record.number, record.state) for record in records] == [(n, FINISHED) for n in range(4)]
    runs = read_tracked_runs(tmp_path)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    finished_seeds = [run.data.params["seed"] for run in runs if run.info.status == "FINISHED"]
    assert sorted(finished_seeds) == ["0", "1", "2", "3"]
    killed = [run for run in runs if run.info.status == "KILLED"]
    assert all("without an error message" in run.data.tags["error"] for run in killed)
    assert len({run.data.tags["sweep"] for run in runs}) == 1


@pytest.mark.slow
def test_a_damaged_record_is_a_job_that_is_missing(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1", model, *UNTRACKED).code == 0
    (read_records(command)[1].folder / "status.json").write_text('{"sta')
    damaged_sweep = command.folder / "multirun" / "other"
    damaged_sweep.mkdir()
    (damaged_sweep / "sweep.json").write_text("[")

    outcome = command("-m", "seed=0,1", model, *UNTRACKED, "resume=true")

    assert outcome.code == 0
    assert "1 of 2 jobs are finished already" in join_lines(outcome.out)
    jobs = [(record.number, record.state) for record in read_records(command)]
    assert jobs == [(0, FINISHED), (1, FINISHED)]


def test_a_folder_that_cannot_be_made_fails_its_job_alone(command: Command, model: str) -> None:
    sweep = command.folder / "here"
    sweep.mkdir()
    (sweep / "0").write_text("in the way")

    outcome = command("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here")

    assert outcome.code == 3
    assert "job 0 (seed=0) FAILED: " in outcome.message
    assert "cannot be opened or written: file exists" in outcome.message
    assert [(record.number, record.state) for record in find_records(sweep)] == [(1, FINISHED)]
    assert "FAILED" in (sweep / "report.html").read_text()


def test_one_sweep_at_a_time_in_a_folder(command: Command, model: str) -> None:
    folder = command.folder / "here"
    folder.mkdir()

    with FileLock(folder / "int8run.lock"):
        outcome = command("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here")

    assert outcome.code == 2
    assert outcome.message == (
        f"another process is writing to {folder}; wait for it, or choose another folder: "
        "hydra.sweep.dir=FOLDER"
    )
    assert find_records(folder) == []


@pytest.mark.parametrize(
    "arguments", [["hydra.run.dir=file/x"], ["-m", "seed=0,1", "hydra.sweep.dir=file/x"]]
)
def test_a_folder_that_cannot_be_written_is_named(command: Command, model: str, arguments: list[str]) -> None:
    (command.folder / "file").write_text("in the way")

    outcome = command(*arguments, model, *UNTRACKED)

    assert outcome.code == 3
    message = r"\S*file\S* cannot be opened or written: (not a directory|file exists); check the path "
    assert re.match(message, outcome.message)


@pytest.fixture
def run_half_failing_sweep(command: Command, model: str) -> Callable[..., Outcome]:
    """Four jobs; the two with model.location=missing fail."""
    location = model.removeprefix("model.location=")
    return lambda *arguments: command(
        "-m", f"model.location=missing,{location}", "seed=0,1", *UNTRACKED, *arguments
    )


def test_every_job_that_failed_is_named_at_the_end(
    run_half_failing_sweep: Callable[..., Outcome], command: Command
) -> None:
    outcome = run_half_failing_sweep()

    assert outcome.code == 3
    summary, *lines = outcome.message.splitlines()
    assert summary == "2 of 4 jobs did not finish; the same command with resume=true runs these alone"
    jobs = [line.partition(":")[0] for line in lines]
    assert jobs == [f"  job {n} (model.location=missing seed={n}) FAILED" for n in (0, 1)]
    assert all("missing" in line.partition("FAILED: ")[2] for line in lines)
    assert [record.state for record in read_records(command)] == [FAILED, FAILED, FINISHED, FINISHED]
    sweep = find_only_sweep(command)
    assert (sweep / "report.html").is_file()
    log = (sweep / "0" / "int8run.log").read_text()
    assert "[ERROR]" in log
    assert "missing" in log


@pytest.mark.slow
def test_a_sweep_shows_how_far_it_is_and_what_is_best(command: Command, model: str) -> None:
    outcome = command("-m", "outlier=none,convrot", model, *COMPARED)

    assert outcome.code == 0
    shown = join_lines(outcome.out + outcome.err)
    assert re.search(r"1 of 2 done, \d+:\d\d elapsed, about \d+:\d\d left", shown)
    assert re.search(r"2 of 2 done, \d+:\d\d elapsed", shown)
    assert "highest PSNR so far " in shown


def test_seeds_are_not_better_or_worse(command: Command, model: str) -> None:
    outcome = command("-m", "seed=0,1", model, *COMPARED)

    assert outcome.code == 0
    assert "2 of 2 done, " in outcome.out + outcome.err
    assert "so far" not in outcome.out + outcome.err


@pytest.mark.slow
def test_a_sweep_without_progress_shows_no_lines_for_its_jobs(command: Command, model: str) -> None:
    outcome = command("-m", "seed=0,1", model, *UNTRACKED, "progress=false")

    assert outcome.code == 0
    assert "1 of 2" not in outcome.out + outcome.err


def test_the_table_of_a_sweep_is_in_metrics_json(command: Command, model: str) -> None:
    outcome = command("-m", "seed=0,1", model, *COMPARED)

    for record in read_records(command):
        status = json.loads((record.folder / "status.json").read_text())
        assert status["state"] == FINISHED
        assert f"{record.metrics['speed/step_ms_p50']:.1f}" in outcome.out
