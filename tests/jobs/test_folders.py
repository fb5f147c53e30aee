"""A folder belongs to one run or one sweep: two real processes, runs again, and jobs that would share one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from support.cli_process import Command

from int8run.errors import ConfigError, FileError
from int8run.jobs.folders import check_job_folders, claim_run_folder, claim_sweep_folder
from int8run.tracking.run_record import end_record, find_records, read_record, start_record

SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=1",
    "prompts.prompts=[a]",
    "metrics.baseline=none",
    "metrics.system_s=0",
    "backend=reference",
    "cache.limit_gb=0",
]
UNTRACKED = [*SMALL, "tracker=none"]
# takes a folder, prints its path or the error, and keeps it until its input ends
OTHER_PROCESS = """
import sys
from pathlib import Path
from int8run.errors import ConfigError
from int8run.jobs.folders import claim_run_folder, claim_sweep_folder
kind, folder, setting = sys.argv[1:]
say = lambda text: None
if kind == "run":
    claim = claim_run_folder(Path(folder), setting, say)
else:
    claim = claim_sweep_folder(Path(folder), setting, say, goes_on=False)
try:
    with claim as claimed:
        print(claimed, flush=True)
        sys.stdin.read()
except ConfigError as error:
    print("refused:", error, flush=True)
"""
IDENTITY = {
    "task": "run",
    "name": "defaults",
    "overrides": [],
    "params": {},
    "config_hash": "0" * 16,
    "build_key": "0" * 16,
    "objective": "quality/psnr_db",
}
StartOther = Callable[[str, Path, str], str]


@pytest.fixture
def start_other() -> Iterator[StartOther]:
    """Start a process that takes a folder until the test ends; returns the line that it prints."""
    processes = []

    def start(kind: str, folder: Path, setting: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, kind, str(folder), setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in processes:
        process.communicate("")


def leave_run(folder: Path) -> None:
    """What a run that has ended leaves."""
    end_record(start_record(folder, IDENTITY), "FINISHED")
    (folder / "images").mkdir()
    (folder / "images" / "old.png").write_bytes(b"old")


def read_artifacts(folder: Path) -> list[set[str]]:
    """The names of the images of each run in MLflow, the oldest run first."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("int8run")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [
        {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "samples")} for run in runs
    ]


# -- two processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_two_processes_that_start_in_the_same_second_get_two_folders(
    tmp_path: Path, start_other: StartOther, kind: str
) -> None:
    wanted = tmp_path / "2026-11-21" / "22-30-00"
    setting = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"

    claimed = [start_other(kind, wanted, setting) for _ in range(2)]

    assert claimed == [str(wanted), f"{wanted}-2"]


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_folder_that_another_process_writes_to_is_refused(
    tmp_path: Path, start_other: StartOther, kind: str
) -> None:
    folder = tmp_path / "here"
    assert start_other(kind, folder, "here") == str(folder)

    refusal = start_other(kind, folder, "here")

    pattern = rf"refused: process \d+ on \S+ is writing to {re.escape(str(folder))}; wait for it, or choose "
    assert re.match(pattern + rf"another folder: hydra\.{kind}\.dir=FOLDER$", refusal)


def test_a_run_and_a_sweep_do_not_share_a_folder(tmp_path: Path, start_other: StartOther) -> None:
    assert start_other("sweep", tmp_path / "here", "here") == str(tmp_path / "here")

    assert "is writing to" in start_other("run", tmp_path / "here", "here")


def test_a_folder_is_free_again_when_its_process_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    killed = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, "run", str(folder), "here"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == str(folder)
    killed.kill()
    killed.communicate()

    with claim_run_folder(folder, "here", pytest.fail) as claimed:
        assert claimed == folder


# -- what is there already -----------------------------------------------------------------------------------


def test_an_earlier_run_is_moved_aside_whole(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    leave_run(folder)
    leave_run(tmp_path / "here.1")
    said: list[str] = []

    with claim_run_folder(folder, "here", said.append):
        assert [path.name for path in folder.iterdir()] == ["int8run.lock"]

    assert said == [f"{folder} held an earlier run, which is now {folder}.2"]
    assert (tmp_path / "here.2" / "images" / "old.png").read_bytes() == b"old"
    assert not list(tmp_path.rglob("int8run.lock"))


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with (
        pytest.raises(ConfigError, match=r"something else than an earlier run, such as notes\.txt"),
        claim_run_folder(tmp_path, ".", pytest.fail),
    ):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_still_runs_keeps_its_folder(tmp_path: Path) -> None:
    """Also where the lock is not known, as on a disk that another machine writes to."""
    start_record(tmp_path, IDENTITY)

    with (
        pytest.raises(ConfigError, match="belongs to a job that runs in process"),
        claim_run_folder(tmp_path, ".", pytest.fail),
    ):
        pass


@pytest.mark.parametrize("inner", ["images", "deep/er"])
def test_a_run_inside_the_folder_of_another_one_is_refused(tmp_path: Path, inner: str) -> None:
    leave_run(tmp_path)

    with (
        pytest.raises(ConfigError, match="the folder of another run or sweep"),
        claim_run_folder(tmp_path / inner, "x", pytest.fail),
    ):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system that takes no folders")
def test_a_folder_where_none_can_be_made_is_refused() -> None:
    with (
        pytest.raises(FileError, match=r"^/proc/self/runs/1 cannot be made, as its file system takes no new"),
        claim_run_folder(Path("/proc/self/runs/1"), "x", pytest.fail),
    ):
        pass


def test_a_run_does_not_take_the_folder_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"id": "a"}')

    with (
        pytest.raises(ConfigError, match=r"something else than an earlier run, such as sweep\.json"),
        claim_run_folder(tmp_path, ".", pytest.fail),
    ):
        pass


