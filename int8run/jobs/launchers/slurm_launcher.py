"""`hydra/launcher=slurm`: the jobs of one built model are one job of a Slurm cluster."""

import logging
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from int8run.errors import ConfigError, check_range, suggest_similar
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture, describe_exit_code

log = logging.getLogger(__name__)
RESULT_POLL_S = 2.0  # for answers, in the folder
QUEUE_POLL_S = 20.0  # for jobs that are gone, with squeue
RESULT_GRACE_S = 30.0  # a file that was written on another machine may be seen later than the end of its job
WARN_AFTER_S = 60.0  # that a job waits, and why
INSTALL_SUBMITIT = "hydra/launcher=slurm needs submitit on this machine: pip install 'int8run[slurm]'"
SLURM_PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
# of sbatch; a config that somebody shared may choose a queue, and may not run code or write files of its choice
SBATCH_OPTIONS = (
    "account",
    "begin",
    "comment",
    "constraint",
    "contiguous",
    "cpus-per-gpu",
    "deadline",
    "dependency",
    "exclude",
    "exclusive",
    "gpu-bind",
    "gpu-freq",
    "gres",
    "hint",
    "licenses",
    "mail-type",
    "mail-user",
    "mem-per-cpu",
    "mem-per-gpu",
    "mincpus",
    "nice",
    "nodelist",
    "prefer",
    "priority",
    "qos",
    "reservation",
    "switches",
    "threads-per-core",
    "tmp",
    "wckey",
)
STATE_HINTS = {
    "TIMEOUT": "; hydra.launcher.time_min allows more",
    "OUT_OF_MEMORY": "; hydra.launcher.mem_gb asks for more",
    "PREEMPTED": ": another job took its place",
    "NODE_FAIL": ": its machine is gone",
}


