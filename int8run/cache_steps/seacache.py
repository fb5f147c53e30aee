"""SeaCache: all blocks are skipped while the part of the latents that a step can tell has hardly changed.

The latents are filtered by how much of each frequency is signal at the step's noise (low ones first), so that
noise does not count as a change. The residual of skipped steps is extrapolated from computed ones.

Source: "SeaCache: Spectral-Evolution-Aware Cache", arXiv:2602.18993. Hooks: diffusers, which finds the
latents of Wan and Cosmos 3 alone; `find_latents` is for the others.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from int8run.cache_steps.base import BLOCKS, CacheCalls, StepCacheSettings, check_computed_steps
from int8run.cache_steps.latents import find_latents
from int8run.errors import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class SeaCache(StepCacheSettings):
    """Skips all blocks while the filtered latents change little.

    Args:
        threshold: relative change of the filtered latents, added up over skipped steps in a row.
        max_skipped: most steps that are skipped in a row; 0: any number.
        warm_up: first steps that are computed.
        cool_down: last steps that are computed.
        order: 0: the last residual as it is, 1: extrapolated from the last two.
        power: how fast the signal's power falls with the frequency: about 2 in images, 3 in videos.
    """

    threshold: float = 0.25
    max_skipped: int = 2
    warm_up: int = 1
    cool_down: int = 1
    order: int = 1
    power: float = 3.0
    name: ClassVar[str] = "seacache"
    skips: ClassVar[str] = BLOCKS
    hooks_denoiser: ClassVar[bool] = True
    needs_equal_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cache_steps.threshold", self.threshold, 0, 10)
        check_range("cache_steps.max_skipped", self.max_skipped, 0, 100, whole=True)
        check_range("cache_steps.warm_up", self.warm_up, 0, 1000, whole=True)
        check_range("cache_steps.cool_down", self.cool_down, 0, 1000, whole=True)
        check_range("cache_steps.order", self.order, 0, 1, whole=True)
        check_range("cache_steps.power", self.power, 0.1, 10)

    def check_steps(self, num_steps: int) -> None:
        """Refuse more computed steps than there are."""
        described = f"cache_steps.warm_up={self.warm_up} with cache_steps.cool_down={self.cool_down}"
        check_computed_steps(described, self.warm_up + self.cool_down, num_steps)

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import SeaCacheConfig, apply_sea_cache

        def get_latents(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            if calls.position.sigma is None:
                raise ConfigError(
                    "cache_steps=seacache needs the share of noise of each step, which only flow-matching "
                    "schedulers have; take cache_steps=first_block"
                )
            return find_latents(module, args, kwargs)

        config = SeaCacheConfig(
            threshold=self.threshold,
            residual_order=self.order,
            retention_steps=self.warm_up,
            cache_end_steps=self.cool_down,
            max_consecutive_cached=self.max_skipped,
            power_exp=self.power,
            raw_vision_callback=get_latents,
        )
        apply_sea_cache(denoiser, config)

    def force(self) -> "SeaCache":
        """Equal latents have not changed."""
        return replace(self, threshold=10.0, warm_up=1, cool_down=0, max_skipped=0)
