"""How fast INT8 is beside float on this machine, and the one rule by which float stays.

Linears (`backends.auto`), attentions and convolutions (`ptq`) are compared here, and their ratios are kept in
the file of measured choices. What is computed, and on which numbers, is the caller's.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from int8run.backends.autotune_cache import AutotuneCache, parse_ratio
from int8run.backends.run_errors import find_run_failure
from int8run.utils.timing import is_steady, time_in_turns

# how many times as fast as INT8 float must be to stay: as fast as INT8, it only takes more memory
MIN_FLOAT_GAIN = 1.05
SCATTERS = "scatters"  # what the autotune cache says of a ratio that is within the scatter of its times
ROUNDS = 7  # timings of each side, where the settings name no number


@dataclass(frozen=True)
class FloatComparison:
    """What is known of INT8 beside float at one shape.

    Args:
        speedup: time of float over that of INT8; None: it was not measured, or the machine was busy.
        is_clear: whether float, where it seems to be faster, is so by more than the times scatter.
        failure: why INT8 cannot run here; None: it can.
        float_failure: why float cannot be timed here, so that nothing was measured; None: it can.
    """

    speedup: float | None = None
    is_clear: bool = True
    failure: str | None = None
    float_failure: str | None = None

    @property
    def not_measured(self) -> str:
        """Why there is nothing to compare with, for people; empty: there is."""
        if self.float_failure is None:
            return ""
        return f"float was not measured: {self.float_failure}"

    @property
    def is_float_faster(self) -> bool:
        """Whether INT8 does not pay."""
        return self.speedup is not None and self.is_clear and self.speedup * MIN_FLOAT_GAIN <= 1

    def explain_float(self, backend: str, place: str) -> str:
        """Why float is to stay, for people; empty: INT8 pays, or nothing clear is known.

        Args:
            backend: name of what computes INT8.
            place: at which shape, such as `at 4096 rows`.
        """
        if self.failure is not None:
            return f"{backend} cannot run it here: {self.failure}"
        if self.speedup is None or not self.is_float_faster:
            return ""
        return f"float is {1 / self.speedup:.2f} times as fast as {backend} {place} here"

    def format(self) -> str:
        """As the autotune cache has it: `1.84`; `0.93 scatters` where float may only seem to be faster."""
        if self.speedup is None:
            return ""
        if self.is_clear:
            return str(self.speedup)
        return f"{self.speedup} {SCATTERS}"


def parse_comparison(text: str | None) -> FloatComparison:
    """A comparison out of the autotune cache; one without a ratio for what somebody edited."""
    ratio, _, note = (text or "").partition(" ")
    speedup = parse_ratio(ratio)
    if speedup is None:
        return FloatComparison()
    return FloatComparison(speedup, is_clear=note != SCATTERS)


def compare_times(float_seconds: float, int8_seconds: float, quickest_int8: float) -> FloatComparison:
    """Compare times that did not scatter by much.

    Args:
        float_seconds: the median of float's calls.
        int8_seconds: the median of INT8's calls.
        quickest_int8: the shortest of INT8's calls.
    """
    speedup = round(float_seconds / int8_seconds, 3)
    # medians of calls that scatter differ by a few percent without a reason: even the quickest INT8 call has
    # to be slower than float before anything leaves INT8
    is_slower = quickest_int8 >= MIN_FLOAT_GAIN * float_seconds
    return FloatComparison(speedup, is_clear=is_slower or speedup * MIN_FLOAT_GAIN > 1)


class FloatComparer:
    """Times INT8 beside float, each shape once, and keeps what can be trusted for later runs.

    Args:
        cache: comparisons made before.
        device: where both run.
        rounds: timings of each side.
    """

    def __init__(self, cache: AutotuneCache, device: torch.device, rounds: int = ROUNDS):
        self.cache, self.device, self.rounds = cache, device, rounds
        self.found: dict[str, FloatComparison] = {}

    def look_up(self, key: str) -> FloatComparison | None:
        """What was measured in this process or in one before; None: nothing."""
        if key not in self.found:
            kept = parse_comparison(self.cache.get(key))
            if kept.speedup is None:
                return None
            self.found[key] = kept
        return self.found[key]

    @torch.no_grad()
    def measure(
        self, key: str, *, int8: Callable[[], object], in_float: Callable[[], object]
    ) -> FloatComparison:
        """Time both in turns.

        A failure, and times of a busy machine, which take nothing out of INT8, are remembered in this process
        only.

        Args:
            key: of the entry in the cache.
            int8: one call in INT8.
            in_float: one call of what the float model computes there.
        """
        failure = find_run_failure(int8, self.device)
        if failure is not None:
            self.found[key] = FloatComparison(failure=failure)
            return self.found[key]
        float_failure = find_run_failure(in_float, self.device)
        if float_failure is not None:
            self.found[key] = FloatComparison(float_failure=float_failure)
            return self.found[key]
        float_seconds, int8_seconds = time_in_turns([in_float, int8], self.device, self.rounds)
        if not is_steady(float_seconds) or not is_steady(int8_seconds):
            self.found[key] = FloatComparison()
            return self.found[key]
        measured = compare_times(
            statistics.median(float_seconds), statistics.median(int8_seconds), min(int8_seconds)
        )
        # another process may have measured the same meanwhile, and both are to run alike
        kept = parse_comparison(self.cache.put(key, measured.format()))
        self.found[key] = measured if kept.speedup is None else kept
        return self.found[key]
