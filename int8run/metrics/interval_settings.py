"""The config group `metrics.intervals`: how intervals are computed. Imports nothing heavy."""

from dataclasses import dataclass

from int8run.errors import check_choice, check_range

BCA, PERCENTILE = "bca", "percentile"
METHODS = (BCA, PERCENTILE)


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
        check_range("metrics.intervals.level", self.level, 0.5, 0.999)
        check_range("metrics.intervals.resamples", self.resamples, 999, 1_000_000, whole=True)
        check_range("metrics.intervals.seed", self.seed, 0, 2**63 - 1, whole=True)

    @property
    def error_rate(self) -> float:
        """The share of intervals that miss the true mean."""
        return 1 - self.level
