"""A sweep from its composed jobs to its last line: what is finished already, who runs the rest, what is made of it."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from int8run.config.compose import plain_config, to_spec
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, Int8RunError, TrackingError
from int8run.jobs.base import Outcome, Pool, SweepJob
from int8run.jobs.execute import build_status, prepare_tracker, upload_record
from int8run.jobs.finalize import finalize_sweep
from int8run.jobs.job import make_job
from int8run.jobs.manifest import (
    SweepManifest,
    find_varying_keys,
    make_sweep_id,
    now,
    read_manifest,
    write_manifest,
)
from int8run.jobs.scheduler import run_scheduled
from int8run.jobs.worker import ParentProcess, run_jobs
from int8run.report.console import SweepProgress
from int8run.tracking.run_record import (
    FINISHED,
    KILLED,
    KILLED_MESSAGE,
    RUNNING,
    STATUS,
    Record,
    create_record,
    describe_process,
    end_record,
    find_records,
    hash_config,
    read_record,
    start_record,
    try_read_record,
    update_record,
)

log = logging.getLogger(__name__)


class SweepError(Int8RunError):
    """Some jobs of a sweep did not finish."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class PlannedJob:
    """One job before it runs."""

    spec: RunSpec
    about: Job
    job: SweepJob


def run_sweep(
    configs: Sequence[DictConfig], pool: Pool, context: Any, task_function: Any
) -> list[float | None]:
    """Run the jobs of a sweep on a pool's workers, those that use the same model together, and make one page of what they leave.

    Args:
        configs: composed, hydra's part included; numbered, in one sweep folder.
        context, task_function: hydra's.

    Returns:
        the value of each job.

    Raises:
        ConfigError: when another sweep runs in the folder.
        SweepError: after all others are done, when a job failed or was killed; it names each.
    """
    folder = Path(str(configs[0].hydra.sweep.dir))
    try:
        with FileLock(
            folder / "sweep.lock", timeout=0
        ):  # the system lets go of it when this process ends, however it does
            return run_locked_sweep(folder, configs, pool, context, task_function)
    except Timeout:
        raise ConfigError(
            f"another sweep runs in {folder}; wait for it, or choose another folder: hydra.sweep.dir=FOLDER"
        ) from None


def run_locked_sweep(
    folder: Path, configs: Sequence[DictConfig], pool: Pool, context: Any, task_function: Any
) -> list[float | None]:
    """See `conduct`."""
    resume = bool(configs[0].get("resume"))
    sweep = prepare_manifest(folder, configs, resume)
    planned = plan_jobs(folder, configs, resume)
    for tracker in {p.spec.tracker for p in planned if p.spec.task.tracked}:
        prepare_tracker(tracker)
    records = find_finished_jobs(sweep, planned) if resume else {}
    outcomes = {
        number: Outcome(number, FINISHED, record.metrics.get(record.objective))
        for number, record in records.items()
    }
    todo = [p.job for p in planned if p.job.number not in outcomes]
    for path in (job.folder / STATUS for job in todo):
        if path.is_file():  # of an earlier try
            path.unlink()
    by_number = {p.job.number: p for p in planned}
    metrics = planned[0].spec.metrics
    progress = SweepProgress(len(planned), len(outcomes), metrics.objective, planned[0].spec.progress)

    def started(job: SweepJob) -> None:
        progress.started(job.number, by_number[job.number].about.name)

    def ended(job: SweepJob, outcome: Outcome) -> None:
        configure_log(
            job.config.hydra.hydra_logging, job.config.hydra.verbose
        )  # a job in this process had its own log file
        outcomes[job.number] = outcome
        records[job.number] = record_outcome(by_number[job.number], outcome)
        progress.ended(records[job.number])

    if todo:
        try:
            most = pool.open(len(todo))
            sweep = replace(
                sweep, jobs_at_once=min(pool.jobs_at_once, len(todo))
            )  # a cluster is known once it is there
            write_manifest(folder, sweep)
            parent = ParentProcess(
                sweep, context, task_function, Singleton.get_state(), str(Path.cwd()), os.getpid()
            )
            run_scheduled(todo, pool, most, lambda jobs: partial(run_jobs, parent, jobs), started, ended)
        except KeyboardInterrupt:
            ends = [(p, try_read_record(p.job.folder)) for p in planned]
            for p, record in ends:
                if record is not None and record.state == KILLED and p.spec.task.tracked:
                    upload_record(p.spec.tracker, record)
            done = sum(record is not None and record.state == FINISHED for _, record in ends)
            log.warning("interrupted: %d of %d jobs are finished, in %s", done, len(planned), folder)
            raise
        finally:
            pool.close()
    finalize_sweep(
        folder,
        sweep,
        [records[p.job.number] for p in planned],
        {p.job.number: p.spec.tracker for p in planned if p.spec.task.tracked},
    )
    failed = [p for p in planned if outcomes[p.job.number].state != FINISHED]
    if failed:
        raise make_sweep_error(failed, outcomes, len(planned))
    return [outcomes[p.job.number].value for p in planned]