def test_a_sweep_does_not_take_the_folder_of_a_run(tmp_path: Path) -> None:
    leave_run(tmp_path)

    with (
        pytest.raises(ConfigError, match=r"something else than an earlier sweep, such as status\.json"),
        claim_sweep_folder(tmp_path, ".", pytest.fail, goes_on=False),
    ):
        pass


# -- the jobs of a sweep -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "several jobs into"),
        (["a", "b/../a"], "several jobs into"),
        (["a", "a/b"], "be inside that of another"),
        ([".", "b"], "not a folder below"),
        (["../x", "b"], "not a folder below"),
        (["../x\ny", "b"], r"^hydra.sweep.subdir puts a job into /x\\ny, which is"),
    ],
)
def test_jobs_that_would_share_a_folder_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_job_folders(Path("/sweep"), [Path("/sweep") / name for name in names])


def test_a_constant_subfolder_starts_no_job(command: Command, model: str) -> None:
    outcome = command("-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here", "hydra.sweep.subdir=same")

    assert outcome.code == 2
    assert outcome.message.startswith(f"hydra.sweep.subdir puts several jobs into {command.folder}/here/same")
    assert find_records(command.folder) == []


def test_models_of_a_sweep_do_not_replace_each_other_in_a_file(command: Command, model: str) -> None:
    outcome = command("-m", "outlier=none,convrot", model, *UNTRACKED, "save=out.safetensors")

    assert outcome.code == 2
    assert outcome.message.startswith(f"save={command.folder}/out.safetensors is one place for 2 models that")
    assert command.made() == []


def test_jobs_of_one_model_may_save_it_to_one_file(command: Command, model: str) -> None:
    outcome = command("-m", "prompts.seeds_per_prompt=1,2", model, *UNTRACKED, "save=out.safetensors")

    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_a_job_that_runs_again_starts_with_an_empty_folder(command: Command, model: str) -> None:
    arguments = ["-m", "seed=0,1", model, *UNTRACKED, "hydra.sweep.dir=here"]
    assert command(*arguments).code == 0
    job = command.folder / "here" / "1"
    status = json.loads((job / "status.json").read_text())
    (job / "status.json").write_text(json.dumps(status | {"state": "FAILED"}))
    (job / "images" / "of_the_first_attempt.png").write_bytes(b"")

    assert command(*arguments, "resume=true").code == 0

    assert [record.state for record in find_records(command.folder / "here")] == ["FINISHED"] * 2
    assert not (job / "images" / "of_the_first_attempt.png").exists()
    aside = command.folder / "here" / "earlier_attempts" / "1.1"
    assert (aside / "images" / "of_the_first_attempt.png").exists()


# -- the command ---------------------------------------------------------------------------------------------


def test_mlflow_gets_the_files_of_each_run_alone(command: Command, model: str) -> None:
    """`hydra.run.dir` of both is one folder."""
    for prompt in ("fox", "owl"):
        outcome = command(model, *SMALL, f"prompts.prompts=[{prompt}]", "hydra.run.dir=here")
        assert outcome.code == 0, outcome.err

    assert f"{command.folder}/here held an earlier run, which is now" in " ".join(outcome.out.split())
    assert read_artifacts(command.folder) == [{"000_fox_s0.png"}, {"000_owl_s0.png"}]
    assert read_record(command.folder / "here").config["prompts"]["prompts"] == ["owl"]
    assert read_record(command.folder / "here.1").config["prompts"]["prompts"] == ["fox"]


def test_a_name_by_the_time_is_taken_once(command: Command, model: str) -> None:
    """Two runs in the same year, as two in the same second."""
    for _ in range(2):
        assert command(model, *UNTRACKED, "hydra.run.dir='a=b, c/${now:%Y}'").code == 0

    folders = sorted(record.folder.name for record in find_records(command.folder / "a=b, c"))
    assert [re.sub(r"^\d{4}", "Y", name) for name in folders] == ["Y", "Y-2"]
