"""How sure a mean is: bootstrap intervals, differences of two settings, and how many samples would tell.

Pure functions on numbers. `sample_statistics` and `speed` call them for one run, the report for two. Knows no
metric and no run.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from int8run.metrics.clusters import SAMPLE, Clusters, gather_clusters
from int8run.metrics.interval_settings import BCA, IntervalSettings

Numbers = NDArray[np.float64]

POWER = 0.8  # with `more_samples` a difference of the observed size is found this often
MAX_SAMPLES = 10_000  # more than this many are nobody's plan
BOOTSTRAP, STUDENT = "bootstrap", "student"
MIN_TAIL_DRAWS = 4  # resampled means beyond a limit; of fewer the limit is chance
BATCH_NUMBERS = 20_000_000  # numbers that scipy holds at once while it resamples


@dataclass(frozen=True)
class Interval:
    """The limits between which a mean lies, at the level of the settings."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the distance of both limits."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean is surely above zero, or surely below."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """What two settings differ by, as far as their samples tell; more than zero where the first is better.

    Args:
        num_samples: pairs of samples that were compared; of times, the smaller of both numbers.
        num_units: how many of them are independent: fewer where a prompt has several seeds.
        unit: what is independent: `prompt`, `input` or `sample`.
        mean: NaN without a pair.
        interval: of the mean; None for fewer than two pairs.
        more_samples: so many more units would tell the two apart, if mean and scatter stay (see
            `count_more_samples`). None where they are told apart, or where no practical number would do.
    """

    num_samples: int
    mean: float
    interval: Interval | None
    more_samples: int | None = None
    num_units: int = 0
    unit: str = SAMPLE

    @property
    def sign(self) -> int:
        """1 where the first setting is surely better, -1 where the second is, 0 where nobody can tell."""
        if self.interval is None or not self.interval.excludes_zero:
            return 0
        return 1 if self.interval.low > 0 else -1


# -- one mean ------------------------------------------------------------------------------------------------


def count_least_samples(level: float) -> int:
    """The fewest samples whose bootstrap interval can hold the level: 6 for 0.95.

    The interval lies between the smallest and the largest sample. Of n samples all are on one side of a
    symmetric distribution's mean with a chance of 2 / 2^n, and then it misses.
    """
    return 1 + math.ceil(math.log2(1 / (1 - level)))


def name_interval_method(num_samples: int, settings: IntervalSettings) -> str:
    """`bca`, `percentile`, or `student` for samples, or draws of them, that are too few for the level."""
    if num_samples < count_least_samples(settings.level):
        return STUDENT
    tail = (1 - expand_level(settings.level, num_samples)) / 2
    if tail * settings.resamples < MIN_TAIL_DRAWS:
        return STUDENT
    return settings.method


def compute_interval(values: Sequence[float] | Numbers, settings: IntervalSettings) -> Interval | None:
    """The interval of the mean of some numbers; None for fewer than two.

    Args:
        values: finite numbers.
        settings: method, level and seed.
    """
    if len(values) < 2:
        return None
    low, high = bound_means(np.asarray(values, dtype=np.float64), settings)
    return Interval(low=float(low), high=float(high))


def bound_means(values: Numbers, settings: IntervalSettings) -> tuple[Numbers, Numbers]:
    """The limits of the means along the last axis.

    From `count_least_samples` on by scipy's bootstrap, whose percentiles are widened for few samples
    (`expand_level`). Of fewer samples, and of levels so high that hardly a draw lies beyond the limits, it is
    Student's interval, which takes the samples for normally distributed.

    Args:
        values: [..., n], finite, n at least 2. Equal seeds draw the same samples in each row.
        settings: method, level, resamples and seed.

    Returns:
        The lower and the upper limits, [...].
    """
    num_samples = values.shape[-1]
    if name_interval_method(num_samples, settings) == STUDENT:
        return bound_by_student(values, settings.level)
    method = "BCa" if settings.method == BCA else "percentile"
    num_rows = max(1, values.size // num_samples)
    with warnings.catch_warnings():
        # rows of equal values, which have no distribution; they get Student's limits below
        warnings.simplefilter("ignore", category=stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", category=RuntimeWarning)
        result = stats.bootstrap(
            (values,),
            np.mean,
            axis=-1,
            vectorized=True,
            n_resamples=settings.resamples,
            batch=max(1, BATCH_NUMBERS // (num_rows * num_samples)),
            confidence_level=expand_level(settings.level, num_samples),
            method=method,
            rng=np.random.default_rng(settings.seed),
        )
    limits = result.confidence_interval
    # of values that are equal, or equal but for rounding, BCa has no limits; Student's are as narrow as those
    low, high = bound_by_student(values, settings.level)
    has_limits = np.isfinite(limits.low) & np.isfinite(limits.high) & (np.ptp(values, axis=-1) > 0)
    return np.where(has_limits, limits.low, low), np.where(has_limits, limits.high, high)


def expand_level(level: float, num_samples: int) -> float:
    """The level to ask a bootstrap for, so that its interval of few samples is as wide as it should be.

    Resampled means scatter less than means of new samples do, by sqrt((n - 1) / n), and their percentiles
    know nothing of Student's heavier tails. Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
    section 5.3 (arXiv:1411.5279): the expanded percentile interval.
    """
    student = stats.t.ppf((1 + level) / 2, num_samples - 1)
    tail = stats.norm.cdf(-math.sqrt(num_samples / (num_samples - 1)) * student)
    return float(1 - 2 * tail)


def bound_by_student(values: Numbers, level: float) -> tuple[Numbers, Numbers]:
    """Student's limits of the means along the last axis, [...]."""
    num_samples = values.shape[-1]
    means = values.mean(axis=-1)
    errors = values.std(axis=-1, ddof=1) / math.sqrt(num_samples)
    reach = stats.t.ppf((1 + level) / 2, num_samples - 1) * errors
    return means - reach, means + reach


