"""Times of calls that take turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from int8run.utils.hardware import synchronize

# median over the shortest time; beyond it a measurement says more about other work on the machine than about
# the call
MAX_SCATTER = 2.0


def read_clock(device: torch.device) -> float:
    """A clock that waits for the device, in seconds."""
    synchronize(device)
    return time.perf_counter()


def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[list[float]]:
    """Time each call once per round, after one more round that warms up.

    Args:
        calls: what to time.
        device: where they run.
        rounds: how often each is timed.

    Returns:
        For each call the seconds of every round.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = read_clock(device)
            call()
            times.append(read_clock(device) - started)
    return [times[1:] for times in seconds]


def time_medians(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """The median of each call's times; arguments as for `time_in_turns`."""
    return [statistics.median(times) for times in time_in_turns(calls, device, rounds)]


def is_steady(times: Sequence[float]) -> bool:
    """Whether the times repeat well enough; on a busy machine some calls take several times as long."""
    return statistics.median(times) <= MAX_SCATTER * min(times)
