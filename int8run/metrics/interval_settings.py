"""The config group `metrics.intervals`: how intervals are computed. Imports nothing heavy."""

from dataclasses import dataclass, replace

from int8run.errors import check_choice, check_range

BCA, PERCENTILE = "bca", "percentile"
METHODS = (BCA, PERCENTILE)
MAX_LEVEL = 0.999_999


@dataclass(frozen=True)
class IntervalSettings:
    """How the interval of a mean over samples is computed.

    Args:
        method: of the bootstrap: `bca` (bias-corrected and accelerated) or `percentile`.
        level: the share of intervals that hold the true mean, such as 0.95.
        resamples: how often the samples are drawn anew.
        seed: of these draws, so that equal samples have equal intervals.
    """

    method: str = BCA
    level: float = 0.95
    resamples: int = 9999
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("metrics.intervals.method", self.method, METHODS)
        check_range("metrics.intervals.level", self.level, 0.5, MAX_LEVEL)
        check_range("metrics.intervals.resamples", self.resamples, 999, 1_000_000, whole=True)
        check_range("metrics.intervals.seed", self.seed, 0, 2**63 - 1, whole=True)

    @property
    def error_rate(self) -> float:
        """The share of intervals that miss the true mean."""
        return 1 - self.level

    def share_among(self, num_comparisons: int) -> "IntervalSettings":
        """Settings for several intervals, so that all of them hold as often as one does at this level.

        Bonferroni: each may miss its mean only that many times more rarely, whatever they have in common.

        Args:
            num_comparisons: how many intervals share the error rate.
        """
        if num_comparisons <= 1:
            return self
        return replace(self, level=min(MAX_LEVEL, 1 - self.error_rate / num_comparisons))