# -- two settings --------------------------------------------------------------------------------------------


def compare_pairs(
    first: Sequence[float],
    second: Sequence[float],
    settings: IntervalSettings,
    clusters: Clusters | None = None,
) -> Difference:
    """What two settings differ by on the same samples. A pair without two finite numbers is left out.

    Args:
        first: a metric of each sample with the first setting, of which more is better.
        second: the same with the second one, in the same order.
        settings: of the interval.
        clusters: what is independent; None: each sample is.
    """
    if clusters is None:
        clusters = Clusters(range(len(first)))
    differences, labels = [], []
    for one, other, label in zip(first, second, clusters.labels, strict=True):
        if math.isfinite(one) and math.isfinite(other):
            differences.append(one - other)
            labels.append(label)
    gathered = gather_clusters(differences, labels)
    interval = compute_interval(gathered, settings)
    more_samples = None
    if interval is not None and not interval.excludes_zero:
        deviation = float(np.std(gathered, ddof=1))
        distance = float(np.mean(gathered))
        more_samples = count_more_samples(distance, deviation, len(gathered), settings.level)
    return Difference(
        num_samples=len(differences),
        mean=float(np.mean(differences)) if differences else math.nan,
        interval=interval,
        more_samples=more_samples,
        num_units=len(gathered),
        unit=clusters.unit,
    )


def count_more_samples(distance: float, deviation: float, num_samples: int, level: float) -> int | None:
    """How many more samples would tell a mean from another number, if mean and variance stay as they are.

    By the normal approximation n = ((z of the level + z of POWER) · s / distance)²: with that many, a
    distance of this size is found POWER of the time.

    Args:
        distance: of the mean from that number.
        deviation: s, the standard deviation of a sample.
        num_samples: that there are already.
        level: of a two-sided interval.

    Returns:
        At least 1; None beyond MAX_SAMPLES, and for no distance at all.
    """
    if distance == 0:
        return None
    quantiles = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(POWER)
    needed = float(quantiles * deviation / distance) ** 2
    if needed > MAX_SAMPLES:
        return None
    return max(1, math.ceil(needed) - num_samples)


def compare_independent(
    first: Sequence[float], second: Sequence[float], settings: IntervalSettings
) -> Difference:
    """What the means of two independent groups differ by: Welch's interval, for speeds of different moments.

    Args:
        first: of the first setting, finite.
        second: of the second one, of any number.
        settings: level.
    """
    num_samples = min(len(first), len(second))
    if not num_samples:
        return Difference(num_samples=0, mean=math.nan, interval=None)
    mean = float(np.mean(first) - np.mean(second))
    if num_samples < 2:
        return Difference(num_samples=num_samples, num_units=num_samples, mean=mean, interval=None)
    deviation = math.hypot(float(np.std(first, ddof=1)), float(np.std(second, ddof=1)))
    if deviation == 0:
        return Difference(
            num_samples=num_samples, num_units=num_samples, mean=mean, interval=Interval(low=mean, high=mean)
        )
    limits: Any = stats.ttest_ind(first, second, equal_var=False).confidence_interval(settings.level)
    interval = Interval(low=float(limits.low), high=float(limits.high))
    more_samples = None
    if not interval.excludes_zero:
        more_samples = count_more_samples(mean, deviation, num_samples, settings.level)
    return Difference(
        num_samples=num_samples,
        mean=mean,
        interval=interval,
        more_samples=more_samples,
        num_units=num_samples,
    )
