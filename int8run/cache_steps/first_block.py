"""First-block cache: the first block decides whether all others are computed.

Where its residual has hardly changed since the last computed step, the others' residual of that step is added
in place of computing them.

Source: chengzeyi/ParaAttention; after TeaCache, Liu et al. 2024, arXiv:2411.19108. Hooks: diffusers.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from int8run.cache_steps.base import BLOCKS, CacheCalls, StepCacheSettings
from int8run.errors import check_range


@dataclass(frozen=True, kw_only=True)
class FirstBlock(StepCacheSettings):
    """Skips all blocks but the first.

    Args:
        threshold: mean change of the first block's residual, over its mean size, up to which they are.
    """

    threshold: float = 0.1
    name: ClassVar[str] = "first_block"
    skips: ClassVar[str] = BLOCKS
    needs_equal_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cache_steps.threshold", self.threshold, 0, 1)

    def check_steps(self, num_steps: int) -> None:
        """It has no steps of its own that are always computed."""

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=self.threshold))

    def force(self) -> "FirstBlock":
        """Equal calls have equal residuals."""
        return replace(self, threshold=1.0)
