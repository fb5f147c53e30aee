"""What runs in a worker's process: jobs of a sweep, one after the other, as hydra runs them."""

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

from int8run.config.error_messages import explain
from int8run.jobs.base import Outcome, SweepJob
from int8run.jobs.manifest import SweepManifest, read_manifest, write_manifest
from int8run.tracking.run_record import FAILED, FINISHED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentProcess:
    """What a worker knows of the process that started the sweep; it can be pickled."""

    sweep: SweepManifest
    context: Any  # hydra's
    task_function: Any
    singletons: Any
    folder: str  # working folder
    pid: int


def run_jobs(parent: ParentProcess, jobs: Sequence[SweepJob]) -> list[Outcome]:
    """Run jobs in this process."""
    if os.getpid() != parent.pid:
        setup_globals()
        Singleton.set_state(parent.singletons)
        if Path(parent.folder).is_dir():  # relative paths in the settings mean the same as in the parent
            os.chdir(parent.folder)
    return [run_sweep_job(parent, job) for job in jobs]


def run_sweep_job(parent: ParentProcess, job: SweepJob) -> Outcome:
    """Run one job; when the sweep's folder is not on a disk of this machine, bring its files back in the outcome."""
    config = job.config
    seen = read_manifest(Path(str(config.hydra.sweep.dir)))
    if seen is not None and seen.id == parent.sweep.id:
        return run_hydra_job(parent, job, config)
    folder = Path(tempfile.mkdtemp(prefix="int8run-"))
    try:
        write_manifest(folder, parent.sweep)
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.sweep.subdir = "job"
            if not str(config.tracker.get("uri") or "").startswith("http"):
                # a database on the parent's disk: the parent copies the record when it has come back
                config.tracker = {"_target_": "int8run.tracking.base.NoTracker"}
        return replace(run_hydra_job(parent, job, config), files=zip_folder(folder / "job"))
    finally:
        shutil.rmtree(folder)


def run_hydra_job(parent: ParentProcess, job: SweepJob, config: Any) -> Outcome:
    """Run one job and say how it ended."""
    HydraConfig.instance().set_config(config)
    try:
        done = run_job(
            hydra_context=parent.context,
            task_function=parent.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except OSError as error:  # hydra makes the folder, its log file and its own notes before the job starts
        return make_failed_outcome(job, error)
    if done.status != JobStatus.COMPLETED:
        return make_failed_outcome(job, done._return_value)
    value = done.return_value
    return Outcome(job.number, FINISHED, None if value is None else float(value))


def make_failed_outcome(job: SweepJob, error: Exception) -> Outcome:
    """The outcome of a job that an error ended. The job's log file keeps the words; of one that a user should not meet, everything."""
    message, code = explain(error)
    log.error(
        "%s", message or f"{type(error).__name__}: {error}", exc_info=error if message is None else None
    )
    return Outcome(
        job.number,
        FAILED,
        error=message or " ".join(f"{type(error).__name__}: {error}".split()),
        exit_code=code,
    )


def zip_folder(folder: Path) -> bytes:
    """A folder's files."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return held.getvalue()


def unzip_files(files: bytes, folder: Path) -> None:
    """Put a worker's files where the sweep keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(files)) as archive:
        archive.extractall(folder)
