"""How many steps of a generation a step cache skipped; `pipeline.step_cache` counts them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCounts:
    """Steps of all calls of a pipeline.

    Args:
        computed: those in which every module that the cache watches has computed.
        skipped: those in which at least one gave what it had kept of earlier steps.
        macs: multiply-adds of all calls of the denoiser without a cache.
        macs_skipped: those of what was not computed.
    """

    computed: int = 0
    skipped: int = 0
    macs: int = 0
    macs_skipped: int = 0

    @property
    def skipped_share(self) -> float:
        """Share of the steps that were skipped."""
        return self.skipped / max(1, self.computed + self.skipped)

    @property
    def macs_skipped_share(self) -> float:
        """Share of the multiply-adds that were saved."""
        return self.macs_skipped / max(1, self.macs)

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(
            computed=self.computed + other.computed,
            skipped=self.skipped + other.skipped,
            macs=self.macs + other.macs,
            macs_skipped=self.macs_skipped + other.macs_skipped,
        )
