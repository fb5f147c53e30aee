"""Whether INT8 is as close to the float model as the float model is to itself, within a margin.

Two one-sided tests (TOST, Schuirmann 1987) on the differences of paired samples. Pure functions on numbers;
`tasks.noise_floor` has the samples.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from int8run.metrics.clusters import SAMPLE, Clusters, gather_clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import MAX_SAMPLES, POWER, Interval, bound_by_student, count_more_samples

Numbers = NDArray[np.float64]

EQUIVALENT = "equivalent"  # the difference is surely within the margin
CLOSER = "closer"  # INT8 is surely closer to float than float to itself, by more than the margin
FURTHER = "further"  # INT8 is surely further from float, by more than the margin
UNDECIDED = "undecided"


@dataclass(frozen=True)
class Equivalence:
    """INT8's distance to float beside float's distance to itself.

    Args:
        outcome: EQUIVALENT, CLOSER, FURTHER or UNDECIDED.
        margin_db: two distances that differ by less count as the same.
        num_samples: independent pairs with both numbers: seeds of a prompt are one.
        mean_db: mean of the differences; more than zero where INT8 is closer. NaN without any.
        interval: of that mean, at the level that belongs to two one-sided tests: 0.90 for 0.95.
        p_value: the larger one of both tests; None for fewer than two pairs.
        more_samples: so many more would decide, by the normal approximation; None where none are needed, or
            no practical number would do.
        unit: what is independent: `prompt`, `input` or `sample`.
    """

    outcome: str
    margin_db: float
    num_samples: int
    mean_db: float
    interval: Interval | None = None
    p_value: float | None = None
    more_samples: int | None = None
    unit: str = SAMPLE

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return asdict(self)


def compute_tost_p_values(differences: Numbers, margin: float) -> Numbers:
    """The larger p-value of both one-sided t-tests along the last axis: mean > -margin, and mean < margin.

    Args:
        differences: [..., n], finite, n at least 2.
        margin: more than zero.

    Returns:
        [...]; below the error rate the means are within the margin.
    """
    is_constant = np.ptp(differences, axis=-1) == 0
    with np.errstate(all="ignore"):  # constant differences have no variance; they are decided below
        above = stats.ttest_1samp(differences, -margin, axis=-1, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, margin, axis=-1, alternative="less").pvalue
    is_within = np.abs(differences.mean(axis=-1)) < margin
    return np.where(is_constant, np.where(is_within, 0.0, 1.0), np.maximum(above, below))


def compare_with_margin(
    differences: Sequence[float],
    margin_db: float,
    settings: IntervalSettings,
    clusters: Clusters | None = None,
) -> Equivalence:
    """Test whether INT8's PSNR to float, less that of the float model to itself, is within a margin.

    Args:
        differences: of each sample, in dB; more than zero where INT8 is closer. Those that are not finite are
            left out.
        margin_db: two distances that differ by less count as the same.
        settings: its level gives the error rate of the tests: 0.95 one of 0.05.
        clusters: what is independent; None: each sample is.
    """
    if clusters is None:
        clusters = Clusters(range(len(differences)))
    finite = np.asarray(gather_clusters(differences, clusters.labels), dtype=np.float64)
    num_samples = len(finite)
    if num_samples < 2:
        mean = float(finite.mean()) if num_samples else math.nan
        return Equivalence(UNDECIDED, margin_db, num_samples, mean, unit=clusters.unit)
    level = 2 * settings.level - 1  # of the interval that belongs to two one-sided tests
    low, high = bound_by_student(finite, level)
    interval = Interval(low=float(low), high=float(high))
    mean = float(finite.mean())
    outcome = decide_outcome(interval, margin_db)
    more_samples = None
    if outcome == UNDECIDED:
        deviation = float(finite.std(ddof=1))
        more_samples = count_more_to_decide(mean, deviation, num_samples, margin_db=margin_db, level=level)
    return Equivalence(
        outcome=outcome,
        margin_db=margin_db,
        num_samples=num_samples,
        mean_db=mean,
        interval=interval,
        p_value=float(compute_tost_p_values(finite, margin_db)),
        more_samples=more_samples,
        unit=clusters.unit,
    )


def count_more_to_decide(
    mean: float, deviation: float, num_samples: int, *, margin_db: float, level: float
) -> int | None:
    """How many more samples would decide, if mean and variance stay as they are, by the normal approximation.

    With so many, POWER of all tests decide. Within the margin both one-sided tests have to reject, which in
    its middle takes more samples than one of them does.

    Args:
        mean: of the differences, in dB.
        deviation: of one of them.
        num_samples: that there are already.
        margin_db: two distances that differ by less count as the same.
        level: of the interval that belongs to both tests.

    Returns:
        At least 1; None beyond MAX_SAMPLES.
    """
    if abs(mean) >= margin_db:
        return count_more_samples(abs(mean) - margin_db, deviation, num_samples, level)
    numbers = np.arange(num_samples + 1, MAX_SAMPLES + 1)
    errors = deviation / np.sqrt(numbers)
    reach = stats.norm.ppf((1 + level) / 2)
    rejects_above = stats.norm.cdf((margin_db - mean) / errors - reach)
    rejects_below = stats.norm.cdf((margin_db + mean) / errors - reach)
    enough = numbers[rejects_above + rejects_below - 1 >= POWER]
    return int(enough[0]) - num_samples if len(enough) else None


def decide_outcome(interval: Interval, margin_db: float) -> str:
    """What an interval says of a margin on both sides of zero.

    Both one-sided tests reject at an error rate exactly where the interval of twice that rate is within.
    """
    if -margin_db < interval.low and interval.high < margin_db:
        return EQUIVALENT
    if interval.low > margin_db:
        return CLOSER
    if interval.high < -margin_db:
        return FURTHER
    return UNDECIDED
