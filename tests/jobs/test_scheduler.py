"""Jobs to workers: who gets which, what a death leaves, what comes back from other machines."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from int8run.jobs.base import Outcome, SweepJob, WorkerDied
from int8run.jobs.scheduler import JobQueue, fail_jobs, run_scheduled
from int8run.jobs.worker import zip_folder
from int8run.tracking.run_record import FINISHED, KILLED, end_record, read_record, start_record


def job(number: int, key: str = "a", folder: Path = Path("/none")) -> SweepJob:
    return SweepJob(number, (), None, folder / str(number), f"hash{number}", key)


def record(folder: Path, number: int) -> None:
    start_record(
        folder,
        {"number": number, "config_hash": f"hash{number}", "build_key": "a", "name": "", "objective": "q"},
    )


@dataclass
class Seat:
    """A worker of threads; what it ran, in order."""

    number: int
    pool: "Threads"
    ran: list[int] = field(default_factory=list)
    closed: bool = False

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        future: Future[Sequence[Outcome]] = Future()

        def work() -> None:
            try:
                future.set_result(call())
            except WorkerDied as error:
                future.set_exception(error)

        self.ran += [j.number for j in call.args[0]]
        threading.Thread(target=work).start()
        return future

    def close(self) -> None:
        self.closed = True


@dataclass
class Threads:
    """A pool whose workers are threads."""

    size: int = 1
    whole_groups: bool = False
    jobs_at_once: int = 1
    seats: list[Seat] = field(default_factory=list)

    def open(self, jobs: int) -> int:
        return self.size

    def start(self) -> Seat:
        self.seats.append(Seat(len(self.seats), self))
        return self.seats[-1]

    def close(self) -> None: ...


def run(
    jobs: Sequence[SweepJob], pool: Threads, work: Callable[[SweepJob], Outcome]
) -> tuple[list[int], dict[int, Outcome]]:
    """Dispatch; numbers in the order in which they were started, and the outcomes."""
    begun: list[int] = []
    ended: dict[int, Outcome] = {}

    def tell(j: SweepJob, outcome: Outcome) -> None:
        assert j.number not in ended, "told of one job twice"
        ended[j.number] = outcome

    do = lambda some: [work(j) for j in some]  # noqa: E731
    run_scheduled(jobs, pool, pool.size, lambda some: partial(do, some), lambda j: begun.append(j.number), tell)
    assert all(seat.closed for seat in pool.seats)
    return begun, ended


def fine(j: SweepJob) -> Outcome:
    return Outcome(j.number, FINISHED, float(j.number))


def test_one_worker_takes_the_jobs_of_one_model_after_another() -> None:
    jobs = [job(n, "ab"[n % 2]) for n in range(6)]
    begun, ended = run(jobs, Threads(1), fine)
    assert begun == [0, 2, 4, 1, 3, 5]
    assert {n: o.value for n, o in ended.items()} == {n: float(n) for n in range(6)}


def test_two_workers_share_no_model_while_there_are_enough() -> None:
    gate = threading.Barrier(2, timeout=10)

    def work(j: SweepJob) -> Outcome:
        gate.wait()  # in step, so that nobody runs out of work early
        return fine(j)

    pool = Threads(2)
    run([job(n, "ab"[n % 2]) for n in range(8)], pool, work)
    assert sorted(sorted(seat.ran) for seat in pool.seats) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_one_model_is_shared_by_idle_workers_but_for_its_last_job() -> None:
    pool = Threads(3)
    _, ended = run([job(n) for n in range(3)], pool, fine)
    assert sorted(ended) == [0, 1, 2]
    assert len(pool.seats) == 2, "the third job is left to the two that have built the model"


@pytest.mark.parametrize(
    ("built", "in_use", "chosen"),
    [
        ("b", {"a"}, "b"),  # what it has built
        ("x", {"a"}, "c"),  # the largest that nobody works on
        (None, {"a", "b", "c"}, "a"),  # a share of the largest
        (None, set(), "a"),
    ],
)
def test_whose_turn_it_is(built: str | None, in_use: set[str], chosen: str) -> None:
    queue = JobQueue([job(0, "b"), *(job(n, "a") for n in (1, 2, 3)), *(job(n, "c") for n in (4, 5))])
    assert queue.choose(built, in_use) == chosen


def test_the_last_job_of_a_model_is_left_to_who_built_it() -> None:
    queue = JobQueue([job(0, "a")])
    assert queue.choose("b", {"a"}) is None and queue.choose("a", {"a"}) == "a"


def test_a_death_is_one_jobs_alone(tmp_path: Path) -> None:
    def work(j: SweepJob) -> Outcome:
        if j.number == 2:
            record(j.folder, 2)
            raise WorkerDied("killed by signal 9")
        return fine(j)

    pool = Threads(1)
    _, ended = run([job(n, folder=tmp_path) for n in range(5)], pool, work)
    assert {n: o.state for n, o in ended.items()} == {
        0: FINISHED,
        1: FINISHED,
        2: KILLED,
        3: FINISHED,
        4: FINISHED,
    }
    assert ended[2].error == "killed by signal 9" and ended[2].exit_code == 1
    assert len(pool.seats) == 2, "a new worker took over"
    assert (
        read_record(tmp_path / "2").state == KILLED
        and read_record(tmp_path / "2").error == "killed by signal 9"
    )


def test_a_worker_that_dies_before_its_first_job_is_not_tried_for_ever() -> None:
    def work(j: SweepJob) -> Outcome:
        raise WorkerDied("no memory")

    pool = Threads(1)
    _, ended = run([job(n) for n in range(3)], pool, work)
    assert [ended[n].state for n in range(3)] == [KILLED] * 3 and len(pool.seats) == 3


def test_of_a_whole_group_the_dead_keep_what_was_done_and_the_rest_runs_again(tmp_path: Path) -> None:
    jobs = [job(n, folder=tmp_path) for n in range(4)]
    calls: list[list[int]] = []

    def whole(some: Sequence[SweepJob]) -> list[Outcome]:
        calls.append([j.number for j in some])
        if len(calls) == 1:
            record(jobs[0].folder, 0)
            end_record(read_record(jobs[0].folder), FINISHED)
            record(jobs[1].folder, 1)
            raise WorkerDied("node failed")
        return [fine(j) for j in some]

    ended: dict[int, Outcome] = {}
    run_scheduled(
        jobs,
        Threads(1, whole_groups=True),
        1,
        lambda s: partial(whole, s),
        lambda j: None,
        lambda j, o: ended.update({j.number: o}),
    )
    assert calls == [[0, 1, 2, 3], [2, 3]]
    assert {n: o.state for n, o in ended.items()} == {0: FINISHED, 1: KILLED, 2: FINISHED, 3: FINISHED}


def test_a_job_that_failed_before_the_worker_died_stays_failed(tmp_path: Path) -> None:
    jobs = [job(n, folder=tmp_path) for n in range(2)]
    record(jobs[0].folder, 0)
    end_record(read_record(jobs[0].folder), "FAILED", "a reason")
    outcomes = fail_jobs(jobs, WorkerDied("gone"))
    assert [(o.number, o.state, o.error) for o in outcomes] == [(0, "FAILED", "a reason")]


def test_files_from_another_machine_are_unpacked(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "images").mkdir(parents=True)
    (there / "images" / "a.png").write_bytes(b"x")
    run([job(0, folder=tmp_path / "here")], Threads(1), lambda j: Outcome(0, FINISHED, files=zip_folder(there)))
    assert (tmp_path / "here" / "0" / "images" / "a.png").read_bytes() == b"x"


def test_an_error_of_the_sweep_itself_closes_everything() -> None:
    pool = Threads(2)

    def work(j: SweepJob) -> Outcome:
        return fine(j)

    def broken(j: SweepJob, outcome: Outcome) -> None:
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        run_scheduled(
            [job(0), job(1)],
            pool,
            2,
            lambda s: partial(lambda some: [work(j) for j in some], s),
            lambda j: None,
            broken,
        )
    assert all(seat.closed for seat in pool.seats)


def test_an_error_that_is_no_death_closes_its_worker_too() -> None:
    class Refuses(Seat):
        def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
            future: Future[Sequence[Outcome]] = Future()
            future.set_exception(TypeError("no pickle of that"))
            return future

    class Pool(Threads):
        def start(self) -> Seat:
            self.seats.append(Refuses(0, self))
            return self.seats[-1]

    pool = Pool(1)
    with pytest.raises(TypeError, match="no pickle"):
        run([job(0)], pool, fine)
    assert [seat.closed for seat in pool.seats] == [True]


def test_ctrl_c_ends_the_records_of_the_jobs_that_ran(tmp_path: Path) -> None:
    class Waits(Seat):
        def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
            for job in call.args[0]:
                record(job.folder, job.number)
            return Future()

    class Pool(Threads):
        def start(self) -> Seat:
            if self.seats:
                raise KeyboardInterrupt
            self.seats.append(Waits(0, self))
            return self.seats[-1]

    with pytest.raises(KeyboardInterrupt):
        run([job(n, str(n), folder=tmp_path) for n in range(3)], Pool(2), fine)
    left = read_record(tmp_path / "0")
    assert (left.state, left.error) == (KILLED, "the sweep was interrupted") and not (tmp_path / "1").exists()
