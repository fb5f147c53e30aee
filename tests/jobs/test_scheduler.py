"""Jobs to workers: which worker gets which job, what a death leaves, what comes back from other machines."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from int8run.jobs.base import Outcome, SweepJob, WorkerDied
from int8run.jobs.scheduler import JobQueue, Scheduler, conclude_jobs, is_interleaved
from int8run.jobs.worker import zip_folder
from int8run.tracking.run_record import FINISHED, KILLED, end_record, read_record, start_record

RunJob = Callable[[SweepJob], Outcome]


def make_job(number: int, build_key: str = "a", folder: Path = Path("/none")) -> SweepJob:
    return SweepJob(
        number=number,
        overrides=(),
        config=None,
        folder=folder / str(number),
        config_hash=f"hash{number}",
        build_key=build_key,
    )


def write_record(folder: Path, number: int) -> None:
    status = {
        "number": number,
        "config_hash": f"hash{number}",
        "build_key": "a",
        "name": "",
        "objective": "q",
    }
    start_record(folder, status)


@dataclass
class ThreadWorker:
    """Runs each call in a thread; `ran` are the numbers of its jobs, in order."""

    number: int
    ran: list[int] = field(default_factory=list)
    is_closed: bool = False

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        future: Future[Sequence[Outcome]] = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except WorkerDied as error:
                future.set_exception(error)

        self.ran += [job.number for job in call.args[0]]
        threading.Thread(target=work).start()
        return future

    def close(self) -> None:
        self.is_closed = True


@dataclass
class ThreadPool:
    """A pool whose workers are threads."""

    whole_groups: bool = False
    jobs_at_once: int = 1
    workers: list[ThreadWorker] = field(default_factory=list)

    def open(self, jobs: int) -> int:
        return jobs

    def start(self) -> ThreadWorker:
        self.workers.append(ThreadWorker(len(self.workers)))
        return self.workers[-1]

    def close(self) -> None: ...


@dataclass
class Events:
    """What the scheduler reports: job numbers in the order of their start, and outcomes by number."""

    started: list[int] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def states(self) -> dict[int, str]:
        return {number: outcome.state for number, outcome in self.outcomes.items()}

    def on_start(self, job: SweepJob) -> None:
        self.started.append(job.number)

    def on_end(self, job: SweepJob, outcome: Outcome) -> None:
        assert job.number not in self.outcomes, "one job was reported twice"
        self.outcomes[job.number] = outcome


def run_jobs(jobs: Sequence[SweepJob], pool: ThreadPool, run_job: RunJob, max_workers: int = 1) -> Events:
    def run_all(some_jobs: Sequence[SweepJob]) -> list[Outcome]:
        return [run_job(job) for job in some_jobs]

    return run_calls(jobs, pool, run_all, max_workers)


def run_calls(
    jobs: Sequence[SweepJob],
    pool: ThreadPool,
    call: Callable[[Sequence[SweepJob]], list[Outcome]],
    max_workers: int = 1,
) -> Events:
    events = Events()
    scheduler = Scheduler(
        jobs,
        pool,
        max_workers=max_workers,
        make_call=lambda some_jobs: partial(call, some_jobs),
        on_start=events.on_start,
        on_end=events.on_end,
    )

    scheduler.run()

    assert all(worker.is_closed for worker in pool.workers)
    return events


def finish(job: SweepJob) -> Outcome:
    return Outcome(job.number, FINISHED, value=float(job.number))


def test_one_worker_runs_the_jobs_of_one_model_after_another() -> None:
    jobs = [make_job(n, "ab"[n % 2]) for n in range(6)]

    events = run_jobs(jobs, ThreadPool(), finish)

    assert events.started == [0, 2, 4, 1, 3, 5]
    assert {n: outcome.value for n, outcome in events.outcomes.items()} == {n: float(n) for n in range(6)}


def test_two_workers_share_no_model_while_there_are_enough() -> None:
    gate = threading.Barrier(2, timeout=300)

    def run_in_step(job: SweepJob) -> Outcome:
        gate.wait()  # so that no worker is without jobs early
        return finish(job)

    pool = ThreadPool()
    run_jobs([make_job(n, "ab"[n % 2]) for n in range(8)], pool, run_in_step, max_workers=2)

    assert sorted(sorted(worker.ran) for worker in pool.workers) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_one_model_is_shared_by_idle_workers_but_for_its_last_job() -> None:
    pool = ThreadPool()

    events = run_jobs([make_job(n) for n in range(3)], pool, finish, max_workers=3)

    assert sorted(events.outcomes) == [0, 1, 2]
    assert len(pool.workers) == 2, "the third job is left to the two that have built the model"


@pytest.mark.parametrize(
    ("built", "in_use", "chosen"),
    [
        ("b", {"a"}, "b"),  # the model that it has built
        ("x", {"a"}, "c"),  # the largest group that no other worker uses
        (None, {"a", "b", "c"}, "a"),  # a share of the largest
        (None, set(), "a"),
    ],
)
def test_the_group_that_a_worker_runs_next(built: str | None, in_use: set[str], chosen: str) -> None:
    jobs = [
        make_job(0, "b"),
        *(make_job(n, "a") for n in (1, 2, 3)),
        *(make_job(n, "c") for n in (4, 5)),
    ]

    assert JobQueue(jobs).choose_group(built, in_use) == chosen


def test_the_last_job_of_a_model_is_left_to_the_worker_that_built_it() -> None:
    queue = JobQueue([make_job(0, "a")])

    assert queue.choose_group("b", {"a"}) is None
    assert queue.choose_group("a", {"a"}) == "a"


def test_a_death_ends_one_job_alone(tmp_path: Path) -> None:
    def die_in_job_2(job: SweepJob) -> Outcome:
        if job.number == 2:
            write_record(job.folder, 2)
            raise WorkerDied("killed by signal 9")
        return finish(job)

    pool = ThreadPool()
    events = run_jobs([make_job(n, folder=tmp_path) for n in range(5)], pool, die_in_job_2)

    assert events.states == {0: FINISHED, 1: FINISHED, 2: KILLED, 3: FINISHED, 4: FINISHED}
    assert events.outcomes[2].error == "killed by signal 9"
    assert events.outcomes[2].exit_code == 1
    assert len(pool.workers) == 2, "a new worker took over"
    assert read_record(tmp_path / "2").state == KILLED
    assert read_record(tmp_path / "2").error == "killed by signal 9"


def test_a_worker_that_dies_before_its_first_job_is_not_tried_again_and_again() -> None:
    def die(job: SweepJob) -> Outcome:
        raise WorkerDied("no memory")

    pool = ThreadPool()
    events = run_jobs([make_job(n) for n in range(3)], pool, die)

    assert [events.states[n] for n in range(3)] == [KILLED] * 3
    assert len(pool.workers) == 3


def test_a_death_in_a_whole_group_keeps_what_was_done_and_the_rest_runs_again(tmp_path: Path) -> None:
    jobs = [make_job(n, folder=tmp_path) for n in range(4)]
    calls: list[list[int]] = []

    def die_in_the_first_call(some_jobs: Sequence[SweepJob]) -> list[Outcome]:
        calls.append([job.number for job in some_jobs])
        if len(calls) == 1:
            write_record(jobs[0].folder, 0)
            end_record(read_record(jobs[0].folder), FINISHED)
            write_record(jobs[1].folder, 1)
            raise WorkerDied("node failed")
        return [finish(job) for job in some_jobs]

    events = run_calls(jobs, ThreadPool(whole_groups=True), die_in_the_first_call)

    assert calls == [[0, 1, 2, 3], [2, 3]]
    assert events.states == {0: FINISHED, 1: KILLED, 2: FINISHED, 3: FINISHED}


def test_a_job_that_failed_before_the_worker_died_stays_failed(tmp_path: Path) -> None:
    jobs = [make_job(n, folder=tmp_path) for n in range(2)]
    write_record(jobs[0].folder, 0)
    end_record(read_record(jobs[0].folder), "FAILED", "a reason")

    outcomes = conclude_jobs(jobs, WorkerDied("gone"))

    assert [(o.number, o.state, o.error) for o in outcomes] == [(0, "FAILED", "a reason")]


def test_files_from_another_machine_are_unpacked(tmp_path: Path) -> None:
    sent = tmp_path / "there"
    (sent / "images").mkdir(parents=True)
    (sent / "images" / "a.png").write_bytes(b"x")

    def run_elsewhere(job: SweepJob) -> Outcome:
        return Outcome(0, FINISHED, files=zip_folder(sent))

    run_jobs([make_job(0, folder=tmp_path / "here")], ThreadPool(), run_elsewhere)

    assert (tmp_path / "here" / "0" / "images" / "a.png").read_bytes() == b"x"


def test_an_error_of_the_sweep_itself_closes_every_worker() -> None:
    def fail_to_record(job: SweepJob, outcome: Outcome) -> None:
        raise RuntimeError("disk")

    def finish_all(some_jobs: Sequence[SweepJob]) -> list[Outcome]:
        return [finish(job) for job in some_jobs]

    pool = ThreadPool()
    scheduler = Scheduler(
        [make_job(0), make_job(1)],
        pool,
        max_workers=2,
        make_call=lambda some_jobs: partial(finish_all, some_jobs),
        on_start=lambda job: None,
        on_end=fail_to_record,
    )

    with pytest.raises(RuntimeError, match="disk"):
        scheduler.run()
    assert all(worker.is_closed for worker in pool.workers)


def test_an_error_that_is_not_a_death_closes_its_worker_too() -> None:
    class RefusingWorker(ThreadWorker):
        def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
            future: Future[Sequence[Outcome]] = Future()
            future.set_exception(TypeError("no pickle of that"))
            return future

    class RefusingPool(ThreadPool):
        def start(self) -> ThreadWorker:
            self.workers.append(RefusingWorker(0))
            return self.workers[-1]

    pool = RefusingPool()
    with pytest.raises(TypeError, match="no pickle"):
        run_jobs([make_job(0)], pool, finish)

    assert [worker.is_closed for worker in pool.workers] == [True]


def test_ctrl_c_ends_the_records_of_the_jobs_that_ran(tmp_path: Path) -> None:
    class EndlessWorker(ThreadWorker):
        def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
            for job in call.args[0]:
                write_record(job.folder, job.number)
            return Future()

    class InterruptedPool(ThreadPool):
        def start(self) -> ThreadWorker:
            if self.workers:
                raise KeyboardInterrupt
            self.workers.append(EndlessWorker(0))
            return self.workers[-1]

    jobs = [make_job(n, str(n), folder=tmp_path) for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, InterruptedPool(), finish, max_workers=2)

    record = read_record(tmp_path / "0")
    assert (record.state, record.error) == (KILLED, "the sweep was interrupted")
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(("keys", "expected"), [("aabb", False), ("abab", True), ("aba", True), ("a", False)])
def test_jobs_of_one_model_between_those_of_another_are_interleaved(keys, expected):
    assert is_interleaved([make_job(number, key) for number, key in enumerate(keys)]) is expected
