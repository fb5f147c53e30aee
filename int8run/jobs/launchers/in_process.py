"""`hydra/launcher=basic`: one job after the other, in the process that the user started."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from int8run.jobs.base import Outcome


class ThisProcess:
    """A worker that runs each call at once."""

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> "Future[Sequence[Outcome]]":
        """Run the call and return a future that is done; an interrupt ends the sweep."""
        future: Future[Sequence[Outcome]] = Future()
        future.set_result(call())
        return future

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class InProcess:
    """Settings of `hydra/launcher=basic`: it has none.

    What kills a job kills the sweep; `resume=true` goes on with it.
    """

    whole_groups = False
    jobs_at_once = 1

    def open(self, jobs: int) -> int:
        """There is one worker."""
        return 1

    def start(self) -> ThisProcess:
        """Return this process."""
        return ThisProcess()

    def close(self) -> None:
        """Nothing to release."""
