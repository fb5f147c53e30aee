"""`hydra/launcher=basic`: this process."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from int8run.jobs.base import Outcome


class ThisProcess:
    """Runs a call at once."""

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        """A future that is done; an interruption ends the sweep."""
        future: Future[Sequence[Outcome]] = Future()
        future.set_result(call())
        return future

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class InProcess:
    """One job after the other, here. What kills a job kills the sweep, which `resume=true` goes on with."""

    whole_groups = False
    jobs_at_once = 1

    def open(self, jobs: int) -> int:
        """One worker."""
        return 1

    def start(self) -> ThisProcess:
        """This process."""
        return ThisProcess()

    def close(self) -> None:
        """Nothing to let go of."""
