"""A job from start to end: what is in its folder and in the tracker, however it ends."""

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
class FunctionTask:
    """A task that calls a function of the test."""

    function: Callable[[Job], float | None]
    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = True
    makes_runs: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset({"a", "c.d"})

    def execute(self, spec: RunSpec, job: Job) -> float | None:
        return self.function(job)


@dataclass(frozen=True)
class FakeTracker:
    """Notes its calls and the state of the record; the calls named in `unanswered` raise."""

    unanswered: Sequence[str] = ()
    calls: list[tuple[str, str]] = field(default_factory=list, compare=False)

    def note_call(self, name: str, state: str) -> None:
        self.calls.append((name, state))
        if name in self.unanswered:
            raise TrackingError("tracker.uri=http://x does not answer")

    def prepare(self) -> None:
        self.note_call("prepare", "")

    def start_run(self, record: Record) -> str | None:
        self.note_call("start", record.state)
        return "r1"

    def upload_record(self, record: Record) -> str | None:
        self.note_call("upload", record.state)
        return record.run_id or "r2"

    def get_location(self) -> dict[str, str]:
        return {"store": "http://x", "experiment": "e"}

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        return {}

    def get_view_hint(self) -> str | None:
        return "http://x"


def make_job(folder: Path, sweep: str | None = None) -> Job:
    return Job(
        settings={"seed": 1},
        choices={"model": "tiny"},
        overrides=["seed=1", "a.b=2"],
        output_dir=folder,
        sweep=sweep,
        number=3,
        varying=["a.b"],
    )


def execute_function(
    spec: RunSpec, job: Job, function: Callable[[Job], float | None], tracker: FakeTracker
) -> float | None:
    return execute_job(replace(spec, task=FunctionTask(function), tracker=tracker), job)


def do_nothing(job: Job) -> None: ...


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return make_spec([])


def test_a_job_that_finishes_is_recorded_and_tracked(spec: RunSpec, tmp_path: Path) -> None:
    def check_running(job: Job) -> float:
        assert read_record(job.output_dir).state == RUNNING
        return 5.0

    tracker = FakeTracker()
    value = execute_function(spec, make_job(tmp_path), check_running, tracker)

    assert value == 5.0
    assert tracker.calls == [("prepare", ""), ("start", RUNNING), ("upload", FINISHED)]
    record = read_record(tmp_path)
    assert (record.state, record.error, record.warnings) == (FINISHED, None, [])
    assert record.tracking == {"store": "http://x", "experiment": "e", "run_id": "r1", "uploaded": True}
    assert (record.name, record.number, record.overrides) == ("a.b=2", 3, ["seed=1", "a.b=2"])
    assert record.config == {"seed": 1}
    assert record.params == {"model": "tiny", "seed": "1"}


def test_the_parent_of_a_sweep_has_prepared_the_store(spec: RunSpec, tmp_path: Path) -> None:
    tracker = FakeTracker()

    execute_function(spec, make_job(tmp_path, sweep="s1"), do_nothing, tracker)

    assert tracker.calls == [("start", RUNNING), ("upload", FINISHED)]
    assert read_record(tmp_path).sweep == "s1"


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (ConfigError("wrong\nlines"), FAILED, r"wrong\nlines"),
        (ValueError("wrong\nlines"), FAILED, "wrong lines"),
        (ValueError(), FAILED, "ValueError"),
        (KeyboardInterrupt(), KILLED, "interrupted by Ctrl-C"),
        (SystemExit(143), KILLED, "143"),
    ],
)
def test_an_error_and_the_warnings_before_it_are_recorded(
    spec: RunSpec, tmp_path: Path, error: BaseException, state: str, message: str
) -> None:
    def warn_and_fail(job: Job) -> None:
        logging.getLogger("x").warning("odd %s", "thing")
        logging.getLogger("x").info("not this")
        raise error

    tracker = FakeTracker()
    with pytest.raises(type(error)):
        execute_function(spec, make_job(tmp_path), warn_and_fail, tracker)

    record = read_record(tmp_path)
    assert (record.state, record.error, record.warnings) == (state, message, ["odd thing"])
    assert tracker.calls[-1] == ("upload", state)
    assert record.uploaded
    handlers = {type(handler).__name__ for handler in logging.getLogger().handlers}
    assert "WarningCollector" not in handlers


