"""Times on a CUDA GPU, and what the GPU can reach at most, for `gpu.py`.

It knows calls, not what they compute. `CpuClock` takes the clock's place in dry runs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

WARMUP_ROUNDS = 5
FLUSH_BYTES = 256 * 2**20  # more than any L2
# the GPU waits this long before each call, so that what is timed does not wait for the CPU's launches
AHEAD_CYCLES = 1_000_000
CEILING_SIDE = 8192
CEILING_ROUNDS = 20
COPY_BYTES = 2**30
DRY_SHRINK = 64  # how much smaller lengths are in a dry run

Call = Callable[[int], object]  # takes the number of the round


class Clock:
    """Times calls on the GPU by events, from a cold L2, with the launches ahead of the GPU."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_rounds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds of each call in each round; a round runs every call once, in turn."""
        for number in range(WARMUP_ROUNDS):
            self._time_round(calls, number)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(WARMUP_ROUNDS, WARMUP_ROUNDS + rounds):
            for name, spent in self._time_round(calls, number).items():
                seconds[name].append(spent)
        return seconds

    def _time_round(self, calls: Mapping[str, Call], number: int) -> dict[str, float]:
        events = {}
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[name] = (begin, end)
            self.flush.zero_()
            torch.cuda._sleep(AHEAD_CYCLES)
            begin.record()
            call(number)
            end.record()
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in events.items()}

    def time_medians(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        """The median seconds of each call."""
        return {name: statistics.median(s) for name, s in self.time_rounds(calls, rounds).items()}

    def time_launch(self, call: Call, times: int = 20) -> float:
        """Seconds that one call costs the CPU while the GPU is busy."""
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD_CYCLES)
        started = time.perf_counter()
        for number in range(times):
            call(number)
        spent = (time.perf_counter() - started) / times
        torch.cuda.synchronize()
        return spent


class CpuClock(Clock):
    """Times the same calls on a CPU: a dry run, whose numbers mean nothing."""

    def __init__(self) -> None:
        """Nothing is flushed."""

    def _time_round(self, calls: Mapping[str, Call], number: int) -> dict[str, float]:
        return {name: self.time_launch(partial(call_again, call, number), 1) for name, call in calls.items()}

    def time_launch(self, call: Call, times: int = 20) -> float:
        """Seconds of one call."""
        started = time.perf_counter()
        for number in range(times):
            call(number)
        return (time.perf_counter() - started) / times


def call_again(call: Call, number: int, _: int) -> object:
    """A call with the number of its round."""
    return call(number)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return Clock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches in this run, per second.

    Args:
        bf16_ops: multiplications and additions of a bfloat16 product.
        int8_ops: those of an int8 product.
        bytes: of a copy, read and written.
        int8_from: how `int8_ops` was found.
    """

    bf16_ops: float
    int8_ops: float
    bytes: float
    int8_from: str

    def limit(self, size: tuple[int, int, int], int8: bool) -> tuple[float, str]:
        """The least seconds of a layer, and whether operations or bytes set it.

        Args:
            size: M, K and N of y[M, N] = x[M, K] weight[N, K]^T, with x and y in bfloat16.
            int8: of an INT8 layer; otherwise of a bfloat16 one.
        """
        m, k, n = size
        ops_per_s, weight_bytes = (self.int8_ops, 1) if int8 else (self.bf16_ops, 2)
        by_ops = 2 * m * k * n / ops_per_s
        by_bytes = (2 * m * k + weight_bytes * n * k + 2 * m * n) / self.bytes
        if by_ops > by_bytes:
            return by_ops, "operations"
        return by_bytes, "bytes"


def measure_ceilings(clock: Clock, device: torch.device) -> Ceilings:
    """Time a bfloat16 and an int8 product of 8192 cubed, and a copy of 1 GiB; small ones in a dry run."""
    shrink = 1 if device.type == "cuda" else DRY_SHRINK
    side, copy_bytes = CEILING_SIDE // shrink, COPY_BYTES // shrink**2
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    q, w = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "bf16": lambda number: a @ b,
        "copy": lambda number: target.copy_(source),
    }
    try:
        torch._int_mm(q, w.T)
        calls["int8"] = lambda number: torch._int_mm(q, w.T)
    except RuntimeError as error:
        print(f"torch._int_mm cannot run here: {error}", file=sys.stderr)

    seconds = clock.time_medians(calls, CEILING_ROUNDS)
    ops = 2 * side**3
    bf16_ops = ops / seconds["bf16"]
    int8_ops, int8_from = 2 * bf16_ops, "twice the bfloat16 product"
    # cuBLAS may run int8 far below the hardware; twice bfloat16 is what tensor cores since Ampere do at least
    if "int8" in seconds and ops / seconds["int8"] > int8_ops:
        int8_ops, int8_from = ops / seconds["int8"], "torch._int_mm"
    return Ceilings(bf16_ops, int8_ops, 2 * copy_bytes / seconds["copy"], int8_from)
