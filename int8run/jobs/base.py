"""What a sweep is made of: jobs, their outcomes, and the places that run them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from int8run.errors import Int8RunError


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, as the parent composed it."""

    number: int
    overrides: tuple[str, ...]
    config: Any  # the composed DictConfig, hydra's part included
    folder: Path  # absolute
    config_hash: str
    build_key: str  # jobs with equal keys use the same built model


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        state: FINISHED, FAILED (an error of its own) or KILLED (its process was).
        value: the metric that the task returned.
        exit_code: what a single run would have ended with.
        files: the job's folder as a zip, when it does not lie on a disk that the parent sees.
    """

    number: int
    state: str
    value: float | None = None
    error: str | None = None
    exit_code: int = 0
    files: bytes | None = None


class WorkerDied(Int8RunError):  # noqa: N818 - what happened, not a mistake
    """A worker's process ended without an answer: killed, out of memory, its machine gone."""


class Worker(Protocol):
    """One process, here or elsewhere, that keeps the model it built last."""

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        """Start a call (it can be pickled by cloudpickle). Its future raises WorkerDied when the process ends without an answer."""
        ...

    def close(self) -> None:
        """End the process, at once."""
        ...


class Pool(Protocol):
    """A frozen dataclass: the settings of an option of `hydra/launcher`, checked in `__post_init__`."""

    @property
    def whole_groups(self) -> bool:
        """Whether a worker is given all jobs of one build key in one call (a batch system), or one job per call."""
        ...

    @property
    def jobs_at_once(self) -> int:
        """How many jobs may share one machine; their speeds are not those of a machine of their own."""
        ...

    def open(self, jobs: int) -> int:
        """Get ready for a number of jobs.

        Returns:
            how many workers may be used at once.

        Raises:
            ConfigError: a library or a cluster that is not there.
        """
        ...

    def start(self) -> Worker:
        """A new worker; `start` is called again after one died."""
        ...

    def close(self) -> None:
        """Let go of everything that `open` took."""
        ...
