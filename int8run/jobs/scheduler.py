"""Which worker runs which job of a sweep.

A worker keeps the model that it built last. So jobs that use the same built model form a group, and a worker
stays with its group as long as jobs of it wait. When a worker dies, only the job that it was running is
lost; those behind it go back to the queue.

Called by `jobs.sweep`. It must not know what a worker is, a process here or a job of a cluster: `jobs.base`
has the protocols.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from int8run.jobs.base import Outcome, Pool, SweepJob, Worker, WorkerDied
from int8run.jobs.worker import unzip_files
from int8run.tracking.run_record import FINISHED, KILLED, Record, end_record, try_read_record

log = logging.getLogger(__name__)
# what a worker runs: some jobs, one after the other; returns how they ended
Call = Callable[[], Sequence[Outcome]]


def is_interleaved(jobs: Sequence[SweepJob]) -> bool:
    """Whether jobs of one model stand between those of another, so that they do not run by their numbers."""
    num_stretches = sum(1 for _ in itertools.groupby(job.build_key for job in jobs))
    return num_stretches > len({job.build_key for job in jobs})


@dataclass(eq=False)
class WorkerSlot:
    """A worker and the jobs that it was given last.

    Args:
        worker: runs one call at a time.
        build_key: of the model that it has built, or is building.
        jobs: of its latest call.
    """

    worker: Worker
    build_key: str
    jobs: list[SweepJob] = field(default_factory=list)


class JobQueue:
    """The waiting jobs, grouped by the model that they use.

    Args:
        jobs: of all models, in the order in which they are to run.
    """

    def __init__(self, jobs: Iterable[SweepJob]):
        # build key -> its jobs; a group that has none left is removed
        self.groups: dict[str, list[SweepJob]] = {}
        for job in jobs:
            self.groups.setdefault(job.build_key, []).append(job)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def choose_group(self, built: str | None, in_use: Collection[str]) -> str | None:
        """Choose the model that a worker runs next.

        Args:
            built: key of the model that the worker has built; None for a new worker.
            in_use: keys of the models of the other workers.

        Returns:
            A key of `groups`; None when there is nothing to do for this worker.
        """
        if built in self.groups:
            return built
        unused = [key for key in self.groups if key not in in_use]
        if unused:
            return self.find_largest(unused)
        # A second worker would have to build the model again. That is not worth it for one job: the worker
        # that has the model runs it next.
        shareable = [key for key, jobs in self.groups.items() if len(jobs) > 1]
        if shareable:
            return self.find_largest(shareable)
        return None

    def find_largest(self, keys: Iterable[str]) -> str:
        """Return the key with the most waiting jobs, the first of several."""
        return max(keys, key=self.count_jobs)

    def count_jobs(self, key: str) -> int:
        """Count the waiting jobs of a model."""
        return len(self.groups[key])

    def take_group(self, key: str) -> list[SweepJob]:
        """Remove all jobs of a group, and return them."""
        return self.groups.pop(key)

    def take_job(self, key: str) -> SweepJob:
        """Remove the first job of a group, and return it."""
        group = self.groups[key]
        job = group.pop(0)
        if not group:
            del self.groups[key]
        return job

    def requeue(self, jobs: Sequence[SweepJob]) -> None:
        """Put jobs that their worker did not come to back to the front of their groups."""
        for job in reversed(jobs):
            self.groups.setdefault(job.build_key, []).insert(0, job)


class Scheduler:
    """Runs jobs on the workers of an open pool.

    Args:
        jobs: to run, in this order within each group.
        pool: starts the workers; its owner opens and closes it.
        max_workers: how many workers are used at once.
        make_call: builds what a worker is given for some jobs.
        on_start: called with each job before it is submitted; for all jobs of a group at once where the pool
            takes whole groups, and again for a job that waits anew because its worker died before it.
        on_end: called once with each job and how it ended.
    """

    def __init__(
        self,
        jobs: Sequence[SweepJob],
        pool: Pool,
        *,
        max_workers: int,
        make_call: Callable[[Sequence[SweepJob]], Call],
        on_start: Callable[[SweepJob], None],
        on_end: Callable[[SweepJob, Outcome], None],
    ):
        self.queue = JobQueue(jobs)
        self.pool = pool
        self.max_workers = max_workers
        self.make_call = make_call
        self.on_start = on_start
        self.on_end = on_end
        self.busy: dict[Future[Sequence[Outcome]], WorkerSlot] = {}
        self.idle: list[WorkerSlot] = []

    def run(self) -> None:
        """Run all jobs; returns when the last one has ended.

        Raises:
            KeyboardInterrupt: passes through, after all workers are closed.
            Int8RunError: an error of the launcher itself, such as a batch system that takes no job.
        """
        try:
            while self.queue or self.busy:
                self.start_idle()
                self.start_new()
                finished, _ = wait(self.busy, return_when=FIRST_COMPLETED)
                for future in finished:
                    self.collect(future)
        finally:
            self.close()

    def start_idle(self) -> None:
        """Give each idle worker its next jobs, where there are any for it."""
        for slot in list(self.idle):
            in_use = {other.build_key for other in self.busy.values()}
            key = self.queue.choose_group(slot.build_key, in_use)
            if key is not None:
                self.idle.remove(slot)
                self.submit(slot, key)

    def start_new(self) -> None:
        """Start workers for jobs that no idle worker has taken, up to the limit."""
        # idle workers have chosen already; one that found nothing keeps its model
        while len(self.slots) < self.max_workers:
            in_use = {other.build_key for other in self.slots}
            key = self.queue.choose_group(None, in_use)
            if key is None:
                return
            self.submit(WorkerSlot(self.pool.start(), key), key)

    @property
    def slots(self) -> list[WorkerSlot]:
        """Every worker that runs, busy or idle."""
        return [*self.busy.values(), *self.idle]

    def submit(self, slot: WorkerSlot, key: str) -> None:
        """Submit the next jobs of a group to a worker."""
        slot.build_key = key
        if self.pool.whole_groups:
            slot.jobs = self.queue.take_group(key)
        else:
            slot.jobs = [self.queue.take_job(key)]
        for job in slot.jobs:
            self.on_start(job)
        future = slot.worker.submit(self.make_call(slot.jobs))
        self.busy[future] = slot

    def collect(self, future: Future[Sequence[Outcome]]) -> None:
        """Report how the jobs of a finished call ended; what its worker did not come to waits again."""
        slot = self.busy.pop(future)
        # idle first: if `result` raises another error, `close` still finds the worker
        self.idle.append(slot)
        try:
            outcomes = future.result()
        except WorkerDied as death:
            self.idle.remove(slot)
            slot.worker.close()
            outcomes = conclude_jobs(slot.jobs, death)
        by_number = {outcome.number: outcome for outcome in outcomes}
        not_reached = []
        for job in slot.jobs:
            if job.number in by_number:
                self.report_end(job, by_number[job.number])
            else:
                not_reached.append(job)
        self.queue.requeue(not_reached)

    def report_end(self, job: SweepJob, outcome: Outcome) -> None:
        """Report how a job ended, once its files are in its folder."""
        if outcome.files is not None:  # from a machine that does not share our disk
            unzip_files(outcome.files, job.folder)
        self.on_end(job, outcome)

    def close(self) -> None:
        """End all workers; jobs that still run, as after Ctrl-C, are recorded as killed."""
        for slot in self.slots:
            slot.worker.close()
        for slot in self.busy.values():
            for job in slot.jobs:
                record_interrupt(job)


def record_interrupt(job: SweepJob) -> None:
    """Record a job as killed, if it has begun and not ended."""
    record = try_read_record(job.folder)
    if record is not None and record.ended is None:
        end_record(record, KILLED, "the sweep was interrupted")


def conclude_jobs(jobs: Sequence[SweepJob], death: WorkerDied) -> list[Outcome]:
    """Find out from the jobs' folders, and record, what a dead worker had done.

    Args:
        jobs: of the worker's latest call, which it ran in this order.
        death: says how the worker died.

    Returns:
        The outcomes of the jobs that it came to: those that had ended, and the one that was running, which is
        recorded as killed if it has a record. There is at least one, so that a worker that dies before its
        first job is not started for the same jobs again and again.
    """
    outcomes: list[Outcome] = []
    for job in jobs:
        record = try_read_record(job.folder)
        if record is not None and record.ended is not None:
            outcomes.append(make_outcome(job, record))
            continue
        if record is None and outcomes:
            break  # it died between two jobs: this one did not start
        if record is not None:
            end_record(record, KILLED, str(death))
        outcomes.append(Outcome(job.number, KILLED, error=str(death), exit_code=1))
        break
    return outcomes


def make_outcome(job: SweepJob, record: Record) -> Outcome:
    """Return how a job ended by itself, from its record."""
    exit_code = 0 if record.state == FINISHED else 1
    return Outcome(
        job.number,
        record.state,
        value=record.metrics.get(record.objective),
        error=record.error,
        exit_code=exit_code,
    )
