"""`resume=true`: what is finished is not run again, and nothing is lost or mixed up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock
from support.cli_process import Command, Outcome, command_in
from support.tiny_pipeline import save_random_pipeline

from int8run.jobs.manifest import read_manifest
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.location={save_random_pipeline(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def int8run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    with command_in(tmp_path / "work", monkeypatch, capsys) as command:
        yield command


def records(int8run: Command) -> list[Record]:
    return find_records(int8run.folder / "multirun")


def began(int8run: Command) -> dict[str, float]:
    """When each job started, by what it is."""
    return {record.name: record.started for record in records(int8run)}


def one_sweep(int8run: Command) -> Path:
    (folder,) = {path.parent for path in (int8run.folder / "multirun").rglob("sweep.json")}
    return folder


def test_only_what_is_missing_runs_in_the_folder_of_the_sweep(int8run: Command, model: str) -> None:
    assert int8run("-m", "seed=0,1,2", model, *UNTRACKED).code == 0
    before, folder = began(int8run), one_sweep(int8run)
    identity = read_manifest(folder)
    kept = records(int8run)[1].folder
    update_record(read_record(kept), state=FAILED, error="on purpose")
    again = int8run("-m", "seed=0,1,2", model, *UNTRACKED, "resume=true")
    assert again.code == 0 and "2 of 3 jobs are finished already" in flat(again.out)
    after = began(int8run)
    assert {name for name in before if after[name] != before[name]} == {"seed=1"}
    assert one_sweep(int8run) == folder and read_manifest(folder) == identity
    assert [(r.number, r.state, r.folder.name) for r in records(int8run)] == [
        (n, FINISHED, str(n)) for n in range(3)
    ]


def test_a_wider_sweep_in_another_order_keeps_what_it_finds(int8run: Command, model: str) -> None:
    assert int8run("-m", "seed=1,2", model, *UNTRACKED).code == 0
    before = began(int8run)
    assert int8run("-m", "seed=3,2,1,0", model, *UNTRACKED, "resume=true").code == 0
    found = {record.name: record for record in records(int8run)}
    assert (
        set(found) == {f"seed={n}" for n in range(4)}
        and {name: found[name].started for name in before} == before
    )
    assert (found["seed=1"].folder.name, found["seed=2"].folder.name) == ("0", "1")
    assert {found["seed=0"].folder.name, found["seed=3"].folder.name} == {"2", "3"}
    assert all(r.config["seed"] == int(r.name[-1]) and r.folder.name == str(r.number) for r in found.values())


def test_another_setting_is_another_job(int8run: Command, model: str) -> None:
    assert int8run("-m", "seed=0,1", model, *UNTRACKED).code == 0
    outcome = int8run("-m", "seed=0,1", "sampler.guidance=2", model, *UNTRACKED, "resume=true")
    assert outcome.code == 0 and "has one of these jobs" in flat(outcome.out)
    assert len(list((int8run.folder / "multirun").rglob("sweep.json"))) == 2 and len(records(int8run)) == 4


def test_without_resume_a_sweep_is_a_new_one(int8run: Command, model: str) -> None:
    for _ in range(2):
        assert int8run("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here").code == 0
        found = find_records(int8run.folder / "here")
        assert len(found) == 2 and {r.sweep for r in found} == {read_manifest(int8run.folder / "here").id}


def test_a_job_that_still_runs_is_not_run_beside_itself(int8run: Command, model: str) -> None:
    assert int8run("-m", "seed=0,1", model, *UNTRACKED).code == 0
    update_record(records(int8run)[1], state="RUNNING", ended=None)  # this process, which is alive
    outcome = int8run("-m", "seed=0,1", model, *UNTRACKED, "resume=true")
    assert (
        outcome.code == 2
        and outcome.message
        == f"job 1 of this sweep runs in process {os.getpid()}; wait for it, or end it, then resume"
    )


def test_a_single_run_has_nothing_to_resume(int8run: Command, model: str) -> None:
    outcome = int8run(model, *UNTRACKED, "resume=true")
    assert (
        outcome.code == 2
        and outcome.message
        == "resume=true goes on with a sweep, and this is a single run; add -m, or leave resume out"
    )
    assert int8run.made() == []


def test_what_the_tracker_has_is_brought_back(int8run: Command, model: str) -> None:
    """The folder is gone; MLflow knows the job by its hash."""
    assert int8run("-m", "seed=0,1", model, *SMALL).code == 0
    (int8run.folder / "multirun").rename(int8run.folder / "elsewhere")
    outcome = int8run("-m", "seed=2,1,0", model, *SMALL, "resume=true")
    assert outcome.code == 0 and "2 of 3 jobs are finished already" in flat(outcome.out)
    assert [(r.number, r.name, r.uploaded) for r in records(int8run)] == [
        (0, "seed=2", True),
        (1, "seed=1", True),
        (2, "seed=0", True),
    ]
    client = mlflow.MlflowClient(f"sqlite:///{int8run.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1", "2"], "none twice"
    assert {r.name: r.state for r in records(int8run)} == {f"seed={n}": FINISHED for n in range(3)}
    assert all((r.folder / r.images[0]["file"]).is_file() for r in records(int8run))


def test_a_sweep_that_is_killed_goes_on(tmp_path: Path, model: str) -> None:
    """kill -9 in the middle of the third job of four, with MLflow: four finished, none twice, the dead one not for ever running."""
    words = [sys.executable, "-m", "int8run.cli", "-m", "seed=0,1,2,3", model, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while sum(r.state == FINISHED for r in find_records(tmp_path)) < 2 or len(find_records(tmp_path)) < 3:
            assert time.monotonic() < deadline and first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    states = [record.state for record in find_records(tmp_path)]
    assert states in ([FINISHED, FINISHED, KILLED], [FINISHED] * 3), (
        "killed while it ran, or a moment after it ended"
    )
    again = subprocess.run(
        [*words, "resume=true"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert [(r.number, r.state) for r in find_records(tmp_path)] == [(n, FINISHED) for n in range(4)]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    done = [run.data.params["seed"] for run in runs if run.info.status == "FINISHED"]
    assert sorted(done) == ["0", "1", "2", "3"] and {run.info.status for run in runs} <= {
        "FINISHED",
        "KILLED",
    }
    assert all("without a word" in run.data.tags["error"] for run in runs if run.info.status == "KILLED")
    assert len({run.data.tags["sweep"] for run in runs}) == 1


def test_a_damaged_record_is_a_job_that_is_missing(int8run: Command, model: str) -> None:
    assert int8run("-m", "seed=0,1", model, *UNTRACKED).code == 0
    (records(int8run)[1].folder / "status.json").write_text('{"sta')
    other = int8run.folder / "multirun" / "other"
    other.mkdir()
    (other / "sweep.json").write_text("[")
    outcome = int8run("-m", "seed=0,1", model, *UNTRACKED, "resume=true")
    assert outcome.code == 0 and "1 of 2 jobs are finished already" in flat(outcome.out)
    assert [(r.number, r.state) for r in records(int8run)] == [(0, FINISHED), (1, FINISHED)]


def test_a_folder_that_cannot_be_made_is_that_jobs_failure(int8run: Command, model: str) -> None:
    (int8run.folder / "here").mkdir()
    (int8run.folder / "here" / "0").write_text("in the way")
    outcome = int8run("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here")
    assert (
        outcome.code == 3
        and "job 0 (seed=0) FAILED: " in outcome.message
        and "cannot be opened or written: file exists" in outcome.message
    )
    assert [(r.number, r.state) for r in find_records(int8run.folder / "here")] == [(1, FINISHED)]
    assert "FAILED" in (int8run.folder / "here" / "report.html").read_text()


def test_one_sweep_at_a_time_in_a_folder(int8run: Command, model: str) -> None:
    folder = int8run.folder / "here"
    folder.mkdir()
    with FileLock(folder / "sweep.lock"):
        outcome = int8run("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here")
    assert outcome.code == 2
    assert (
        outcome.message
        == f"another sweep runs in {folder}; wait for it, or choose another folder: hydra.sweep.dir=FOLDER"
    )
    assert find_records(folder) == []


@pytest.mark.parametrize("words", [["hydra.run.dir=file/x"], ["-m", "seed=0,1", "hydra.sweep.dir=file/x"]])
def test_a_place_that_cannot_be_written_is_named(int8run: Command, model: str, words: list[str]) -> None:
    (int8run.folder / "file").write_text("in the way")
    outcome = int8run(*words, model, *UNTRACKED)
    assert outcome.code == 3 and re.match(
        r"\S*file\S* cannot be opened or written: (not a directory|file exists); write elsewhere: ",
        outcome.message,
    )


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def failing(int8run: Command, model: str) -> Callable[..., Outcome]:
    """Jobs of two kinds: those with model.location=missing fail."""
    place = model.removeprefix("model.location=")
    return lambda *words: int8run("-m", f"model.location=missing,{place}", "seed=0,1", *UNTRACKED, *words)


def test_every_job_that_failed_is_named_at_the_end(failing: Callable[..., Outcome], int8run: Command) -> None:
    outcome = failing()
    assert outcome.code == 3
    lines = outcome.message.splitlines()
    assert lines[0] == "2 of 4 jobs did not finish; the same command with resume=true runs these alone"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        f"  job {n} (model.location=missing seed={n}) FAILED" for n in (0, 1)
    ]
    assert all("missing" in line.partition("FAILED: ")[2] for line in lines[1:])
    assert [r.state for r in records(int8run)] == [FAILED, FAILED, FINISHED, FINISHED]
    assert (one_sweep(int8run) / "report.html").is_file()
    log = (one_sweep(int8run) / "0" / "int8run.log").read_text()
    assert "[ERROR]" in log and "missing" in log


def test_a_sweep_says_how_far_it_is_and_what_is_best(int8run: Command, model: str) -> None:
    outcome = int8run("-m", "seed=0,1", model, *[w for w in UNTRACKED if "baseline" not in w])
    text = flat(outcome.out + outcome.err)
    assert (
        outcome.code == 0
        and "1 of 2, 0:0" in text
        and "about 0:0" in text
        and "2 of 2, 0:0" in text
        and "best " in text
    )
    quiet = int8run("-m", "seed=0,1", model, *UNTRACKED, "progress=false")
    assert quiet.code == 0 and "1 of 2" not in quiet.out + quiet.err


def test_the_table_of_a_sweep_is_in_metrics_json(int8run: Command, model: str) -> None:
    outcome = int8run("-m", "seed=0,1", model, *[w for w in UNTRACKED if "baseline" not in w])
    for record in records(int8run):
        steps = f"{record.metrics['speed/step_ms_p50']:.1f}"
        assert (
            json.loads((record.folder / "status.json").read_text())["state"] == FINISHED
            and steps in outcome.out
        )
