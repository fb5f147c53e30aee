"""Jobs to workers: those that use the same built model stay together, and the death of one job stops no other."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from int8run.jobs.base import Outcome, Pool, SweepJob, Worker, WorkerDied
from int8run.jobs.worker import unzip_files
from int8run.tracking.run_record import FINISHED, KILLED, end_record, try_read_record

log = logging.getLogger(__name__)
Call = Callable[[], Sequence[Outcome]]


@dataclass
class WorkerSlot:
    """A worker and what it is busy with."""

    worker: Worker
    key: str  # of the model that it has built
    jobs: list[SweepJob] = field(default_factory=list)


class JobQueue:
    """Jobs that wait, by the model that they use."""

    def __init__(self, jobs: Iterable[SweepJob]):
        self.groups: dict[str, list[SweepJob]] = {}
        for job in jobs:
            self.groups.setdefault(job.build_key, []).append(job)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def choose(self, built: str | None, in_use: set[str]) -> str | None:
        """Whose turn it is: the model that a worker has built, else the largest group that nobody works on, else a share of the largest.

        The last job of a group that another worker has built is left to that worker.
        """
        if built in self.groups:
            return built
        free = {key: len(jobs) for key, jobs in self.groups.items() if key not in in_use}
        shared = {key: len(jobs) for key, jobs in self.groups.items() if key in in_use and len(jobs) > 1}
        choice = free or shared
        return max(choice, key=lambda key: choice[key]) if choice else None

    def take(self, key: str, whole: bool) -> list[SweepJob]:
        """The first job of a group, or all of it."""
        group = self.groups[key]
        taken = group[:] if whole else group[:1]
        self.groups[key] = group[len(taken) :]
        if not self.groups[key]:
            del self.groups[key]
        return taken

    def give_back(self, jobs: Sequence[SweepJob]) -> None:
        """Jobs that their worker did not come to."""
        for job in reversed(jobs):
            self.groups.setdefault(job.build_key, []).insert(0, job)


def run_scheduled(
    jobs: Sequence[SweepJob],
    pool: Pool,
    most: int,
    call: Callable[[Sequence[SweepJob]], Call],
    started: Callable[[SweepJob], None],
    ended: Callable[[SweepJob, Outcome], None],
) -> None:
    """Run jobs on the workers of a pool that is open.

    Args:
        most: workers at once.
        call: what a worker is given for some jobs.
        started, ended: told of every job.
    """
    queue = JobQueue(jobs)
    busy: dict[Future[Sequence[Outcome]], WorkerSlot] = {}
    idle: list[WorkerSlot] = []

    def occupy(seat: WorkerSlot, key: str) -> None:
        seat.key, seat.jobs = key, queue.take(key, pool.whole_groups)
        for job in seat.jobs:
            started(job)
        busy[seat.worker.submit(call(seat.jobs))] = seat

    try:
        while queue or busy:
            for seat in idle[:]:
                key = queue.choose(seat.key, {s.key for s in busy.values()})
                if key is not None:
                    idle.remove(seat)
                    occupy(seat, key)
            while len(busy) + len(idle) < most and (
                key := queue.choose(None, {s.key for s in [*busy.values(), *idle]})
            ):
                occupy(WorkerSlot(pool.start(), key), key)
            finished, _ = wait(busy, return_when=FIRST_COMPLETED)
            for future in finished:
                seat = busy.pop(future)
                idle.append(seat)
                try:
                    outcomes = future.result()
                except WorkerDied as death:
                    idle.remove(seat)
                    seat.worker.close()
                    outcomes = fail_jobs(seat.jobs, death)
                by_number = {outcome.number: outcome for outcome in outcomes}
                for job in seat.jobs:
                    if job.number in by_number:
                        ended(job, unpack_files(job, by_number[job.number]))
                queue.give_back([job for job in seat.jobs if job.number not in by_number])
    finally:
        for seat in [*busy.values(), *idle]:
            seat.worker.close()
        for job in (job for seat in busy.values() for job in seat.jobs):
            record = try_read_record(job.folder)
            if record is not None and record.ended is None:  # after Ctrl-C
                end_record(record, KILLED, "the sweep was interrupted")


def unpack_files(job: SweepJob, outcome: Outcome) -> Outcome:
    """Unpack what a worker on another machine sent."""
    if outcome.files is not None:
        unzip_files(outcome.files, job.folder)
    return outcome


def fail_jobs(jobs: Sequence[SweepJob], death: WorkerDied) -> list[Outcome]:
    """Outcomes of the jobs that a dead worker had come to: those before the last one ended by themselves, the last one was killed."""
    outcomes = []
    for job in jobs:
        record = try_read_record(job.folder)
        if record is not None and record.ended is not None:
            failed = record.state != FINISHED
            outcomes.append(
                Outcome(
                    job.number, record.state, record.metrics.get(record.objective), record.error, int(failed)
                )
            )
            continue
        if record is not None:
            end_record(record, KILLED, str(death))
        if (
            record is not None or not outcomes
        ):  # one that died before its first job would else be tried for ever
            outcomes.append(Outcome(job.number, KILLED, error=str(death), exit_code=1))
        break
    return outcomes
