"""`hydra/launcher=joblib`: several processes of this machine, each with a model of its own.

The processes are those of loky, joblib's process pool: it starts them fresh (a forked process cannot use
CUDA) and can send them functions of `__main__`. Each worker has a loky executor to itself, because loky
ends all processes of an executor when one of them dies.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import psutil

from int8run.errors import BackendError, ConfigError, check_range
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture, describe_exit_code, translate_errors
from int8run.jobs.launchers.visible_gpus import DEVICE_VARIABLES, list_visible_gpus

DEFAULT_JOBS = 2
ALL_GPUS = "all"
PARENT_POLL_S = 1.0  # how often a worker looks whether its parent is alive
EXIT_TIMEOUT_S = 10.0  # for a process that ends by itself
# loky names the exit code only in a text: "{SIGKILL(-9)}"
LOKY_EXIT_CODE = re.compile(r"\((-?\d+)\)")


@dataclass(frozen=True)
class Processes:
    """Settings of `hydra/launcher=joblib`.

    Args:
        n_jobs: jobs at once; None: one per GPU named in `gpus`, else 2.
        gpus: numbers of GPUs as nvidia-smi shows them, one worker for each entry; `all`: every GPU of this
            machine; None: every worker sees all.
        threads: CPU threads of each worker; None: the cores of this machine shared equally.
    """

    n_jobs: int | None = None
    gpus: Sequence[int | str] | str | None = None
    threads: int | None = None
    whole_groups: ClassVar[bool] = False
    # slot, 0 to jobs_at_once - 1 -> the worker that has it, or had it last
    workers: "dict[int, ProcessWorker]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n_jobs is not None:
            check_range("hydra.launcher.n_jobs", self.n_jobs, 1, 1024, whole=True)
        if self.threads is not None:
            check_range("hydra.launcher.threads", self.threads, 1, 1024, whole=True)
        if self.gpus is not None and self.gpus != ALL_GPUS:
            check_gpus(self.gpus, self.n_jobs)

    @cached_property
    def gpu_list(self) -> Sequence[int | str] | None:
        """The GPU of each worker; None: every worker sees all.

        Raises:
            BackendError: when all are asked for and there is none.
        """
        if self.gpus == ALL_GPUS:
            return list_all_gpus(self.n_jobs)
        return self.gpus

    @property
    def jobs_at_once(self) -> int:
        """One per GPU that is named, unless `n_jobs` says how many."""
        if self.n_jobs is not None:
            return self.n_jobs
        if self.gpu_list is not None:
            return len(self.gpu_list)
        return DEFAULT_JOBS

    def open(self, jobs: int) -> int:
        """Check that processes can be started; see `jobs.base.Pool`."""
        check_shared_memory()
        return min(self.jobs_at_once, jobs)

    def start(self) -> Worker:
        """Start a process in the first free slot."""
        slot = self.find_free_slot()
        self.workers[slot] = ProcessWorker(self.make_environment(slot))
        return self.workers[slot]

    def find_free_slot(self) -> int:
        """Return the first slot without an open worker; the scheduler starts no more workers than slots."""
        for slot in range(self.jobs_at_once):
            if slot not in self.workers or self.workers[slot].is_closed:
                return slot
        raise AssertionError("more workers than jobs_at_once")

    def make_environment(self, slot: int) -> dict[str, str]:
        """Return environment variables for a worker; torch reads them once, when it is imported.

        Args:
            slot: of the worker.
        """
        from joblib import cpu_count

        # divided by the number of slots, not of the workers that run: speeds of the last jobs of a sweep
        # are to be measured with the same threads as those of the first
        cores = cpu_count(only_physical_cores=True)
        threads = str(self.threads or max(1, cores // self.jobs_at_once))
        environment = {
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # else MKL, and torch with it, uses fewer threads where it sees fewer physical cores
            "MKL_DYNAMIC": "FALSE",
        }
        if self.gpu_list is not None:
            if self.gpus != ALL_GPUS:
                # numbers are nvidia-smi's; CUDA's own 0 is the fastest device, and so is 0 of a variable that
                # this process was given, whose order the workers are given, too
                environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            for name in DEVICE_VARIABLES:
                environment[name] = str(self.gpu_list[slot])
        return environment

    def close(self) -> None:
        """End all processes, and wait until they are gone."""
        for worker in self.workers.values():
            worker.close()
        for worker in self.workers.values():
            worker.wait()


def check_shared_memory() -> None:
    """Raise BackendError where processes cannot share locks, which Linux keeps in /dev/shm."""
    from joblib.externals.loky.backend.context import get_context

    try:
        get_context("loky").Lock()
    except OSError as error:
        raise BackendError(
            "hydra/launcher=joblib needs shared memory for its processes, and there is none here (/dev/shm: "
            f"{error.strerror or error}); give the container some (docker run --shm-size=1g), or leave the "
            "launcher out"
        ) from error


def list_all_gpus(n_jobs: int | None) -> list[int | str]:
    """Name every GPU that torch sees, in turn where there are more jobs at once.

    Args:
        n_jobs: jobs at once; None: one per GPU.

    Raises:
        BackendError: when there is none.
    """
    from int8run.utils.hardware import count_devices, has_device

    counts = {kind: count_devices(kind) for kind in ("cuda", "xpu") if has_device(kind)}
    kind = max(counts, key=counts.__getitem__, default="")
    if not counts.get(kind):
        raise BackendError(
            f"hydra.launcher.gpus={ALL_GPUS} finds no GPU here; leave it out to run the jobs on the CPU"
        )
    gpus = list_visible_gpus(kind, counts[kind])
    return [gpus[number % len(gpus)] for number in range(n_jobs or len(gpus))]


def check_gpus(gpus: Sequence[int | str], n_jobs: int | None) -> None:
    """Raise ConfigError unless `gpus` is a list of GPUs that has a place for each of `n_jobs` jobs."""
    is_list = not isinstance(gpus, str | int) and len(gpus) > 0
    if not is_list or not all(is_gpu_number(gpu) for gpu in gpus):
        raise ConfigError(
            f"hydra.launcher.gpus is {gpus!r}; name GPUs as nvidia-smi numbers them, such as [0,1], "
            f"{ALL_GPUS} for one job on each, or null to let every job see all"
        )
    if n_jobs is not None and n_jobs != len(gpus):
        raise ConfigError(
            f"hydra.launcher.n_jobs is {n_jobs}, and gpus={list(gpus)} has places for "
            f"{len(gpus)}; leave n_jobs out, or name a GPU once for every job that shares it, "
            "such as gpus=[0,0,1,1]"
        )


def is_gpu_number(gpu: object) -> bool:
    """Whether CUDA_VISIBLE_DEVICES takes a value: a number, or the start of a GPU's UUID."""
    if isinstance(gpu, bool) or not isinstance(gpu, int | str):
        return False
    return not str(gpu).startswith("-")


