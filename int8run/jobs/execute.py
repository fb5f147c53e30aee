"""One job from start to end: its record, its task, and the tracker's copy of what it left."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import TrackingError, disk_full, not_writable
from int8run.metrics.system import SystemSampler
from int8run.report.console import say
from int8run.report.run_files import write_yaml
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import (
    FAILED,
    FINISHED,
    KILLED,
    Record,
    config_hash,
    end_record,
    short_hash,
    start_record,
    update_record,
    without_login,
)

log = logging.getLogger(__name__)


def execute(spec: RunSpec, job: Job) -> float | None:
    """Run a job's task; leave a record of it, whatever happens, and let the tracker copy it.

    Returns:
        what the task hands to a sweeper.

    Raises:
        FileError: when the disk is full. Whatever else the task raises passes through.
    """
    task = spec.task
    if not task.recorded:
        return task.execute(spec, job)
    record = start_record(job.output_dir, identity(spec, job))
    warnings: list[str] = []
    try:
        with kept_warnings(warnings), SystemSampler(job.output_dir / "system.csv", spec.metrics.system_s):
            write_yaml(without_passwords(job.settings), job.output_dir / "config.yaml")
            if task.tracked:
                if job.sweep is None:  # the parent of a sweep did
                    prepare(spec.tracker)
                record = announce(spec.tracker, record)
            value = task.execute(spec, job)
    except BaseException as error:
        # an interrupted job and one that hydra or a worker ends are no failures of its own
        state = FAILED if isinstance(error, Exception) else KILLED
        known = disk_full(error, job.output_dir)
        record = end_record(
            record, state, " ".join(str(known or error).split()) or type(error).__name__, warnings
        )
        if task.tracked:
            upload(spec.tracker, record)
        if known is not None:
            raise known from error
        raise
    record = end_record(record, FINISHED, warnings=warnings)
    if task.tracked:
        record = upload(spec.tracker, record)
        if record.uploaded and not job.sweep:
            say(f"runs:     {spec.tracker.where()}")
    return value


def identity(spec: RunSpec, job: Job) -> dict[str, object]:
    """What status.json says of a job from its start on."""
    return {
        "task": type(spec.task).__name__.lower(),
        "name": without_passwords(job.name),
        "overrides": without_passwords(list(job.overrides)),
        "choices": dict(job.choices),
        "params": without_passwords(job.params()),
        "sweep": job.sweep,
        "number": job.number,
        "config_hash": config_hash(job.settings),
        "build_key": short_hash(spec.build_key),
        "objective": spec.metrics.objective,
        "jobs_at_once": job.jobs_at_once,
    }


def without_passwords(value: Any) -> Any:
    """Settings as they may be shown and sent: an address keeps neither user nor password."""
    if isinstance(value, Mapping):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_passwords(inner) for inner in value]
    return without_login(value) if isinstance(value, str) else value


class Keep(logging.Handler):
    """Keeps the messages that it gets."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def kept_warnings(lines: list[str]) -> Iterator[None]:
    """Add what is warned of meanwhile to some lines, for the record: of a sweep's jobs nothing else is shown."""
    keep, root = Keep(lines), logging.getLogger()
    root.addHandler(keep)
    try:
        yield
    finally:
        root.removeHandler(keep)


def prepare(tracker: Tracker) -> None:
    """Get the store ready, once per command. A tracker that does not answer stops nothing."""
    try:
        tracker.prepare()
    except TrackingError as error:
        log.warning(
            "%s; what is measured is kept in the output folder and logged when it answers again", error
        )


def announce(tracker: Tracker, record: Record) -> Record:
    """Let the tracker open a run, so that the job is seen while it runs."""
    try:
        run_id = tracker.begin(record)
    except TrackingError as error:
        log.info("%s", error)
        place = tracker.place()
        return (
            update_record(record, tracking={**place, "run_id": None, "uploaded": False}) if place else record
        )
    return logged(tracker, record, run_id, uploaded=False)


def upload(tracker: Tracker, record: Record) -> Record:
    """Let the tracker copy what the folder holds; when it does not answer, say how to do it later."""
    try:
        return logged(tracker, record, tracker.upload(record), uploaded=True)
    except TrackingError as error:
        log.warning(
            "%s; everything is in %s; upload it later: %s",
            error,
            record.folder,
            sync_command(record, record.folder),
        )
        return record
    except OSError as error:  # of a file that cannot be read or written; no reason to lose the job's own end
        log.warning("job %s is not logged: %s", record.name, disk_full(error) or not_writable(error) or error)
        return record


def sync_command(record: Record, folder: Path) -> str:
    """What uploads a folder to the tracker that a job was meant for."""
    words = [word for word in record.overrides if word.startswith("tracker")]
    return " ".join(["int8run task=report", f"sync={folder}", *words])


def logged(tracker: Tracker, record: Record, run_id: str | None, uploaded: bool) -> Record:
    """Write where the tracker has a job."""
    return (
        record
        if run_id is None
        else update_record(record, tracking={**tracker.place(), "run_id": run_id, "uploaded": uploaded})
    )
