"""What runs in a worker's process: jobs of a sweep, one after the other, as hydra runs them.

Called through `Worker.submit` with pickled arguments: a ParentProcess and some SweepJobs.
"""

import io
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus, run_job, setup_globals
from omegaconf import open_dict

from int8run.config.error_messages import explain_error
from int8run.jobs.base import Outcome, SweepJob
from int8run.jobs.hydra_files import masked_hydra_files
from int8run.jobs.manifest import SweepManifest, read_manifest, write_manifest
from int8run.tracking.run_record import FAILED, FINISHED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentProcess:
    """What a worker knows of the process that started the sweep; can be pickled.

    Args:
        manifest: identity of the sweep.
        hydra_context: hydra's, needed to run a job.
        task_function: hydra's, runs the job of a config.
        singletons: state of hydra's singletons.
        working_folder: that relative paths in the settings start from.
        pid: process number.
    """

    manifest: SweepManifest
    hydra_context: Any
    task_function: Any
    singletons: Any
    working_folder: str
    pid: int


def run_jobs(parent: ParentProcess, jobs: Sequence[SweepJob]) -> list[Outcome]:
    """Run jobs in this process."""
    if os.getpid() != parent.pid:
        setup_globals()
        Singleton.set_state(parent.singletons)
        # so that relative paths in the settings mean the same as in the parent
        if Path(parent.working_folder).is_dir():
            os.chdir(parent.working_folder)
    return [run_sweep_job(parent, job) for job in jobs]


def run_sweep_job(parent: ParentProcess, job: SweepJob) -> Outcome:
    """Run one job; when this machine does not see the sweep's folder, the outcome holds the job's files."""
    manifest = read_manifest(Path(str(job.config.hydra.sweep.dir)))
    is_folder_shared = manifest is not None and manifest.id == parent.manifest.id
    if is_folder_shared:
        return run_hydra_job(parent, job)
    folder = Path(tempfile.mkdtemp(prefix="int8run-"))
    try:
        write_manifest(folder, parent.manifest)
        redirect_job(job, folder)
        outcome = run_hydra_job(parent, job)
        return replace(outcome, files=zip_folder(folder / "job"))
    finally:
        shutil.rmtree(folder)


def redirect_job(job: SweepJob, folder: Path) -> None:
    """Let a job write to a folder of this machine, below it to `job`.

    A tracker that is a database on the parent's disk gets nothing from here: the parent copies the record
    when it has come back.
    """
    tracker_address = str(job.config.tracker.get("uri") or "")
    with open_dict(job.config):
        job.config.hydra.sweep.dir = str(folder)
        job.config.hydra.sweep.subdir = "job"
        if not tracker_address.startswith("http"):
            job.config.tracker = {"_target_": "int8run.tracking.base.NoTracker"}


def run_hydra_job(parent: ParentProcess, job: SweepJob) -> Outcome:
    """Run one job through hydra and return how it ended."""
    HydraConfig.instance().set_config(job.config)
    try:
        with masked_hydra_files():
            result = run_job(
                hydra_context=parent.hydra_context,
                task_function=parent.task_function,
                config=job.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
    except OSError as error:
        # before the job starts, hydra makes the folder, the log file and its own notes
        return make_failed_outcome(job, error)
    if result.status != JobStatus.COMPLETED:
        return make_failed_outcome(job, result._return_value)
    value = result.return_value
    if value is not None:
        value = float(value)
    return Outcome(job.number, FINISHED, value=value)


def make_failed_outcome(job: SweepJob, error: Exception) -> Outcome:
    """Log the error that ended a job, and return the job's outcome.

    The log file gets one line for an error that a user can meet, and the traceback of any other.
    """
    message, exit_code = explain_error(error)
    if message is not None:
        log.error("%s", message)
    else:
        message = f"{type(error).__name__}: {error}"
        log.error("%s", message, exc_info=error)
        message = " ".join(message.split())
    return Outcome(job.number, FAILED, error=message, exit_code=exit_code)


def zip_folder(folder: Path) -> bytes:
    """Return a folder's files as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def unzip_files(files: bytes, folder: Path) -> None:
    """Write the files that `zip_folder` packed into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(files)) as archive:
        archive.extractall(folder)
