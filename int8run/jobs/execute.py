"""One job from start to end: its record, its task, and the tracker's copy of what it left."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import TrackingError, as_disk_full_error, as_not_writable_error
from int8run.metrics.system import SystemSampler
from int8run.report.console import print_lines
from int8run.report.run_files import write_yaml
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import (
    FAILED,
    FINISHED,
    KILLED,
    Record,
    end_record,
    hash_config,
    hash_text,
    remove_login,
    start_record,
    update_record,
)

log = logging.getLogger(__name__)


def execute_job(spec: RunSpec, job: Job) -> float | None:
    """Run a job's task; leave a record of it, whatever happens, and let the tracker copy it.

    Returns:
        what the task hands to a sweeper.

    Raises:
        FileError: when the disk is full. Whatever else the task raises passes through.
    """
    task = spec.task
    if not task.recorded:
        return task.execute(spec, job)
    record = start_record(job.output_dir, build_status(spec, job))
    warnings: list[str] = []
    try:
        with collect_warnings(warnings), SystemSampler(job.output_dir / "system.csv", spec.metrics.system_s):
            write_yaml(strip_passwords(job.settings), job.output_dir / "config.yaml")
            if task.tracked:
                if job.sweep is None:  # the parent of a sweep did
                    prepare_tracker(spec.tracker)
                record = begin_tracking(spec.tracker, record)
            value = task.execute(spec, job)
    except BaseException as error:
        # an interrupted job and one that hydra or a worker ends are no failures of its own
        state = FAILED if isinstance(error, Exception) else KILLED
        known = as_disk_full_error(error, job.output_dir)
        record = end_record(
            record, state, " ".join(str(known or error).split()) or type(error).__name__, warnings
        )
        if task.tracked:
            upload_record(spec.tracker, record)
        if known is not None:
            raise known from error
        raise
    record = end_record(record, FINISHED, warnings=warnings)
    if task.tracked:
        record = upload_record(spec.tracker, record)
        if record.uploaded and not job.sweep:
            print_lines(f"runs:     {spec.tracker.get_view_hint()}")
    return value


def build_status(spec: RunSpec, job: Job) -> dict[str, object]:
    """What status.json says of a job from its start on."""
    return {
        "task": type(spec.task).__name__.lower(),
        "name": strip_passwords(job.name),
        "overrides": strip_passwords(list(job.overrides)),
        "choices": dict(job.choices),
        "params": strip_passwords(job.params()),
        "sweep": job.sweep,
        "number": job.number,
        "config_hash": hash_config(job.settings),
        "build_key": hash_text(spec.build_key),
        "objective": spec.metrics.objective,
        "jobs_at_once": job.jobs_at_once,
    }


def strip_passwords(value: Any) -> Any:
    """Settings as they may be shown and sent: an address keeps neither user nor password."""
    if isinstance(value, Mapping):
        return {key: strip_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [strip_passwords(inner) for inner in value]
    return remove_login(value) if isinstance(value, str) else value


class WarningCollector(logging.Handler):
    """Keeps the messages that it gets."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def collect_warnings(lines: list[str]) -> Iterator[None]:
    """Add what is warned of meanwhile to some lines, for the record: of a sweep's jobs nothing else is shown."""
    keep, root = WarningCollector(lines), logging.getLogger()
    root.addHandler(keep)
    try:
        yield
    finally:
        root.removeHandler(keep)


def prepare_tracker(tracker: Tracker) -> None:
    """Get the store ready, once per command. A tracker that does not answer stops nothing."""
    try:
        tracker.prepare()
    except TrackingError as error:
        log.warning(
            "%s; what is measured is kept in the output folder and logged when it answers again", error
        )


def begin_tracking(tracker: Tracker, record: Record) -> Record:
    """Let the tracker open a run, so that the job is seen while it runs."""
    try:
        run_id = tracker.start_run(record)
    except TrackingError as error:
        log.info("%s", error)
        place = tracker.get_location()
        return (
            update_record(record, tracking={**place, "run_id": None, "uploaded": False}) if place else record
        )
    return save_tracking(tracker, record, run_id, uploaded=False)


def upload_record(tracker: Tracker, record: Record) -> Record:
    """Let the tracker copy what the folder holds; when it does not answer, say how to do it later."""
    try:
        return save_tracking(tracker, record, tracker.upload_record(record), uploaded=True)
    except TrackingError as error:
        log.warning(
            "%s; everything is in %s; upload it later: %s",
            error,
            record.folder,
            build_sync_command(record, record.folder),
        )
        return record
    except OSError as error:  # of a file that cannot be read or written; no reason to lose the job's own end
        log.warning(
            "job %s is not logged: %s",
            record.name,
            as_disk_full_error(error) or as_not_writable_error(error) or error,
        )
        return record


def build_sync_command(record: Record, folder: Path) -> str:
    """What uploads a folder to the tracker that a job was meant for."""
    words = [word for word in record.overrides if word.startswith("tracker")]
    return " ".join(["int8run task=report", f"sync={folder}", *words])


def save_tracking(tracker: Tracker, record: Record, run_id: str | None, uploaded: bool) -> Record:
    """Write where the tracker has a job."""
    return (
        record
        if run_id is None
        else update_record(
            record, tracking={**tracker.get_location(), "run_id": run_id, "uploaded": uploaded}
        )
    )
