"""MagCache: all blocks are skipped while the magnitudes of their residuals say that little is lost.

How much larger the residual of each step is than that of the step before hardly depends on the prompt, so it
is measured once for a model and its steps (`ratios=auto`: on calibration prompts). The errors that skipping
adds up to are estimated from it.

Source: Ma et al. 2025, "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv:2506.09045. Hooks:
diffusers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from int8run.cache_steps.base import BLOCKS, CacheCalls, StepCacheSettings, check_computed_steps
from int8run.errors import ConfigError, check_range

AUTO = "auto"
MAX_STEPS = 100_000  # more than any call has: with it diffusers' hooks never begin anew by themselves


@dataclass(frozen=True, kw_only=True)
class MagCache(StepCacheSettings):
    """Skips all blocks while the estimated error is small.

    Args:
        threshold: estimated error, added up over skipped steps in a row, up to which they are skipped.
        max_skipped: most steps that are skipped in a row.
        warm_up_share: share of the steps, from the first one, that are computed.
        ratios: `auto`, or one number for each step.
        calibration_prompts: with `auto`: on how many of `calibration.prompts` they are measured.
    """

    threshold: float = 0.06
    max_skipped: int = 3
    warm_up_share: float = 0.2
    ratios: str | Sequence[float] = AUTO
    calibration_prompts: int = 2
    name: ClassVar[str] = "magcache"
    skips: ClassVar[str] = BLOCKS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cache_steps.threshold", self.threshold, 0, 10)
        check_range("cache_steps.max_skipped", self.max_skipped, 1, 100, whole=True)
        check_range("cache_steps.warm_up_share", self.warm_up_share, 0, 1)
        check_range("cache_steps.calibration_prompts", self.calibration_prompts, 1, 1000, whole=True)
        if self.ratios != AUTO:
            check_ratios(self.ratios)
            object.__setattr__(self, "ratios", tuple(self.ratios))  # the class is frozen

    @property
    def num_calibration_prompts(self) -> int:
        """How many prompts the ratios are measured on; 0: they are given."""
        return self.calibration_prompts if isinstance(self.ratios, str) else 0

    @property
    def takes_two_denoisers(self) -> bool:
        """Given ratios are those of one; measured ones are measured of each."""
        return isinstance(self.ratios, str)

    def check_steps(self, num_steps: int) -> None:
        """Refuse a warm-up of all steps."""
        num_computed = int(self.warm_up_share * num_steps + 0.5)
        check_computed_steps(f"cache_steps.warm_up_share={self.warm_up_share:g}", num_computed, num_steps)

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks; without ratios they measure them and skip nothing."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        ratios = calls.ratios if isinstance(self.ratios, str) else self.ratios
        if not ratios:
            apply_mag_cache(denoiser, MagCacheConfig(num_inference_steps=MAX_STEPS, calibrate=True))
            return
        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skipped,
            retention_ratio=self.warm_up_share,
            num_inference_steps=calls.num_calls,
            mag_ratios=list(ratios),
        )
        apply_mag_cache(denoiser, config)

    def force(self) -> "MagCache":
        """Nothing is known of the first step alone."""
        return replace(self, threshold=10.0, max_skipped=100, warm_up_share=0.0)


def check_ratios(ratios: object) -> None:
    """Raise ConfigError unless these are some numbers above 0."""
    is_list = isinstance(ratios, Sequence) and not isinstance(ratios, str) and len(ratios) > 0
    numbers = ratios if isinstance(ratios, Sequence) else ()
    are_positive = all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
        for number in numbers
    )
    if not (is_list and are_positive):
        raise ConfigError(
            f"cache_steps.ratios is {ratios!r}; give one number above 0 for each step, as a run with "
            "cache_steps.ratios=auto logs them, or auto"
        )
