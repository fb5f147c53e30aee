"""Which numbers of a result cannot be true: checked before results of other people are shown together.

`shared_results` asks. A value that is merely surprising passes; the bounds are what no measurement can have.
"""

import fnmatch
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from int8run.metrics.names import HIGH, LOW
from int8run.report.columns import DENOISER_BYTES, DENOISER_RATIO, SPEED_RATIO, STEP_MS

FLOAT_STEP_MS, FLOAT_BYTES = "float/step_ms_p50", "float/denoiser_bytes"
LARGEST_FLOAT = sys.float_info.max  # JSON can hold whole numbers beyond it, which no float can be made of
ROUNDING = 1e-6  # relative: a cosine in float32 can be 1.0000001
RATIO_TOLERANCE = 0.02  # of a ratio and the two numbers that it was computed from


@dataclass(frozen=True)
class Bounds:
    """What a metric can be.

    Args:
        low, high: the smallest and largest possible value.
        takes_infinity: whether it may be infinite, as the ratio to a difference of zero.
    """

    low: float
    high: float
    takes_infinity: bool = False


# by fnmatch pattern; the first that matches counts
BOUNDS: Mapping[str, Bounds] = {
    "speed/ratio_*": Bounds(0.001, 1000),
    "*_ratio": Bounds(0.001, 1000),
    "speed/scatters": Bounds(0, 1),
    "*/step_ms_*": Bounds(1e-4, 1e9),
    "*_per_s": Bounds(1e-9, 1e9),
    "*/joules_per_image": Bounds(1e-6, 1e12),
    "*_share": Bounds(0, 1),
    "*ssim*": Bounds(-1, 1),
    "clip/cosine_*": Bounds(-1, 1),
    "*psnr_db*": Bounds(0, 400, takes_infinity=True),
    "*_db*": Bounds(-400, 400, takes_infinity=True),
    "*_err": Bounds(0, 1e6),
    "quality/lpips*": Bounds(0, 100),
    "*/denoiser_bytes": Bounds(1, 1e15),
    "*_bytes": Bounds(0, 1e15),
}


# Student's interval of two samples reaches far beyond what the metric itself can be: at a level of 99.9 %
# to 320 times their distance
INTERVAL_REACH = 1000  # in ranges of the metric
UNKNOWN_END = Bounds(-1e30, 1e30, takes_infinity=True)  # of a metric without bounds
INTERVAL_SLACK = 0.01  # of an interval's length: a skewed one may begin beside the mean


@dataclass(frozen=True)
class Doubt:
    """A number that cannot be true.

    Args:
        metric: its name.
        value: as the file has it.
        reason: why.
    """

    metric: str
    value: object
    reason: str


def find_doubts(metrics: Mapping[str, object]) -> list[Doubt]:
    """The numbers of a result that cannot be true, alone or beside others of the same result."""
    doubts = []
    for name, value in metrics.items():
        reason = explain_impossible(name, value)
        if reason is not None:
            doubts.append(Doubt(name, value, reason))
    doubted = {doubt.metric for doubt in doubts}
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if name not in doubted and isinstance(value, int | float):
            numbers[name] = value
    doubts += check_ratio(numbers, SPEED_RATIO, FLOAT_STEP_MS, STEP_MS)
    doubts += check_ratio(numbers, DENOISER_RATIO, FLOAT_BYTES, DENOISER_BYTES)
    doubts += check_intervals(numbers)
    return doubts


def explain_impossible(name: str, value: object) -> str | None:
    """Why a metric cannot have a value; None where it can."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "it is no number"
    if isinstance(value, int) and abs(value) > LARGEST_FLOAT:
        return "it is too large for a number"
    if math.isnan(value):
        return "it is not a number"
    bounds = find_end_bounds(name) if name.endswith((LOW, HIGH)) else find_bounds(name)
    if bounds is None:
        return None
    if math.isinf(value):
        is_possible = bounds.takes_infinity and value > 0
        return None if is_possible else "it is infinite"
    low_slack, high_slack = ROUNDING * abs(bounds.low), ROUNDING * abs(bounds.high)
    if bounds.low - low_slack <= value <= bounds.high + high_slack:
        return None
    return f"it is outside {bounds.low:g} … {bounds.high:g}"


def find_end_bounds(name: str) -> Bounds:
    """What the end of a metric's interval can be."""
    own = find_bounds(name.removesuffix(LOW).removesuffix(HIGH))
    if own is None:
        return UNKNOWN_END
    reach = INTERVAL_REACH * (own.high - own.low)
    return Bounds(own.low - reach, own.high + reach, takes_infinity=True)


def find_bounds(name: str) -> Bounds | None:
    """What a metric can be; None: anything."""
    for pattern, bounds in BOUNDS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return bounds
    return None


def check_ratio(numbers: Mapping[str, float], ratio: str, above: str, below: str) -> list[Doubt]:
    """Doubt a ratio that is not that of the two numbers beside it.

    Args:
        numbers: of the result.
        ratio: its name.
        above: the number that was divided.
        below: what it was divided by.
    """
    if not {ratio, above, below} <= numbers.keys():
        return []
    expected = numbers[above] / numbers[below]
    if math.isclose(numbers[ratio], expected, rel_tol=RATIO_TOLERANCE):
        return []
    return [Doubt(ratio, numbers[ratio], f"{above} over {below} is {expected:.4g}")]


def check_intervals(numbers: Mapping[str, float]) -> list[Doubt]:
    """Doubt both ends of intervals that end before they begin, or are not around their metric."""
    doubts = []
    for name, low in numbers.items():
        if not name.endswith(LOW):
            continue
        metric = name.removesuffix(LOW)
        high = numbers.get(metric + HIGH)
        if high is None:
            continue
        reason = explain_wrong_interval(low, high, numbers.get(metric))
        if reason is not None:
            doubts += [Doubt(name, low, reason), Doubt(metric + HIGH, high, reason)]
    return doubts


def explain_wrong_interval(low: float, high: float, value: float | None) -> str | None:
    """Why an interval cannot be; None where it can.

    Args:
        low: its lower end.
        high: its upper end.
        value: of the metric; None: not known. An infinite one has none around it: it is of identical images.
    """
    if low > high:
        return "the interval ends before it begins"
    if value is None or math.isinf(value):
        return None
    slack = ROUNDING * abs(value)
    if math.isfinite(high - low):
        slack += INTERVAL_SLACK * (high - low)
    if low - slack <= value <= high + slack:
        return None
    return f"the interval does not hold the value {value:g}"