def test_a_tracker_that_is_away_at_the_start_gets_the_job_at_its_end(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = FakeTracker(unanswered=("prepare", "start"))

    execute_function(spec, make_job(tmp_path), do_nothing, tracker)

    record = read_record(tmp_path)
    assert record.run_id == "r2"
    assert record.uploaded
    message = "tracker.uri=http://x does not answer; what is measured is kept in the output folder"
    assert message in caplog.text


@pytest.mark.parametrize("unanswered", [("upload",), ("prepare", "start", "upload")])
def test_a_tracker_that_is_away_at_the_end_stops_nothing(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, unanswered: Sequence[str]
) -> None:
    tracker = FakeTracker(unanswered=unanswered)

    value = execute_function(spec, make_job(tmp_path), lambda job: 1.0, tracker)

    record = read_record(tmp_path)
    assert value == 1.0
    assert record.state == FINISHED
    assert not record.uploaded
    known_run_id = None if "start" in unanswered else "r1"
    assert record.run_id == known_run_id, "a run that was opened is completed later, not made twice"
    assert f"everything is in {tmp_path}; upload it later: int8run task=report sync={tmp_path}" in caplog.text


class RustError(Exception):
    """As of safetensors, which writes from Rust: it has no errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "images/x.png"),
        RustError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_an_error_with_a_hint(spec: RunSpec, tmp_path: Path, error: Exception) -> None:
    def fail(job: Job) -> None:
        raise error

    message = (
        r"^the disk is full, and .* could not be written; "
        r"free some room, or write elsewhere: hydra\.run\.dir=FOLDER"
    )
    with pytest.raises(FileError, match=message):
        execute_function(spec, make_job(tmp_path), fail, FakeTracker())

    record = read_record(tmp_path)
    assert record.state == FAILED
    assert "the disk is full" in str(record.error)


def test_another_error_of_the_system_passes_through(spec: RunSpec, tmp_path: Path) -> None:
    def fail(job: Job) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        execute_function(spec, make_job(tmp_path), fail, FakeTracker())


def test_settings_that_a_task_ignores_are_said_in_one_line(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = replace(make_job(tmp_path), overrides=["seed=1", "a.b=2", "c.d=3", "c.e=4"])

    execute_function(spec, job, do_nothing, FakeTracker())

    assert [record.getMessage() for record in caplog.records] == ["task=functiontask ignores a.b, c.d"]


def test_a_task_that_is_not_recorded_leaves_nothing(spec: RunSpec, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class UnrecordedTask(FunctionTask):
        recorded: ClassVar[bool] = False

    tracker = FakeTracker()
    task = UnrecordedTask(lambda job: 2.0)

    value = execute_job(replace(spec, task=task, tracker=tracker), make_job(tmp_path))

    assert value == 2.0
    assert list(tmp_path.iterdir()) == []
    assert tracker.calls == []


def test_passwords_in_addresses_are_kept_nowhere(spec: RunSpec, tmp_path: Path) -> None:
    uri = "https://me:s3cret@host:5000/path"
    job = Job(
        settings={"tracker": {"uri": uri}, "list": [uri]},
        choices={},
        overrides=[f"tracker.uri={uri}", "a@b=c"],
        output_dir=tmp_path,
    )

    execute_function(spec, job, do_nothing, FakeTracker())

    assert all("s3cret" not in path.read_text() for path in tmp_path.iterdir())
    record = read_record(tmp_path)
    assert record.overrides == ["tracker.uri=https://host:5000/path", "a@b=c"]
    assert record.config["list"] == ["https://host:5000/path"]