class ProcessWorker:
    """A loky executor of one process.

    Args:
        environment: variables for the process.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        self.executor: Any = ProcessPoolExecutor(
            max_workers=1,
            timeout=None,
            env=environment,
            initializer=set_up_worker_process,
            initargs=(os.getpid(),),
        )
        self.process: psutil.Process | None = None
        self.executor.submit(os.getpid).add_done_callback(self.remember_process)
        self.latest: OutcomesFuture | None = None
        self.is_closed = False

    def remember_process(self, pid: "Future[int]") -> None:
        """Look the process up while it runs: later, another process may have its number."""
        if pid.exception() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process = psutil.Process(pid.result())

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        """Start a call in the process; see `jobs.base.Worker`."""
        from joblib.externals.loky.process_executor import BrokenProcessPool

        try:
            self.latest = translate_errors(self.executor.submit(call), to_worker_error)
        except BrokenProcessPool as error:  # it died while it had nothing to do
            self.latest = OutcomesFuture()
            self.latest.set_exception(to_worker_error(error))
        return self.latest

    def close(self) -> None:
        """End the process; one that runs a call is killed."""
        # An idle process is not killed, so that it removes its semaphores: Python complains of those left
        # behind.
        is_busy = self.latest is None or not self.latest.done()
        self.executor.shutdown(wait=is_busy, kill_workers=is_busy)
        self.is_closed = True

    def wait(self) -> None:
        """Wait until a closed worker's process is gone; kill it when it does not leave."""
        if self.process is None:
            return
        try:
            self.process.wait(EXIT_TIMEOUT_S)
        except psutil.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.kill()
            self.process.wait()


def to_worker_error(error: BaseException) -> BaseException:
    """Return WorkerDied for one of loky's errors; an error of the call stays as it is."""
    from joblib.externals.loky.process_executor import (
        BrokenProcessPool,
        ShutdownExecutorError,
        TerminatedWorkerError,
    )

    if isinstance(error, TerminatedWorkerError):
        exit_code = LOKY_EXIT_CODE.search(str(error))
        if exit_code is None:
            return WorkerDied("its process ended without a result")
        return WorkerDied(describe_exit_code(int(exit_code[1])))
    if isinstance(error, ShutdownExecutorError):
        return WorkerDied("its process was ended by int8run")
    if isinstance(error, BrokenProcessPool):
        return WorkerDied(f"its process broke down: {' '.join(str(error).split())}")
    return error


def set_up_worker_process(parent: int) -> None:
    """The first call in a worker's process.

    Args:
        parent: number of the process that started it.
    """
    from joblib.externals.loky import process_executor

    # Ctrl-C reaches every process of the terminal; the parent ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # loky would replace a process that grew since its first call, and a model that stays for the next job
    # is no leak
    process_executor._USE_PSUTIL = False

    def exit_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        # the parent was killed and could not close its workers: nobody waits for the result, and a GPU's
        # memory would stay taken
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True, name="parent").start()
