"""What each job of a sweep is before it runs: its RunSpec, number and folder; and which need not run again.

Called by `jobs.sweep`. `jobs.resume` has found the folder of the sweep by then.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from int8run.config.compose import get_plain_config
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, TrackingError
from int8run.jobs.base import SweepJob
from int8run.jobs.execute import build_status
from int8run.jobs.folders import clear_job_folder, refuse_shared_folder
from int8run.jobs.job import make_job
from int8run.jobs.manifest import SweepManifest
from int8run.tracking.base import Tracker
from int8run.tracking.process_identity import describe_process
from int8run.tracking.run_record import (
    FINISHED,
    KILLED,
    KILLED_MESSAGE,
    RUNNING,
    Record,
    find_records,
    hash_config,
    read_record,
    try_read_record,
    update_record,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedJob:
    """One job of a sweep before it runs.

    Args:
        spec: its checked settings.
        origin: where they came from, for the record.
        job: what a worker is given.
    """

    spec: RunSpec
    origin: Job
    job: SweepJob


def plan_jobs(
    folder: Path, configs: Sequence[DictConfig], specs: Sequence[RunSpec], *, resume: bool
) -> list[PlannedJob]:
    """Give each job its number and its folder.

    A sweep that goes on keeps the folder of each job that it had; the other jobs get new ones.

    Args:
        folder: of the sweep.
        configs: composed, hydra's part included; a job's number in it is set here.
        specs: made from `configs`, in the same order.
        resume: whether the sweep goes on in its folder.
    """
    earlier_records = []
    if resume:
        earlier_records = [record for record in find_records(folder) if record.sweep is not None]
    used_folders = {record.folder for record in earlier_records}
    by_config_hash = {record.config_hash: record for record in earlier_records}
    planned = []
    next_number = 0
    for config, spec in zip(configs, specs, strict=True):
        earlier = by_config_hash.pop(hash_config(get_plain_config(config)), None)
        if earlier is not None:
            config.hydra.job.num = earlier.number
        else:
            next_number = choose_free_number(config, used_folders, next_number)
        origin = make_job(config, config.hydra, get_job_folder(config))
        used_folders.add(origin.output_dir)
        planned.append(PlannedJob(spec, origin, make_sweep_job(config, spec, origin)))
    return planned


def make_sweep_job(config: DictConfig, spec: RunSpec, origin: Job) -> SweepJob:
    """Return a job as its worker gets it.

    Args:
        config: composed, hydra's part included.
        spec: made from `config`.
        origin: says its number, folder and overrides.
    """
    status = build_status(spec, origin)  # the hashes are those of status.json
    return SweepJob(
        number=origin.number,
        overrides=tuple(origin.overrides),
        config=config,
        folder=origin.output_dir,
        config_hash=str(status["config_hash"]),
        build_key=str(status["build_key"]),
    )


def get_job_folder(config: DictConfig) -> Path:
    """Return a job's output folder."""
    return Path(str(config.hydra.sweep.dir)) / str(OmegaConf.select(config, "hydra.sweep.subdir"))


def choose_free_number(config: DictConfig, used_folders: Collection[Path], next_number: int) -> int:
    """Count a job's number up until no other job has its folder.

    Args:
        config: of the job.
        used_folders: of other jobs.
        next_number: what an earlier call returned: the numbers that it tried are not tried again.

    Returns:
        The number after the one that was found, or `next_number` where the job's own was free.

    Raises:
        ConfigError: for a `hydra.sweep.subdir` that does not depend on the number.
    """
    folder = get_job_folder(config)
    if folder not in used_folders:
        return next_number
    while folder in used_folders:
        config.hydra.job.num = max(config.hydra.job.num + 1, next_number)
        next_folder = get_job_folder(config)
        if next_folder == folder:
            refuse_shared_folder(folder)
        folder = next_folder
    return int(config.hydra.job.num) + 1


def find_finished_jobs(manifest: SweepManifest, planned: Sequence[PlannedJob]) -> dict[int, Record]:
    """Find the jobs of a sweep that goes on that need not run again.

    Returns:
        Their records by number: of those that are finished in the sweep's folder, and of those that the
            tracker has, which are downloaded.

    Raises:
        ConfigError: when a job of the sweep still runs on this machine.
    """
    finished = read_finished_jobs([p.job for p in planned])
    # the jobs that a tracker may know, by tracker
    missing: dict[Tracker, list[SweepJob]] = {}
    for p in planned:
        if p.spec.task.tracked and p.job.number not in finished:
            missing.setdefault(p.spec.tracker, []).append(p.job)
    try:
        for tracker, jobs in missing.items():
            for record in download_finished_jobs(tracker, manifest, jobs):
                finished[record.number] = record
    except TrackingError as error:
        log.warning("%s; only jobs that are finished in the sweep's folder are left out", error)
    folder = planned[0].job.folder.parent
    log.info("%d of %d jobs are finished already; going on in %s", len(finished), len(planned), folder)
    return finished


def read_finished_jobs(jobs: Sequence[SweepJob]) -> dict[int, Record]:
    """Read the records of the jobs that are finished in the sweep's folder, by number.

    Raises:
        ConfigError: when one of the jobs still runs on this machine.
    """
    finished = {}
    for job in jobs:
        record = try_read_record(job.folder)
        if record is None:
            continue
        check_not_running(record)
        if record.state == FINISHED:
            finished[job.number] = record
    return finished


def check_not_running(record: Record) -> None:
    """Raise ConfigError for a job that still runs on this machine; of another machine nothing is known."""
    is_on_this_machine = record.status["host"] == describe_process()["host"]
    if record.state == RUNNING and is_on_this_machine:
        raise ConfigError(
            f"job {record.number} of this sweep runs in process {record.status['pid']}; "
            "wait for it, or end it, then resume"
        )


def download_finished_jobs(
    tracker: Tracker, manifest: SweepManifest, jobs: Sequence[SweepJob]
) -> Iterator[Record]:
    """Download the jobs that a tracker knows as finished into their folders.

    Args:
        tracker: of all these jobs.
        manifest: the sweep; runs of it that the tracker still has as running belong to dead processes.
        jobs: to look for.

    Yields:
        The record of each job that was downloaded.

    Raises:
        TrackingError: when the tracker does not answer.
    """
    for run_id in tracker.find_running(manifest.id):
        tracker.end_run(run_id, KILLED, KILLED_MESSAGE)
    run_ids = tracker.find_finished([job.config_hash for job in jobs])
    for job in jobs:
        if job.config_hash not in run_ids:
            continue
        clear_job_folder(Path(str(job.config.hydra.sweep.dir)), job.folder)
        tracker.download_run(run_ids[job.config_hash], job.folder)
        # the job may have had another number in the sweep that it comes from
        yield update_record(read_record(job.folder), number=job.number)
