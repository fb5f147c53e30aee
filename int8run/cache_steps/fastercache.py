"""FasterCache: attention is extrapolated from the last two steps that computed it, guidance from its half.

Where a pipeline gives the prompt and the negative one in one batch, the negative half is skipped in some
steps and estimated from the other by the low and the high frequencies that both differ by.

Source: Lv et al. 2024, "FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality",
arXiv:2410.19355. Hooks: diffusers, which calls them experimental.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from int8run.cache_steps.base import (
    ATTENTION,
    TIMESTEPS,
    CacheCalls,
    StepCacheSettings,
    check_timesteps,
    quiet_logger,
)
from int8run.errors import check_bool, check_range

# the first steps have nothing to be extrapolated from
FIRST_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class FasterCache(StepCacheSettings):
    """Extrapolates the outputs of attention, and with `guidance` the negative prompt's part.

    Args:
        interval: one call in as many of each attention is computed.
        timesteps: between which the others are extrapolated, on a scale from 1000, which is noise, to 0.
        weight: of the last change that is added again.
        guidance: whether the negative half of a batch is skipped, too; nothing where there is none.
        guidance_interval: one step in as many computes it.
        guidance_timesteps: between which the others estimate it.
        low_weight: by which the difference in low frequencies grows in each of them.
        high_weight: the same of high ones.
    """

    interval: int = 2
    timesteps: Sequence[int] = (-1, 681)
    weight: float = 0.5
    guidance: bool = True
    guidance_interval: int = 5
    guidance_timesteps: Sequence[int] = (-1, 641)
    low_weight: float = 1.1
    high_weight: float = 1.1
    name: ClassVar[str] = "fastercache"
    skips: ClassVar[str] = ATTENTION
    hooks_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cache_steps.interval", self.interval, 2, 100, whole=True)
        check_range("cache_steps.guidance_interval", self.guidance_interval, 2, 100, whole=True)
        check_bool("cache_steps.guidance", self.guidance)
        for setting in ("weight", "low_weight", "high_weight"):
            check_range(f"cache_steps.{setting}", getattr(self, setting), 0, 10)
        for setting in ("timesteps", "guidance_timesteps"):
            limits = check_timesteps(f"cache_steps.{setting}", getattr(self, setting))
            object.__setattr__(self, setting, limits)  # the class is frozen

    def check_steps(self, num_steps: int) -> None:
        """Which steps are within `timesteps` is up to the scheduler."""

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        def get_timestep() -> float:
            has_history = calls.position.step >= FIRST_STEPS
            return calls.position.timestep if has_history else float("inf")

        config = FasterCacheConfig(
            spatial_attention_block_skip_range=self.interval,
            spatial_attention_timestep_skip_range=tuple(self.timesteps),
            unconditional_batch_skip_range=self.guidance_interval,
            unconditional_batch_timestep_skip_range=tuple(self.guidance_timesteps),
            alpha_low_frequency=self.low_weight,
            alpha_high_frequency=self.high_weight,
            attention_weight_callback=lambda module: self.weight,
            tensor_format=calls.output_format,
            is_guidance_distilled=not (self.guidance and calls.is_batched),
            current_timestep_callback=get_timestep,
        )
        with quiet_logger(apply_faster_cache.__module__):  # it calls itself experimental, with each image
            apply_faster_cache(denoiser, config)

    def force(self) -> "FasterCache":
        """Everything is skipped that can be, and no difference grows."""
        widest = (-1, TIMESTEPS + 1)
        return replace(
            self,
            interval=100,
            timesteps=widest,
            guidance_interval=100,
            guidance_timesteps=widest,
            low_weight=1.0,
            high_weight=1.0,
        )
