"""The parts of a sweep: its jobs, how they end, and the protocols of the pools and workers that run them.

A pool is a launcher's side of a sweep, one class for each option of `hydra/launcher`. The scheduler hands
jobs to its workers and knows no more of them than these protocols.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from int8run.errors import Int8RunError


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, as the parent composed it; can be pickled.

    Args:
        number: of the job in its sweep, from 0.
        overrides: of the command line that belong to this job.
        config: the composed DictConfig, hydra's part included.
        folder: absolute path of its output folder.
        config_hash: the same for a job with the same settings, in whatever sweep.
        build_key: jobs with equal keys use the same built model.
    """

    number: int
    overrides: tuple[str, ...]
    config: Any
    folder: Path
    config_hash: str
    build_key: str


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        number: of the job in its sweep.
        state: FINISHED, FAILED (the job raised an error) or KILLED (its process ended).
        value: the metric that the task returned.
        error: one line, when the job did not finish.
        exit_code: the one that a single run would have ended with.
        files: the job's folder as a zip, when it is not on a disk that the parent sees.
    """

    number: int
    state: str
    value: float | None = None
    error: str | None = None
    exit_code: int = 0
    files: bytes | None = None


class WorkerDied(Int8RunError):  # noqa: N818 - the name of an event, not of a mistake
    """A worker's process ended without a result: killed, out of memory, or its machine is gone."""


class Worker(Protocol):
    """One process, here or elsewhere, that keeps the model that it built last."""

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        """Start a call in the process.

        Args:
            call: anything that cloudpickle can pickle.

        Returns:
            A future that raises WorkerDied when the process ends without a result.
        """
        ...

    def close(self) -> None:
        """End the process, at once."""
        ...


class Pool(Protocol):
    """A frozen dataclass: the settings of an option of `hydra/launcher`, checked in `__post_init__`."""

    @property
    def whole_groups(self) -> bool:
        """Whether one call holds all jobs of one build key (a batch system), or one job."""
        ...

    @property
    def jobs_at_once(self) -> int:
        """How many jobs may share one machine: their speeds are not those of a machine of their own."""
        ...

    def open(self, jobs: int) -> int:
        """Connect to whatever runs the workers.

        Args:
            jobs: how many jobs will be submitted.

        Returns:
            How many workers may be used at once.

        Raises:
            ConfigError: when a library or a cluster is missing.
        """
        ...

    def start(self) -> Worker:
        """Start a worker; called again after one died."""
        ...

    def close(self) -> None:
        """Release everything that `open` and `start` took."""
        ...
