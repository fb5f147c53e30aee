"""A job from start to end: what stands in its folder and in the tracker, however it ends."""

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from support.run_job import make_spec

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, FileError, TrackingError
from int8run.jobs.execute import execute_job
from int8run.tracking.run_record import FAILED, FINISHED, KILLED, RUNNING, Record, read_record


@dataclass(frozen=True)
class Does:
    """A task that does what a test says."""

    what: Callable[[Job], float | None]
    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = True

    def execute(self, spec: RunSpec, job: Job) -> float | None:
        return self.what(job)


@dataclass(frozen=True)
class Remembers:
    """A tracker that notes what it is asked, and does not answer at the times that a test says."""

    away: Sequence[str] = ()
    calls: list[tuple[str, str]] = field(default_factory=list, compare=False)

    def note(self, what: str, state: str) -> None:
        self.calls.append((what, state))
        if what in self.away:
            raise TrackingError("tracker.uri=http://x does not answer")

    def prepare(self) -> None:
        self.note("prepare", "")

    def start_run(self, record: Record) -> str | None:
        self.note("begin", record.state)
        return "r1"

    def upload_record(self, record: Record) -> str | None:
        self.note("upload", record.state)
        return record.run_id or "r2"

    def get_location(self) -> dict[str, str]:
        return {"store": "http://x", "experiment": "e"}

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        return {}

    def get_view_hint(self) -> str | None:
        return "http://x"


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return make_spec([])


def ran(
    spec: RunSpec,
    folder: Path,
    what: Callable[[Job], float | None],
    sweep: str | None = None,
    **tracker: Sequence[str],
) -> tuple[Remembers, float | None]:
    memory = Remembers(**tracker)
    job = Job(
        {"seed": 1}, {"model": "tiny"}, ["seed=1", "a.b=2"], folder, sweep=sweep, number=3, varying=["a.b"]
    )
    return memory, execute_job(replace(spec, task=Does(what), tracker=memory), job)


def test_a_job_that_finishes(spec: RunSpec, tmp_path: Path) -> None:
    memory, value = ran(
        spec, tmp_path, lambda job: 5.0 if read_record(job.output_dir).state == RUNNING else None
    )
    assert value == 5.0 and memory.calls == [("prepare", ""), ("begin", RUNNING), ("upload", FINISHED)]
    record = read_record(tmp_path)
    assert (record.state, record.error, record.warnings) == (FINISHED, None, [])
    assert record.tracking == {"store": "http://x", "experiment": "e", "run_id": "r1", "uploaded": True}
    assert (record.name, record.number, record.overrides) == ("a.b=2", 3, ["seed=1", "a.b=2"])
    assert record.config == {"seed": 1} and record.params == {"model": "tiny", "seed": "1"}


def test_the_parent_of_a_sweep_has_prepared_the_store(spec: RunSpec, tmp_path: Path) -> None:
    memory, _ = ran(spec, tmp_path, lambda job: None, sweep="s1")
    assert memory.calls == [("begin", RUNNING), ("upload", FINISHED)] and read_record(tmp_path).sweep == "s1"


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (ConfigError("wrong\nlines"), FAILED, "wrong lines"),
        (ValueError(), FAILED, "ValueError"),
        (KeyboardInterrupt(), KILLED, "KeyboardInterrupt"),
        (SystemExit(143), KILLED, "143"),
    ],
)
def test_a_job_that_does_not(
    spec: RunSpec, tmp_path: Path, error: BaseException, state: str, words: str
) -> None:
    def fail(job: Job) -> None:
        logging.getLogger("x").warning("odd %s", "thing")
        logging.getLogger("x").info("not this")
        raise error

    memory = Remembers()
    job = Job({}, {}, [], tmp_path)
    with pytest.raises(type(error)):
        execute_job(replace(spec, task=Does(fail), tracker=memory), job)
    record = read_record(tmp_path)
    assert (record.state, record.error, record.warnings) == (state, words, ["odd thing"])
    assert memory.calls[-1] == ("upload", state) and record.uploaded
    assert not any(type(handler).__name__ == "WarningCollector" for handler in logging.getLogger().handlers)


def test_a_tracker_that_is_away_at_the_start_gets_the_job_at_its_end(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran(spec, tmp_path, lambda job: None, away=("prepare", "begin"))
    record = read_record(tmp_path)
    assert record.run_id == "r2" and record.uploaded
    assert (
        "tracker.uri=http://x does not answer; what is measured is kept in the output folder" in caplog.text
    )


@pytest.mark.parametrize("away", [("upload",), ("prepare", "begin", "upload")])
def test_a_tracker_that_is_away_at_the_end_stops_nothing(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, away: Sequence[str]
) -> None:
    _, value = ran(spec, tmp_path, lambda job: 1.0, away=away)
    record = read_record(tmp_path)
    assert value == 1.0 and record.state == FINISHED and not record.uploaded
    assert record.run_id == (None if "begin" in away else "r1"), (
        "a run that was opened is completed later, not made twice"
    )
    assert f"everything is in {tmp_path}; upload it later: int8run task=report sync={tmp_path}" in caplog.text


class RustError(Exception):
    """safetensors writes from Rust and has no errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "images/x.png"),
        RustError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_words(spec: RunSpec, tmp_path: Path, error: Exception) -> None:
    def full(job: Job) -> None:
        raise error

    with pytest.raises(
        FileError,
        match=r"^the disk is full, and .* could not be written; free some room, or write elsewhere: hydra\.run\.dir=FOLDER",
    ):
        ran(spec, tmp_path, full)
    assert read_record(tmp_path).state == FAILED and "the disk is full" in str(read_record(tmp_path).error)


def test_another_error_of_the_system_is_none_of_a_full_disk(spec: RunSpec, tmp_path: Path) -> None:
    def fail(job: Job) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        ran(spec, tmp_path, fail)


def test_a_task_that_looks_leaves_nothing(spec: RunSpec, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Looks(Does):
        recorded: ClassVar[bool] = False

    memory = Remembers()
    assert (
        execute_job(replace(spec, task=Looks(lambda job: 2.0), tracker=memory), Job({}, {}, [], tmp_path))
        == 2.0
    )
    assert list(tmp_path.iterdir()) == [] and memory.calls == []


def test_passwords_of_addresses_are_kept_nowhere(spec: RunSpec, tmp_path: Path) -> None:
    uri = "https://me:s3cret@host:5000/path"
    job = Job({"tracker": {"uri": uri}, "list": [uri]}, {}, [f"tracker.uri={uri}", "a@b=c"], tmp_path)
    execute_job(replace(spec, task=Does(lambda job: None), tracker=Remembers()), job)
    assert all("s3cret" not in path.read_text() for path in tmp_path.iterdir())
    record = read_record(tmp_path)
    assert record.overrides == ["tracker.uri=https://host:5000/path", "a@b=c"] and record.config["list"] == [
        "https://host:5000/path"
    ]
