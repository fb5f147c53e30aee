"""A sweep from its composed jobs to its last line: find what is finished, run the rest, compare all.

Called by the launchers of `jobs.hydra_plugins`, in the process that the user started.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from int8run.config.run_spec import RunSpec
from int8run.errors import SweepError
from int8run.jobs.base import Outcome, Pool, SweepJob
from int8run.jobs.execute import build_status, prepare_tracker, upload_record
from int8run.jobs.finalize import finalize_sweep
from int8run.jobs.folders import check_job_folders, clear_job_folder
from int8run.jobs.manifest import (
    SweepManifest,
    find_varying_overrides,
    make_sweep_id,
    read_manifest,
    write_manifest,
)
from int8run.jobs.plan import PlannedJob, find_finished_jobs, get_job_folder, plan_jobs
from int8run.jobs.scheduler import Scheduler, is_interleaved
from int8run.jobs.worker import ParentProcess, run_jobs
from int8run.report.ranking import varies_content
from int8run.report.sweep_progress import SweepProgress
from int8run.tracking.run_record import (
    FINISHED,
    KILLED,
    Record,
    create_record,
    end_record,
    start_record,
    try_read_record,
)
from int8run.tracking.setting_names import shorten_value

log = logging.getLogger(__name__)


def run_sweep(
    configs: Sequence[DictConfig],
    specs: Sequence[RunSpec],
    *,
    pool: Pool,
    hydra_context: Any,
    task_function: Any,
) -> list[float | None]:
    """Run the jobs of a sweep on a pool's workers, and make one report of what they leave.

    Args:
        configs: of the jobs, composed, hydra's part included; numbered, in one sweep folder that this
            process has taken.
        specs: made from `configs`, in the same order.
        pool: not open yet.
        hydra_context: hydra's, needed to run a job.
        task_function: hydra's, runs the job of a config.

    Returns:
        The value of each job.

    Raises:
        ConfigError: when two jobs would share a folder.
        SweepError: after all other jobs are done, when a job failed or was killed; it names each.
    """
    folder = Path(str(configs[0].hydra.sweep.dir))
    resume = bool(configs[0].get("resume"))
    check_job_folders(folder, [get_job_folder(config) for config in configs])
    manifest = prepare_manifest(folder, configs, resume=resume)
    planned = plan_jobs(folder, configs, specs, resume=resume)
    trackers = {p.job.number: p.spec.tracker for p in planned if p.spec.task.tracked}
    for tracker in set(trackers.values()):
        prepare_tracker(tracker)
    finished = find_finished_jobs(manifest, planned) if resume else {}
    sweep = SweepRun(folder, manifest, planned, finished)
    sweep.run_jobs(pool, hydra_context, task_function)
    records = [sweep.records[p.job.number] for p in planned]
    finalize_sweep(folder, sweep.manifest, records, trackers)
    sweep.check_all_finished()
    return [sweep.outcomes[p.job.number].value for p in planned]


def prepare_manifest(folder: Path, configs: Sequence[DictConfig], *, resume: bool) -> SweepManifest:
    """Write sweep.json: with a new identity, or with that of the sweep that goes on."""
    earlier = read_manifest(folder) if resume else None
    if earlier is None:
        sweep_id, created = make_sweep_id(folder), time.time()
    else:
        sweep_id, created = earlier.id, earlier.created
    manifest = SweepManifest(
        id=sweep_id,
        varying=find_varying_overrides([list(config.hydra.overrides.task) for config in configs]),
        jobs=len(configs),
        created=created,
    )
    write_manifest(folder, manifest)
    return manifest


class SweepRun:
    """The jobs of a sweep while they run, and how those that ended did.

    Args:
        folder: of the sweep.
        manifest: its identity.
        planned: all of its jobs.
        finished: records of jobs that need not run again, by number.
    """

    def __init__(
        self,
        folder: Path,
        manifest: SweepManifest,
        planned: Sequence[PlannedJob],
        finished: Mapping[int, Record],
    ):
        self.folder = folder
        self.manifest = manifest
        self.planned = planned
        self.by_number = {p.job.number: p for p in planned}
        self.records = dict(finished)
        self.outcomes: dict[int, Outcome] = {}
        for number, record in finished.items():
            value = record.metrics.get(record.objective)
            self.outcomes[number] = Outcome(number, FINISHED, value=value)
        spec = planned[0].spec
        objective: str | None = spec.metrics.objective
        if varies_content(manifest.varying):
            objective = None  # jobs with other prompts, seeds or strengths are not better or worse
        self.progress = SweepProgress(
            total=len(planned),
            finished=list(finished.values()),
            objective=objective,
            enabled=spec.progress,
        )

    def run_jobs(self, pool: Pool, hydra_context: Any, task_function: Any) -> None:
        """Run all jobs that are not finished; see `run_sweep` for the arguments."""
        jobs = [p.job for p in self.planned if p.job.number not in self.outcomes]
        if not jobs:
            return
        for job in jobs:
            clear_job_folder(self.folder, job.folder)
        try:
            max_workers = pool.open(len(jobs))
            # how many jobs share a machine is known of a cluster only once the pool is open
            self.manifest = replace(self.manifest, jobs_at_once=min(pool.jobs_at_once, len(jobs)))
            write_manifest(self.folder, self.manifest)
            parent = describe_parent(self.manifest, hydra_context, task_function)
            if is_interleaved(jobs):
                log.info("jobs that use the same model run one after the other, not by their numbers")
            scheduler = Scheduler(
                jobs,
                pool,
                max_workers=max_workers,
                make_call=lambda some_jobs: partial(run_jobs, parent, some_jobs),
                on_start=self.report_start,
                on_end=self.report_end,
            )
            scheduler.run()
        except KeyboardInterrupt:
            self.upload_interrupted_jobs()
            raise
        finally:
            pool.close()

    def report_start(self, job: SweepJob) -> None:
        """Show that a job starts."""
        self.progress.report_start(job.number, self.by_number[job.number].origin.name)

    def report_end(self, job: SweepJob, outcome: Outcome) -> None:
        """Keep and show how a job ended."""
        # a job that ran in this process has sent the log to a file of its own
        configure_log(job.config.hydra.hydra_logging, job.config.hydra.verbose)
        record = read_final_record(self.by_number[job.number], outcome)
        self.outcomes[job.number] = outcome
        self.records[job.number] = record
        self.progress.report_end(record)

    def upload_interrupted_jobs(self) -> None:
        """After Ctrl-C: upload the jobs that were killed, and log what is kept."""
        finished = num_images = 0
        hydra_config = self.planned[0].job.config.hydra
        # the job that was interrupted in this process has sent the log to a file of its own
        configure_log(hydra_config.hydra_logging, hydra_config.verbose)
        for planned in self.planned:
            record = try_read_record(planned.job.folder)
            if record is None:
                continue
            if record.state == KILLED and planned.spec.task.tracked:
                upload_record(planned.spec.tracker, record)
            if record.state == FINISHED:
                finished += 1
            else:
                num_images += count_images(record.folder)
        log.warning(
            "interrupted: %d of %d jobs are finished, in %s; image files kept of the others: %d",
            finished,
            len(self.planned),
            self.folder,
            num_images,
        )

    def check_all_finished(self) -> None:
        """Check that no job failed or was killed.

        Raises:
            SweepError: with a line for every job that did not finish; the exit code is theirs, where they
                agree.
        """
        lines = []
        exit_codes = set()
        for planned in self.planned:
            number = planned.job.number
            outcome = self.outcomes[number]
            if outcome.state == FINISHED:
                continue
            name = shorten_value(planned.origin.name)
            lines.append(f"  job {number} ({name}) {outcome.state}: {outcome.error}")
            exit_codes.add(outcome.exit_code)
        if not lines:
            return
        summary = (
            f"{len(lines)} of {len(self.planned)} jobs did not finish; "
            "the same command with resume=true runs these alone"
        )
        exit_code = 1
        if len(exit_codes) == 1:
            exit_code = exit_codes.pop()
        raise SweepError("\n".join([summary, *lines]), exit_code)


def describe_parent(manifest: SweepManifest, hydra_context: Any, task_function: Any) -> ParentProcess:
    """Return what the workers are told of this process; see `run_sweep` for the arguments."""
    return ParentProcess(
        manifest=manifest,
        hydra_context=hydra_context,
        task_function=task_function,
        singletons=Singleton.get_state(),
        working_folder=str(Path.cwd()),
        pid=os.getpid(),
    )


def count_images(folder: Path) -> int:
    """Count the image files that a job has written whole: hidden ones are of a write that was cut off."""
    files = [path for path in (folder / "images").glob("*") if path.is_file()]
    return sum(not path.name.startswith(".") for path in files)


def read_final_record(planned: PlannedJob, outcome: Outcome) -> Record:
    """Read the record that a job left.

    A job whose worker died before it could write one, or on a machine that is gone, gets its record here;
    where nothing can be written, for this process alone.
    """
    folder = planned.job.folder
    record = try_read_record(folder)
    if record is not None:
        return record
    status = build_status(planned.spec, planned.origin)
    try:
        return end_record(start_record(folder, status), outcome.state, outcome.error)
    except OSError as error:
        log.warning("%s cannot be written: %s", folder, error.strerror)
        return create_record(folder, status, state=outcome.state, error=outcome.error)
