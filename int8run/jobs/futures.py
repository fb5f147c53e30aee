"""Answers of a library's own futures in the words of `base.Worker`."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

from int8run.jobs.base import Outcome, WorkerDied

OutcomesFuture = Future[Sequence[Outcome]]


def translate_errors(answer: OutcomesFuture, translate: Callable[[BaseException], BaseException]) -> OutcomesFuture:
    """A future with the same result, or with its error put in other words."""
    told: OutcomesFuture = Future()

    def tell(done: OutcomesFuture) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if error is None:
            told.set_result(done.result())
        else:
            told.set_exception(translate(error))

    told.set_running_or_notify_cancel()  # what runs elsewhere is ended by closing its worker, not by cancelling
    answer.add_done_callback(tell)
    return told


def describe_exit_code(exit_code: int) -> WorkerDied:
    """How a process ended; a negative code is the signal that killed it."""
    if exit_code >= 0:
        return WorkerDied(f"its process ended by itself with exit code {exit_code}")
    known = {int(s): s.name for s in signal.Signals}
    name = known.get(-exit_code, "unknown")
    memory = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
    return WorkerDied(f"its process was killed by signal {-exit_code} ({name}){memory}")
