"""`hydra/launcher=slurm`: the jobs of one built model are one job of a Slurm cluster.

submitit writes the script of a Slurm job, submits it, and pickles its result into a file, for which a thread
of `slurm_watcher.py` waits. submitit is imported when a sweep starts, so that int8run works without it.
"""

import logging
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from int8run.errors import ConfigError, check_range, suggest_similar
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture
from int8run.jobs.launchers.slurm_watcher import JobWatcher, PendingJob

log = logging.getLogger(__name__)
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
    watcher: JobWatcher = field(default_factory=JobWatcher, init=False, repr=False, compare=False)

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

    def __init__(self, executor: Any, watcher: JobWatcher) -> None:
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
