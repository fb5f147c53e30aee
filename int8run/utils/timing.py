"""Times of calls that take turns, so that other work on the machine slows all of them alike.

On a GPU they are the GPU's own, without the launches, which a run that keeps its GPU busy does not wait for.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8run.utils.hardware import synchronize

# median over the shortest time; beyond it a measurement says more about other work on the machine than about
# the call
MAX_SCATTER = 2.0
GPUS_WITH_EVENTS = ("cuda", "xpu")
# work that a GPU does before each timed call, for a millisecond or so, while the CPU launches the call
AHEAD_CYCLES = 2_000_000
AHEAD_FILLS, AHEAD_BYTES = 32, 2**26  # where torch has no call that waits


def read_clock(device: torch.device) -> float:
    """A clock that waits for the device, in seconds."""
    synchronize(device)
    return time.perf_counter()


def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[list[float]]:
    """Time each call once per round, after one more round that warms up.

    On a GPU that has events it is their time: what the CPU needs to launch a call counts only as far as it
    takes longer than the work that is queued before.

    Args:
        calls: what to time.
        device: where they run.
        rounds: how often each is timed.

    Returns:
        For each call the seconds of every round.
    """
    time_call = time_by_events if device.type in GPUS_WITH_EVENTS else time_by_clock
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            times.append(time_call(call, device))
    return [times[1:] for times in seconds]


def time_by_clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call with all that Python does in it."""
    started = read_clock(device)
    call()
    return read_clock(device) - started


def time_by_events(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a GPU computes for a call, which is launched while the GPU is busy with other work."""
    module: Any = getattr(torch, device.type)
    with module.device(device):
        begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        synchronize(device)
        keep_busy(device)
        begin.record()
        call()
        end.record()
        synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def keep_busy(device: torch.device) -> None:
    """Queue a millisecond or so of work on a GPU."""
    if device.type == "cuda":
        torch.cuda._sleep(AHEAD_CYCLES)
        return
    buffer = torch.empty(AHEAD_BYTES, dtype=torch.uint8, device=device)
    for _ in range(AHEAD_FILLS):
        buffer.zero_()


def time_medians(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """The median of each call's times; arguments as for `time_in_turns`."""
    return [statistics.median(times) for times in time_in_turns(calls, device, rounds)]


def is_steady(times: Sequence[float]) -> bool:
    """Whether the times repeat well enough; on a busy machine some calls take several times as long."""
    return statistics.median(times) <= MAX_SCATTER * min(times)
