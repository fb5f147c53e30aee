"""`hydra/launcher=joblib`: several processes of this machine, each with a model of its own."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

import psutil

from int8run.errors import ConfigError, check_range
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture, describe_exit_code, translate_errors

PARENT_POLL_S = 1.0
EXIT_TIMEOUT_S = 10.0  # for a process that ends by itself


@dataclass(frozen=True)
class Processes:
    """Settings of `hydra/launcher=joblib`.

    Args:
        n_jobs: jobs at once; None: one per GPU named in `gpus`, else 2.
        gpus: numbers of GPUs as nvidia-smi shows them, one worker for each entry; None: every worker sees all.
        threads: CPU threads of each worker; None: the cores of this machine shared equally.
    """

    n_jobs: int | None = None
    gpus: Sequence[int | str] | None = None
    threads: int | None = None
    whole_groups: ClassVar[bool] = False
    taken: "dict[int, ProcessWorker]" = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # place -> its process

    def __post_init__(self) -> None:
        if self.n_jobs is not None:
            check_range("hydra.launcher.n_jobs", self.n_jobs, 1, 1024, whole=True)
        if self.threads is not None:
            check_range("hydra.launcher.threads", self.threads, 1, 1024, whole=True)
        if self.gpus is None:
            return
        allowed = not isinstance(self.gpus, str | int) and len(self.gpus) > 0
        if not allowed or any(
            isinstance(gpu, bool) or not isinstance(gpu, int | str) or str(gpu).startswith("-")
            for gpu in self.gpus
        ):
            raise ConfigError(
                f"hydra.launcher.gpus is {self.gpus!r}; name GPUs as nvidia-smi numbers them, such as [0,1], or null for all"
            )
        if self.n_jobs is not None and self.n_jobs != len(self.gpus):
            raise ConfigError(
                f"hydra.launcher.n_jobs is {self.n_jobs}, and gpus={list(self.gpus)} has places for {len(self.gpus)}; leave n_jobs out, "
                "or name a GPU once for every job that shares it, such as gpus=[0,0,1,1]"
            )

    @property
    def jobs_at_once(self) -> int:
        return self.n_jobs or len(self.gpus or (0, 0))

    def open(self, jobs: int) -> int:
        return min(self.jobs_at_once, jobs)

    def start(self) -> Worker:
        place = next(p for p in range(self.jobs_at_once) if p not in self.taken or self.taken[p].closed)
        self.taken[place] = ProcessWorker(self.variables(place))
        return self.taken[place]

    def variables(self, place: int) -> dict[str, str]:
        """What the process of a place finds in its environment; torch reads these once, when it is imported."""
        from joblib import cpu_count

        # not shared among the workers that there are: what is left of a sweep is measured with the threads of the rest
        threads = str(self.threads or max(1, cpu_count(only_physical_cores=True) // self.jobs_at_once))
        env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        env["MKL_DYNAMIC"] = (
            "FALSE"  # else MKL, and torch with it, takes fewer where it sees fewer physical cores
        )
        if self.gpus is not None:
            # without the order, CUDA's 0 is the fastest device
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(self.gpus[place])}
        return env

    def close(self) -> None:
        for worker in self.taken.values():
            worker.close()
        for worker in self.taken.values():
            worker.wait()


class ProcessWorker:
    """An executor of one process: a death breaks its executor, which is no other's."""

    def __init__(self, env: dict[str, str]) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        self.executor: Any = ProcessPoolExecutor(
            max_workers=1, timeout=None, env=env, initializer=set_up_worker_process, initargs=(os.getpid(),)
        )
        self.process: psutil.Process | None = None
        self.executor.submit(os.getpid).add_done_callback(self.know)
        self.latest: OutcomesFuture | None = None
        self.closed = False

    def know(self, pid: "Future[int]") -> None:
        """Take the number for this process as long as it is: another one may get it later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process = None if pid.exception() else psutil.Process(pid.result())

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        from joblib.externals.loky.process_executor import BrokenProcessPool

        try:
            self.latest = translate_errors(self.executor.submit(call), to_worker_error)
        except BrokenProcessPool as error:  # died while it had nothing to do
            self.latest = OutcomesFuture()
            self.latest.set_exception(to_worker_error(error))
        return self.latest

    def close(self) -> None:
        busy = self.latest is None or not self.latest.done()
        # one that has nothing to do leaves by itself, and takes its semaphores along: Python complains of those that a killed one leaves
        self.executor.shutdown(wait=busy, kill_workers=busy)
        self.closed = True

    def wait(self) -> None:
        """Until a closed one is gone."""
        if self.process is None:
            return
        try:
            self.process.wait(EXIT_TIMEOUT_S)
        except psutil.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.kill()
            self.process.wait()


def to_worker_error(error: BaseException) -> BaseException:
    """WorkerDied for loky's own errors; an error of the call stays as it is."""
    from joblib.externals.loky.process_executor import (
        BrokenProcessPool,
        ShutdownExecutorError,
        TerminatedWorkerError,
    )

    if isinstance(error, TerminatedWorkerError):
        code = re.search(r"\((-?\d+)\)", str(error))  # "{SIGKILL(-9)}", nowhere else to be read
        reason = describe_exit_code(int(code[1])) if code else "its process ended without a result"
        return WorkerDied(reason)
    if isinstance(error, ShutdownExecutorError):
        return WorkerDied("its process was ended by int8run")
    if isinstance(error, BrokenProcessPool):
        return WorkerDied(f"its process broke down: {' '.join(str(error).split())}")
    return error


def set_up_worker_process(parent: int) -> None:
    """First thing in a worker's process."""
    from joblib.externals.loky import process_executor

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal; the parent ends its workers
    # loky would replace a process that grew since its first call; a model that stays for the next job is no leak
    process_executor._USE_PSUTIL = False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(
            1
        )  # killed without a chance to close: nobody waits for the answer, and a GPU's memory would stay taken

    threading.Thread(target=watch, daemon=True, name="parent").start()
