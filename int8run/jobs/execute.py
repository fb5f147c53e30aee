"""One job from start to end: its record, its task, and the tracker's copy of what it left.

Called by `cli` in every process that runs a job. Also holds what the parent of a sweep needs of the tracker.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec, Task
from int8run.errors import FileError, TrackingError, as_disk_full_error, as_not_writable_error
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
    start_record,
    update_record,
)
from int8run.tracking.secrets import mask_secret_settings, mask_secrets
from int8run.tracking.setting_names import hash_text, select_keys

log = logging.getLogger(__name__)


def execute_job(spec: RunSpec, job: Job) -> float | None:
    """Run a job's task; leave a record of it, whatever happens, and let the tracker copy it.

    Args:
        spec: the checked settings.
        job: where they came from.

    Returns:
        The value that the task hands to a sweeper.

    Raises:
        FileError: when the disk is full. Whatever else the task raises passes through.
    """
    task = spec.task
    log_ignored_settings(task, job.overrides)
    if not task.recorded:
        return task.execute(spec, job)
    record = start_record(job.output_dir, build_status(spec, job))
    warnings: list[str] = []
    try:
        with (
            collect_warnings(warnings),
            SystemSampler(job.output_dir / "system.csv", spec.metrics.system_s),
        ):
            write_yaml(mask_secret_settings(job.settings), job.output_dir / "config.yaml")
            if task.tracked:
                if job.sweep is None:  # else the parent of the sweep has done it
                    prepare_tracker(spec.tracker)
                record = begin_tracking(spec.tracker, record)
            value = task.execute(spec, job)
    except BaseException as error:
        disk_full = as_disk_full_error(error, job.output_dir)
        record = end_failed_record(record, error, disk_full, warnings)
        if task.tracked:
            upload_record(spec.tracker, record)
        if disk_full is not None:
            raise disk_full from error
        raise
    record = end_record(record, FINISHED, warnings=warnings)
    if task.tracked:
        record = upload_record(spec.tracker, record)
        if record.uploaded and job.sweep is None:
            print_lines(f"runs:     {spec.tracker.get_view_hint()}")
    return value


def log_ignored_settings(task: Task, overrides: Sequence[str]) -> None:
    """Log which settings of the command line change nothing in this task.

    Args:
        task: of the job.
        overrides: of the command line.
    """
    ignored = select_keys(overrides, task.ignores)
    if ignored:
        log.warning("task=%s ignores %s", type(task).__name__.lower(), ", ".join(ignored))


def end_failed_record(
    record: Record, error: BaseException, disk_full: FileError | None, warnings: Sequence[str]
) -> Record:
    """Write that an error ended a job.

    Args:
        record: of the job.
        error: the one raised.
        disk_full: the message that replaces it on a full disk.
        warnings: logged while the job ran.
    """
    # an interrupt, and an exit that hydra or a worker asks for, are no fault of the job
    state = FAILED if isinstance(error, Exception) else KILLED
    cause = error if disk_full is None else disk_full
    return end_record(record, state, describe_error(cause), warnings)


def describe_error(error: BaseException) -> str:
    """Return an error in one line, without secrets: its message, or its name where it has none."""
    message = mask_secrets(" ".join(str(error).split()))
    if message:
        return message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    return type(error).__name__


def build_status(spec: RunSpec, job: Job) -> dict[str, object]:
    """Return what status.json says of a job from its start on."""
    return {
        "task": type(spec.task).__name__.lower(),
        "name": job.name,
        "overrides": mask_secret_settings(list(job.overrides)),
        "choices": dict(job.choices),
        "params": mask_secret_settings(job.get_params()),
        "sweep": job.sweep,
        "number": job.number,
        "config_hash": hash_config(job.settings),
        "build_key": hash_text(spec.build_key),
        "objective": spec.metrics.objective,
        "jobs_at_once": job.jobs_at_once,
    }


class WarningCollector(logging.Handler):
    """Appends every warning and error that is logged to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message of a record."""
        self.lines.append(mask_secrets(record.getMessage()))


@contextmanager
def collect_warnings(lines: list[str]) -> Iterator[None]:
    """Append the warnings logged in the meantime to `lines`; of a sweep's jobs nothing else is shown."""
    collector = WarningCollector(lines)
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield
    finally:
        root.removeHandler(collector)


def prepare_tracker(tracker: Tracker) -> None:
    """Get the tracker's store ready, once per command. A tracker that does not answer stops nothing."""
    try:
        tracker.prepare()
    except TrackingError as error:
        log.warning(
            "%s; what is measured is kept in the output folder and logged when it answers again", error
        )


def begin_tracking(tracker: Tracker, record: Record) -> Record:
    """Let the tracker open a run, so that the job is visible while it runs."""
    try:
        run_id = tracker.start_run(record)
    except TrackingError as error:
        log.info("%s", error)
        location = tracker.get_location()
        if not location:
            return record
        return update_record(record, tracking={**location, "run_id": None, "uploaded": False})
    return save_tracking(tracker, record, run_id, uploaded=False)


def upload_record(tracker: Tracker, record: Record) -> Record:
    """Let the tracker copy what the folder holds; when it does not answer, log how to upload it later."""
    try:
        run_id = tracker.upload_record(record)
        return save_tracking(tracker, record, run_id, uploaded=True)
    except TrackingError as error:
        command = build_sync_command(record, record.folder)
        log.warning("%s; everything is in %s; upload it later: %s", error, record.folder, command)
        return record
    except OSError as error:
        # a file that cannot be read or written is no reason to lose how the job ended
        reason = explain_file_error(error)
        log.warning("job %s is not logged: %s", record.name, reason)
        return record


def explain_file_error(error: OSError) -> Exception:
    """Return what to tell a user about a file that could not be written: in our words, where we have some."""
    return as_disk_full_error(error) or as_not_writable_error(error) or error


def build_sync_command(record: Record, folder: Path) -> str:
    """Return the command that uploads a folder to the tracker that a job was meant for."""
    tracker_overrides = [override for override in record.overrides if override.startswith("tracker")]
    return " ".join(["int8run task=report", f"sync={folder}", *tracker_overrides])


def save_tracking(tracker: Tracker, record: Record, run_id: str | None, *, uploaded: bool) -> Record:
    """Write into the record where the tracker has the job; a tracker that keeps nothing has no run id."""
    if run_id is None:
        return record
    return update_record(record, tracking={**tracker.get_location(), "run_id": run_id, "uploaded": uploaded})
