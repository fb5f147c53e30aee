"""What the launchers share: futures whose errors are those of `jobs.base.Worker`, and how a process ended."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

from int8run.jobs.base import Outcome

OutcomesFuture = Future[Sequence[Outcome]]


def translate_errors(
    future: OutcomesFuture, translate: Callable[[BaseException], BaseException]
) -> OutcomesFuture:
    """Return a future with the same result as `future`, or with its error translated.

    Args:
        future: of a library that has error classes of its own.
        translate: returns WorkerDied for these, and an error of the call itself unchanged.
    """
    translated: OutcomesFuture = Future()

    def copy_result(done: OutcomesFuture) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if error is None:
            translated.set_result(done.result())
        else:
            translated.set_exception(translate(error))

    # a call that runs elsewhere is ended by closing its worker, not by cancelling the future
    translated.set_running_or_notify_cancel()
    future.add_done_callback(copy_result)
    return translated


def describe_exit_code(exit_code: int) -> str:
    """Say how a process ended; a negative code is the signal that killed it, as `subprocess` counts."""
    if exit_code >= 0:
        return f"its process ended by itself with exit code {exit_code}"
    number = -exit_code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    hint = ""
    if name == "SIGKILL":
        hint = "; the kernel does that when memory runs out"
    return f"its process was killed by signal {number} ({name}){hint}"
