"""Pyramid attention broadcast: attention is computed in every few steps, and its output reused between them.

Source: Zhao et al. 2024, "Real-Time Video Generation with Pyramid Attention Broadcast", arXiv:2408.12588.
Hooks: diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from int8run.cache_steps.base import ATTENTION, TIMESTEPS, CacheCalls, StepCacheSettings, check_timesteps
from int8run.errors import check_range


@dataclass(frozen=True, kw_only=True)
class PyramidAttentionBroadcast(StepCacheSettings):
    """Reuses the outputs of attention.

    Args:
        spatial: one call in as many of self-attention is computed; 1: all.
        temporal: the same of attention over frames, in models that have it apart.
        cross: the same of attention to the text.
        timesteps: between which they are reused, on a scale from 1000, which is noise, to 0.
    """

    spatial: int = 2
    temporal: int = 2
    cross: int = 3
    timesteps: Sequence[int] = (100, 800)
    name: ClassVar[str] = "pab"
    skips: ClassVar[str] = ATTENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("spatial", "temporal", "cross"):
            check_range(f"cache_steps.{setting}", getattr(self, setting), 1, 100, whole=True)
        object.__setattr__(self, "timesteps", check_timesteps("cache_steps.timesteps", self.timesteps))

    def check_steps(self, num_steps: int) -> None:
        """Which steps are within `timesteps` is up to the scheduler."""

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.temporal,
            cross_attention_block_skip_range=self.cross,
            spatial_attention_timestep_skip_range=tuple(self.timesteps),
            temporal_attention_timestep_skip_range=tuple(self.timesteps),
            cross_attention_timestep_skip_range=tuple(self.timesteps),
            current_timestep_callback=lambda: calls.position.timestep,
        )
        apply_pyramid_attention_broadcast(denoiser, config)

    def force(self) -> "PyramidAttentionBroadcast":
        """Every second call reuses the first."""
        return replace(self, spatial=2, temporal=2, cross=2, timesteps=(-1, TIMESTEPS + 1))