def prepare_manifest(folder: Path, configs: Sequence[DictConfig], resume: bool) -> SweepManifest:
    """Write sweep.json: a new identity, or that of the sweep that goes on."""
    earlier = read_manifest(folder) if resume else None
    varying = find_varying_keys([list(config.hydra.overrides.task) for config in configs])
    created = earlier.created if earlier else now()
    sweep = SweepManifest(
        earlier.id if earlier else make_sweep_id(folder), varying, len(configs), created=created
    )
    write_manifest(folder, sweep)
    return sweep


def plan_jobs(folder: Path, configs: Sequence[DictConfig], resume: bool) -> list[PlannedJob]:
    """Specs, identities and folders. A sweep that goes on keeps the folder of each job that it had, and gives the others new ones."""
    earlier_jobs = [r for r in find_records(folder) if r.sweep is not None] if resume else []
    taken = {r.folder for r in earlier_jobs}
    mine = {r.config_hash: r for r in earlier_jobs}
    planned = []
    for config in configs:
        earlier = mine.pop(hash_config(plain_config(config)), None)
        if earlier is not None:
            config.hydra.job.num = earlier.number
        else:
            choose_free_number(config, taken)
        about = make_job(config, config.hydra, job_folder(config))
        taken.add(about.output_dir)
        spec = to_spec(config)
        known = build_status(spec, about)
        job = SweepJob(
            about.number,
            tuple(about.overrides),
            config,
            about.output_dir,
            str(known["config_hash"]),
            str(known["build_key"]),
        )
        planned.append(PlannedJob(spec, about, job))
    return planned


def job_folder(config: DictConfig) -> Path:
    """A job's output folder."""
    return Path(str(config.hydra.sweep.dir)) / str(OmegaConf.select(config, "hydra.sweep.subdir"))


def choose_free_number(config: DictConfig, taken: Collection[Path]) -> None:
    """Count a job's number up until its folder is nobody else's, where the folder's name depends on the number."""
    while (place := job_folder(config)) in taken:
        config.hydra.job.num += 1
        if job_folder(config) == place:
            return


def find_finished_jobs(sweep: SweepManifest, planned: Sequence[PlannedJob]) -> dict[int, Record]:
    """Jobs that need not run again, by number: those whose folder says so, and those that the tracker has, which are brought back.

    Raises:
        ConfigError: when a job of the sweep still runs on this machine.
    """
    found = {}
    for p in planned:
        record = try_read_record(p.job.folder)
        if (
            record is not None
            and record.state == RUNNING
            and record.status["host"] == describe_process()["host"]
        ):
            pid = record.status["pid"]
            raise ConfigError(
                f"job {record.number} of this sweep runs in process {pid}; wait for it, or end it, then resume"
            )
        if record is not None and record.state == FINISHED:
            found[p.job.number] = record
    try:
        missing = [p for p in planned if p.spec.task.tracked and p.job.number not in found]
        for tracker in dict.fromkeys(p.spec.tracker for p in missing):
            for run_id in tracker.find_running(sweep.id):
                tracker.end_run(run_id, KILLED, KILLED_MESSAGE)
            theirs = [p for p in missing if p.spec.tracker == tracker]
            known = tracker.find_finished([p.job.config_hash for p in theirs])
            for p in (p for p in theirs if p.job.config_hash in known):
                tracker.download_run(known[p.job.config_hash], p.job.folder)
                found[p.job.number] = update_record(read_record(p.job.folder), number=p.job.number)
    except TrackingError as error:
        log.warning("%s; only jobs that are finished in the sweep's folder are left out", error)
    folder = planned[0].about.output_dir.parent
    log.info("%d of %d jobs are finished already; going on in %s", len(found), len(planned), folder)
    return found


def record_outcome(planned: PlannedJob, outcome: Outcome) -> Record:
    """What a job left. One whose worker died before it could write, or on a machine that is gone, gets its record here; where nothing
    can be written, for this process alone."""
    record = try_read_record(planned.job.folder)
    if record is not None:
        return record
    known = build_status(planned.spec, planned.about)
    try:
        return end_record(start_record(planned.job.folder, known), outcome.state, outcome.error)
    except OSError as error:
        log.warning("%s cannot be written: %s", planned.job.folder, error.strerror)
        return create_record(planned.job.folder, known, state=outcome.state, error=outcome.error)


def make_sweep_error(failed: Sequence[PlannedJob], outcomes: Mapping[int, Outcome], jobs: int) -> SweepError:
    """One line for every job that did not finish; the exit code is theirs, where they agree."""
    codes = {outcomes[p.job.number].exit_code for p in failed}
    lines = [
        f"  job {p.job.number} ({p.about.name}) {outcomes[p.job.number].state}: {outcomes[p.job.number].error}"
        for p in failed
    ]
    head = f"{len(failed)} of {jobs} jobs did not finish; the same command with resume=true runs these alone"
    return SweepError("\n".join([head, *lines]), codes.pop() if len(codes) == 1 else 1)
