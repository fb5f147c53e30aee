"""`hydra/launcher=slurm`: the jobs of one built model are one job of a Slurm cluster.

submitit writes the script of a Slurm job, submits it, and pickles its result into a file. A thread of the
parent waits for these files and looks after the queue. submitit is imported when a sweep starts, so that
int8run works without it.
"""

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
RESULT_POLL_S = 2.0  # how often the folder is searched for results
QUEUE_POLL_S = 20.0  # how often squeue is asked for jobs that are gone
# a file that was written on another machine may be seen later than the end of its job
RESULT_GRACE_S = 30.0
WARN_AFTER_S = 60.0  # that a job waits
INSTALL_SUBMITIT = "hydra/launcher=slurm needs submitit on this machine: pip install 'int8run[slurm]'"
SLURM_PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
# a config that somebody shared may choose a queue, and may not run code or write files of its choice
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
# what the user can do about, or should know of, a state of Slurm
STATE_HINTS = {
    "TIMEOUT": "; hydra.launcher.time_min allows more",
    "OUT_OF_MEMORY": "; hydra.launcher.mem_gb asks for more",
    "PREEMPTED": ": another job took its place",
    "NODE_FAIL": ": its machine is gone",
}
PARTITION = re.compile(r"[\w.,-]+")
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f]")


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
    watcher: "JobWatcher" = field(default_factory=lambda: JobWatcher(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.partition is not None and not PARTITION.fullmatch(str(self.partition)):
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
            check_sbatch_option(str(name), value)
        check_one_line("hydra.launcher.folder", self.folder)

    def open(self, jobs: int) -> int:
        """Check that jobs can be submitted from here; see `jobs.base.Pool`."""
        try:
            import submitit  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(INSTALL_SUBMITIT) from error
        missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
        if missing:
            raise ConfigError(
                f"hydra/launcher=slurm finds no {', '.join(missing)} here; start int8run on a machine that "
                "submits jobs to your Slurm cluster (a login node), or choose hydra/launcher=joblib for "
                "this machine alone"
            )
        self.watcher.start()
        return min(jobs, self.workers or jobs)

    def start(self) -> Worker:
        """Return a worker; a Slurm job is submitted with each of its calls."""
        from submitit import SlurmExecutor

        folder = Path(self.folder).absolute()
        # submitit pickles a job with all of its settings there, passwords included
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        executor = SlurmExecutor(folder=folder, max_num_timeout=0)
        executor.update_parameters(**self.make_parameters())
        return SlurmWorker(executor, self.watcher)

    def make_parameters(self) -> dict[str, Any]:
        """Return what submitit writes into the script of a Slurm job."""
        thread_variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        memory = None
        if self.mem_gb is not None:
            memory = f"{round(self.mem_gb * 1024)}M"
        return {
            "job_name": "int8run",
            "partition": self.partition,
            "time": self.time_min,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": memory,
            "setup": [f"export {name}={self.cpus}" for name in thread_variables],
            "use_srun": False,  # since Slurm 22.05, a step of srun gets one of the job's cores
            # a requeued Slurm job would run jobs again that have ended; the scheduler goes on where the
            # group stopped
            "additional_parameters": {"no-requeue": True, **(self.extra or {})},
        }

    def close(self) -> None:
        """Cancel the Slurm jobs that are left."""
        self.watcher.stop()


def check_sbatch_option(name: str, value: object) -> None:
    """Raise ConfigError unless an entry of `extra` is an allowed option of sbatch with a plain value."""
    if name.replace("_", "-") not in SBATCH_OPTIONS:
        raise ConfigError(
            f"hydra.launcher.extra names {name!r}; {suggest_similar(name, SBATCH_OPTIONS)}allowed of "
            f"sbatch's options are {', '.join(SBATCH_OPTIONS)}"
        )
    check_one_line(f"hydra.launcher.extra.{name}", value)


def check_one_line(name: str, value: object) -> None:
    """Raise ConfigError for a value that would be more than one line of a script."""
    is_plain = isinstance(value, str | int | float)
    if not is_plain or CONTROL_CHARACTER.search(str(value)):
        raise ConfigError(
            f"{name} is {value!r}; allowed is a text of one line, a number, or true for an option without "
            "a value"
        )


class SlurmWorker:
    """Runs each call as a Slurm job of its own.

    Args:
        executor: submitit's.
        watcher: waits for the results of all workers.
    """

    def __init__(self, executor: Any, watcher: "JobWatcher") -> None:
        self.executor = executor
        self.watcher = watcher
        self.latest: PendingJob | None = None

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        """Submit a Slurm job.

        Raises:
            ConfigError: when Slurm does not accept the first job of a sweep: it would accept none, a
                setting is wrong.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            job = self.executor.submit(run_call, call)
        except (FailedJobError, FailedSubmissionError) as error:
            reason = " ".join(str(error).split())
            if self.watcher.num_accepted == 0:
                hint = "see the settings of hydra.launcher"
                if "gres" in reason:  # what sbatch calls GPUs
                    hint = "hydra.launcher.gpus=0 asks for no GPU"
                raise ConfigError(f"Slurm does not take the job: {reason}; {hint}") from error
            rejected: OutcomesFuture = OutcomesFuture()
            rejected.set_exception(WorkerDied(f"Slurm did not take the job: {reason}"))
            return rejected
        self.latest = self.watcher.add_job(job)
        log.info("Slurm job %s submitted; its log: %s", job.job_id, job.paths.stdout)
        return self.latest.future

    def close(self) -> None:
        """Cancel the Slurm job of the latest call, unless it has ended."""
        if self.latest is not None:
            self.watcher.cancel_job(self.latest)


def run_call(call: Callable[[], Sequence[Outcome]]) -> tuple[Sequence[Outcome] | None, Exception | None]:
    """What the process of a Slurm job runs.

    Returns:
        The result of the call, or the error that it raised.
    """
    # submitit survives the first signal for up to half a minute, and at the second raises an error in mid-job
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - submitit would keep its text only; deliver_result raises it
        return None, error


@dataclass
class PendingJob:
    """A Slurm job that has not delivered its result. Times are of time.monotonic().

    Args:
        job: submitit's.
        submitted: when it was submitted.
        future: of its result.
        missing_since: when it was first missing in the queue.
        has_warned: that it waits in the queue.
    """

    job: Any
    submitted: float
    future: OutcomesFuture = field(default_factory=OutcomesFuture)
    missing_since: float | None = None
    has_warned: bool = False


class JobWatcher:
    """Looks after all Slurm jobs of a sweep in one thread.

    A result is a file; a death is a job that has left the queue without one.
    """

    def __init__(self) -> None:
        self.pending: dict[str, PendingJob] = {}
        self.num_accepted = 0  # by Slurm
        self.lock = threading.Lock()
        self.stop_event = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(target=self.run, daemon=True, name="slurm")
        self.thread.start()

    def stop(self) -> None:
        """Cancel all jobs and end the thread."""
        self.stop_event.set()
        for entry in self.list_pending():
            self.cancel_job(entry)
        if self.thread is not None:
            self.thread.join()

    def list_pending(self) -> list[PendingJob]:
        """Return a copy, because other threads add and take jobs meanwhile."""
        return list(self.pending.values())

    def add_job(self, job: Any) -> PendingJob:
        """Wait for a job of submitit that Slurm has accepted."""
        entry = PendingJob(job, submitted=time.monotonic())
        with self.lock:
            self.pending[job.job_id] = entry
            self.num_accepted += 1
        return entry

    def cancel_job(self, entry: PendingJob) -> None:
        """End a Slurm job that has not delivered its result."""
        if self.take_job(entry):
            run_program("scancel", entry.job.job_id)
            entry.future.set_exception(WorkerDied("its Slurm job was ended by int8run"))

    def take_job(self, entry: PendingJob) -> bool:
        """Stop waiting for a job; whether the caller is the first to do so, and so is to set its future."""
        with self.lock:
            return self.pending.pop(entry.job.job_id, None) is not None

    def run(self) -> None:
        """What the thread does."""
        try:
            self.watch_jobs()
        except Exception as error:  # noqa: BLE001 - raised where the results are awaited, which would wait for ever
            for entry in self.list_pending():
                if self.take_job(entry):
                    entry.future.set_exception(error)

    def watch_jobs(self) -> None:
        """Until the watcher is stopped, search for results often, and look at the queue at times."""
        queue_checked = time.monotonic()
        while not self.stop_event.wait(RESULT_POLL_S):
            self.collect_results()
            now = time.monotonic()
            if self.pending and now - queue_checked >= QUEUE_POLL_S:
                queue_checked = now
                self.check_queue(now)

    def collect_results(self) -> None:
        """Deliver the results that have been written."""
        for entry in self.list_pending():
            if entry.job.paths.result_pickle.exists() and self.take_job(entry):
                deliver_result(entry)

    def check_queue(self, now: float) -> None:
        """Find jobs that wait, and jobs that left the queue without a result.

        Args:
            now: of time.monotonic().
        """
        # those that squeue may not know yet are left out
        entries = [entry for entry in self.list_pending() if now - entry.submitted >= QUEUE_POLL_S]
        queue = read_queue()
        if queue is None:  # Slurm does not answer at the moment; its jobs run on
            return
        for entry in entries:
            if entry.job.job_id in queue:
                entry.missing_since = None
                warn_waiting(entry, queue[entry.job.job_id], now)
            else:
                self.check_missing_job(entry, now)

    def check_missing_job(self, entry: PendingJob, now: float) -> None:
        """Report the death of a job that left the queue, unless its result may still arrive."""
        if entry.missing_since is None:
            entry.missing_since = now
        end = read_job_end(entry.job.job_id)
        may_have_result = end is None or end.state == "COMPLETED"
        if may_have_result and now - entry.missing_since < RESULT_GRACE_S:
            return
        if entry.job.paths.result_pickle.exists():
            return  # delivered at the next search
        if self.take_job(entry):
            entry.future.set_exception(WorkerDied(describe_job_end(entry.job, end)))


def warn_waiting(entry: PendingJob, reason: str, now: float) -> None:
    """Warn, once, that a job waits in the queue.

    Args:
        entry: the job.
        reason: why it waits; empty for a job that does not.
        now: of time.monotonic().
    """
    if not reason or entry.has_warned:
        return
    if now - entry.submitted >= WARN_AFTER_S:
        entry.has_warned = True
        log.warning("Slurm job %s waits: %s", entry.job.job_id, reason)


def deliver_result(entry: PendingJob) -> None:
    """Set the future of a Slurm job from the file that it wrote."""
    from submitit.core.utils import FailedJobError

    try:
        outcomes, error = entry.job.result()
    except FailedJobError as failure:
        # run_call returns the errors of a call: this process could not begin, for instance without int8run
        job_id, log_file = entry.job.job_id, entry.job.paths.stderr
        reason = find_last_line(str(failure))
        error = WorkerDied(f"Slurm job {job_id} could not begin: {reason}; its log: {log_file}")
    except Exception as unreadable:  # noqa: BLE001 - raised where the result is awaited
        error = unreadable
    if error is None:
        entry.future.set_result(outcomes)
    else:
        entry.future.set_exception(error)


def find_last_line(text: str) -> str:
    """Return the last line of the traceback in submitit's text about a failure, which is between dashes."""
    traceback = text.split("\n" + "-" * 22)[1]
    return traceback.strip().splitlines()[-1]


def read_queue() -> dict[str, str] | None:
    """Read the jobs of this user from Slurm's queue.

    Returns:
        Slurm job -> why it waits, an empty string for one that does not; None when Slurm does not answer.
    """
    text = run_program("squeue", "--me", "--noheader", "--format=%i|%T|%r")
    if text is None:
        return None
    reasons = {}
    for line in text.splitlines():
        if line.count("|") < 2:
            continue
        job_id, state, reason = line.strip().split("|", 2)
        reasons[job_id] = reason if state == "PENDING" else ""
    return reasons


@dataclass(frozen=True)
class JobEnd:
    """What Slurm knows of a job that ended.

    Args:
        state: Slurm's word, such as TIMEOUT.
        exit_code: of the script; as a shell counts, above 128 where a signal ended it.
    """

    state: str
    exit_code: int


def describe_job_end(job: Any, end: JobEnd | None) -> str:
    """Say how a job ended that left no result.

    Args:
        job: submitit's.
        end: what Slurm says of it; None where Slurm has forgotten the job.
    """
    return f"Slurm job {job.job_id} ended without a result: {explain_end(end)}; its log: {job.paths.stderr}"


def explain_end(end: JobEnd | None) -> str:
    """Say what happened to a job, and what can be done about it; see `describe_job_end`."""
    if end is None:
        return "gone from the queue"
    if end.state in STATE_HINTS:
        return f"{end.state}{STATE_HINTS[end.state]}"
    if end.exit_code > 128:
        return f"{end.state}: {describe_exit_code(128 - end.exit_code)}"
    return end.state


def read_job_end(job_id: str) -> JobEnd | None:
    """Ask Slurm how a job ended; None where it has forgotten the job."""
    text = run_program("scontrol", "--oneliner", "show", "job", job_id) or ""
    state = re.search(r"\bJobState=(\w+)", text)
    exit_code = re.search(r"\bExitCode=(\d+):", text)
    # the controller forgets a job after minutes, the accounting does not
    if state is None and shutil.which("sacct"):
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        text = run_program("sacct", *options, "--jobs", job_id) or ""
        state = re.match(r"(\w+)", text)
        exit_code = re.search(r"\|(\d+):", text)
    if state is None:
        return None
    return JobEnd(state[1], exit_code=0 if exit_code is None else int(exit_code[1]))


def run_program(*command: str) -> str | None:
    """Return what a program of Slurm prints; None when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None