@dataclass(frozen=True)
class Slurm:
    """Settings of `hydra/launcher=slurm`, for each Slurm job.

    Args:
        partition: None: the cluster's default.
        time_min: minutes, for all jobs of one model together.
        gpus: GPUs of one machine.
        cpus: cores, also the threads of each job.
        mem_gb: memory of the machine in GiB; None: the cluster's default.
        workers: Slurm jobs at once, waiting ones included; None: no limit of ours.
        extra: further options of sbatch, such as {"account": "vision"}.
        folder: for the scripts and logs of Slurm jobs, on a disk that all machines share.
    """

    partition: str | None = None
    time_min: int = 60
    gpus: int = 1
    cpus: int = 4
    mem_gb: float | None = None
    workers: int | None = None
    extra: Mapping[str, Any] | None = None
    folder: str = ".slurm"
    whole_groups: ClassVar[bool] = True
    jobs_at_once: ClassVar[int] = 1  # Slurm gives each its own cores and GPUs
    watched: "JobWatcher" = field(default_factory=lambda: JobWatcher(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.partition is not None and not re.fullmatch(r"[\w.,-]+", str(self.partition)):
            raise ConfigError(
                f"hydra.launcher.partition is {self.partition!r}; give a partition's name, as sinfo shows it"
            )
        check_range("hydra.launcher.time_min", self.time_min, 1, 525600, whole=True)
        check_range("hydra.launcher.gpus", self.gpus, 0, 1024, whole=True)
        check_range("hydra.launcher.cpus", self.cpus, 1, 4096, whole=True)
        if self.mem_gb is not None:
            check_range("hydra.launcher.mem_gb", self.mem_gb, 0.1, 1e6)
        if self.workers is not None:
            check_range("hydra.launcher.workers", self.workers, 1, 100000, whole=True)
        for name, value in (self.extra or {}).items():
            if str(name).replace("_", "-") not in SBATCH_OPTIONS:
                near = suggest_similar(str(name), SBATCH_OPTIONS)
                raise ConfigError(
                    f"hydra.launcher.extra names {name!r}; {near}allowed of sbatch's options are {', '.join(SBATCH_OPTIONS)}"
                )
            check_one_line(f"hydra.launcher.extra.{name}", value)
        check_one_line("hydra.launcher.folder", self.folder)

    def open(self, jobs: int) -> int:
        try:
            import submitit  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(INSTALL_SUBMITIT) from error
        missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
        if missing:
            raise ConfigError(
                f"hydra/launcher=slurm finds no {', '.join(missing)} here; start int8run on a machine that submits jobs to your Slurm "
                "cluster (a login node), or choose hydra/launcher=joblib for this machine alone"
            )
        self.watched.begin()
        return min(jobs, self.workers or jobs)

    def start(self) -> Worker:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(folder=Path(self.folder).absolute(), max_num_timeout=0)
        executor.update_parameters(**self.parameters())
        return SlurmWorker(executor, self.watched)

    def parameters(self) -> dict[str, Any]:
        """What submitit writes into the script."""
        threads = [
            f"export {name}={self.cpus}"
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        ]
        return {
            "job_name": "int8run",
            "partition": self.partition,
            "time": self.time_min,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}M",
            "setup": threads,
            "use_srun": False,  # a step of srun gets one core of the job's since Slurm 22.05
            # Slurm would run jobs again that ended already; the dispatcher goes on where the group stopped
            "additional_parameters": {"no-requeue": True, **(self.extra or {})},
        }

    def close(self) -> None:
        self.watched.end()


class SlurmWorker:
    """One Slurm job after the other."""

    def __init__(self, executor: Any, watched: "JobWatcher") -> None:
        self.executor = executor
        self.watched = watched
        self.latest: PendingJob | None = None

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            job = self.executor.submit(run_call, call)
        except (FailedJobError, FailedSubmissionError) as error:
            words = " ".join(str(error).split())
            if self.watched.accepted == 0:  # nothing will be: a setting is wrong
                hint = (
                    "hydra.launcher.gpus=0 asks for no GPU"
                    if "gres" in words
                    else "see the settings of hydra.launcher"
                )
                raise ConfigError(f"Slurm does not take the job: {words}; {hint}") from error
            refused: OutcomesFuture = OutcomesFuture()
            refused.set_exception(WorkerDied(f"Slurm did not take the job: {words}"))
            return refused
        self.latest = self.watched.add(job)
        log.info("Slurm job %s submitted; its log: %s", job.job_id, job.paths.stdout)
        return self.latest.answer

    def close(self) -> None:
        if self.latest is not None:
            self.watched.cancel(self.latest)


def run_call(call: Callable[[], Sequence[Outcome]]) -> tuple[Sequence[Outcome] | None, Exception | None]:
    """What the process of a Slurm job runs."""
    # submitit outlives the first, for up to half a minute, and raises an error in the middle of a job at the second
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - submitit keeps the text of an error only; it is raised where the answer is read
        return None, error


@dataclass
class PendingJob:
    """A Slurm job whose answer is awaited. Times are of time.monotonic()."""

    job: Any
    submitted: float
    answer: OutcomesFuture = field(default_factory=OutcomesFuture)
    gone: float | None = None  # when it was first missing in the queue
    told: bool = False


class JobWatcher:
    """Looks after all Slurm jobs of a sweep in one thread: an answer is a file, a death is a job that left the queue without one."""

    def __init__(self) -> None:
        self.waiting: dict[str, PendingJob] = {}
        self.accepted = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        self.thread = threading.Thread(target=self.run, daemon=True, name="slurm")
        self.thread.start()

    def end(self) -> None:
        self.stop.set()
        for entry in list(self.waiting.values()):
            self.cancel(entry)
        if self.thread is not None:
            self.thread.join()

    def add(self, job: Any) -> PendingJob:
        entry = PendingJob(job, time.monotonic())
        with self.lock:
            self.waiting[job.job_id] = entry
            self.accepted += 1
        return entry

    def cancel(self, entry: PendingJob) -> None:
        """End a Slurm job that has not answered."""
        if self.take(entry):
            run_program("scancel", entry.job.job_id)
            entry.answer.set_exception(WorkerDied("its Slurm job was ended by int8run"))

    def take(self, entry: PendingJob) -> bool:
        """Whether the answer of an entry is the caller's to give: each has one."""
        with self.lock:
            return self.waiting.pop(entry.job.job_id, None) is not None

    def run(self) -> None:
        try:
            self.look()
        except Exception as error:  # noqa: BLE001 - whoever waits gets it, and does not wait for ever
            for entry in list(self.waiting.values()):
                if self.take(entry):
                    entry.answer.set_exception(error)

    def look(self) -> None:
        """Until the end: the folder often, the queue at times."""
        asked = time.monotonic()
        while not self.stop.wait(RESULT_POLL_S):
            for entry in list(self.waiting.values()):
                if entry.job.paths.result_pickle.exists() and self.take(entry):
                    deliver_result(entry)
            if self.waiting and time.monotonic() - asked >= QUEUE_POLL_S:
                asked = time.monotonic()
                self.look_at_queue(asked)

    def look_at_queue(self, now: float) -> None:
        entries = [entry for entry in list(self.waiting.values()) if now - entry.submitted >= QUEUE_POLL_S]
        queue = read_queue()
        if queue is None:  # Slurm does not answer at the moment; its jobs run on
            return
        for entry in entries:
            reason = queue.get(entry.job.job_id)
            if reason is not None:
                entry.gone = None
                if reason and not entry.told and now - entry.submitted >= WARN_AFTER_S:
                    entry.told = True
                    log.warning("Slurm job %s waits: %s", entry.job.job_id, reason)
                continue
            entry.gone = entry.gone or now
            word, told = describe_job_end(entry.job)
            late = word in ("COMPLETED", None) and now - entry.gone < RESULT_GRACE_S
            if not late and not entry.job.paths.result_pickle.exists() and self.take(entry):
                entry.answer.set_exception(WorkerDied(told))


def deliver_result(entry: PendingJob) -> None:
    """Hand over what a Slurm job wrote."""
    from submitit.core.utils import FailedJobError

    try:
        outcomes, error = entry.job.result()
    except FailedJobError as failure:
        # not an error of a job: its process could not begin, for instance where it finds no int8run
        last = str(failure).split("\n" + "-" * 22)[1].strip().splitlines()[-1]
        outcomes, error = (
            None,
            WorkerDied(
                f"Slurm job {entry.job.job_id} could not begin: {last}; its log: {entry.job.paths.stderr}"
            ),
        )
    except Exception as unreadable:  # noqa: BLE001 - raised where the answer is read
        outcomes, error = None, unreadable
    if error is None:
        entry.answer.set_result(outcomes)
    else:
        entry.answer.set_exception(error)


def read_queue() -> dict[str, str] | None:
    """Slurm job -> why it waits, an empty string for one that does not; None when Slurm does not answer."""
    text = run_program("squeue", "--me", "--noheader", "--format=%i|%T|%r")
    if text is None:
        return None
    rows = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    return {name: reason if state == "PENDING" else "" for name, state, reason in rows}


def describe_job_end(job: Any) -> tuple[str | None, str]:
    """Slurm's own word for it, None where it has forgotten; and a sentence."""
    text = run_program("scontrol", "--oneliner", "show", "job", job.job_id) or ""
    found = re.search(r"\bJobState=(\w+)", text)
    exit_code = re.search(r"\bExitCode=(\d+):", text)
    if found is None and shutil.which(
        "sacct"
    ):  # the controller forgets a job after minutes, the accounting does not
        text = (
            run_program(
                "sacct",
                "--allocations",
                "--noheader",
                "--parsable2",
                "--format=State,ExitCode",
                "--jobs",
                job.job_id,
            )
            or ""
        )
        found, exit_code = re.match(r"(\w+)", text), re.search(r"\|(\d+):", text)
    word = found[1] if found else None
    killed = (
        f": {describe_exit_code(128 - int(exit_code[1]))}" if exit_code and int(exit_code[1]) > 128 else ""
    )  # as a shell counts signals
    reason = f"{word}{STATE_HINTS.get(word, killed)}" if word else "gone from the queue"
    return word, f"Slurm job {job.job_id} ended without an answer: {reason}; its log: {job.paths.stderr}"


def run_program(*command: str) -> str | None:
    """What a program of Slurm prints; None when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def check_one_line(name: str, value: object) -> None:
    """Raise ConfigError for a text that would be more than one line of a script."""
    if not isinstance(value, str | int | float) or re.search(r"[\x00-\x1f]", str(value)):
        raise ConfigError(
            f"{name} is {value!r}; allowed is a text of one line, a number, or true for an option without a value"
        )
