"""Times of calls that take turns, so that all of them meet the same machine."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# median over the shortest time, beyond which a measurement says more about the machine's other work than about the call
MAX_SCATTER = 2.0


def read_clock(device: torch.device) -> float:
    """A device-synchronised clock, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[list[float]]:
    """Seconds of each call in each round; one more round before them warms up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = read_clock(device)
            call()
            times.append(read_clock(device) - started)
    return [times[1:] for times in seconds]


def time_medians(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """The median of each call's times."""
    return [statistics.median(times) for times in time_in_turns(calls, device, rounds)]


def is_steady(times: Sequence[float]) -> bool:
    """Whether a machine that repeats itself measured these; where others use it, some calls take several times as long."""
    return statistics.median(times) <= MAX_SCATTER * min(times)
