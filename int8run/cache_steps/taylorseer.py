"""TaylorSeer: outputs of attention are extrapolated from earlier steps by a Taylor series.

Every `interval`-th step is computed; between them each module's output is predicted from its differences over
the computed steps.

Source: Liu et al. 2025, "From Reusing to Forecasting", arXiv:2503.06923. Hooks: diffusers.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from int8run.cache_steps.base import ATTENTION, BLOCKS, CacheCalls, StepCacheSettings, check_computed_steps
from int8run.errors import check_bool, check_choice, check_range

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(StepCacheSettings):
    """Predicts the outputs of attention, or with `lite` the output of the whole denoiser.

    Args:
        interval: one step in as many is computed.
        warm_up: first steps that are computed.
        stop: number of the step from which all are computed again; None: none.
        order: of the series; as many computed steps and one more are kept.
        dtype: of what is kept.
        lite: skip whole blocks, and predict what the last projection gives.
    """

    interval: int = 3
    warm_up: int = 3
    stop: int | None = None
    order: int = 1
    dtype: str = "bfloat16"
    lite: bool = False
    name: ClassVar[str] = "taylorseer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cache_steps.interval", self.interval, 2, 100, whole=True)
        check_range("cache_steps.warm_up", self.warm_up, 1, 1000, whole=True)
        if self.stop is not None:
            check_range("cache_steps.stop", self.stop, 1, 1000, whole=True)
        check_range("cache_steps.order", self.order, 0, 4, whole=True)
        check_choice("cache_steps.dtype", self.dtype, DTYPES)
        check_bool("cache_steps.lite", self.lite)

    @property
    def skips(self) -> str:
        """Whole blocks with `lite`, else the attention in them."""
        return BLOCKS if self.lite else ATTENTION

    def check_steps(self, num_steps: int) -> None:
        """Refuse more steps of warm-up than there are, or a stop within them."""
        check_computed_steps(f"cache_steps.warm_up={self.warm_up}", self.warm_up, num_steps)
        if self.stop is not None:
            check_computed_steps(f"cache_steps.warm_up={self.warm_up}", self.warm_up, self.stop)

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks."""
        # diffusers takes seconds to import, and settings are composed without it
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        attention = [re.escape(name) for name in list_attention(denoiser)]
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warm_up,
            disable_cache_after_step=self.stop,
            max_order=self.order,
            taylor_factors_dtype=getattr(torch, self.dtype),
            use_lite_mode=self.lite,
            # by themselves the hooks find modules that are called `attn`, and `attn1` is none
            cache_identifiers=None if self.lite else attention,
        )
        if attention or self.lite:  # without any the hooks would look for names
            apply_taylorseer_cache(denoiser, config)

    def force(self) -> "TaylorSeer":
        """The second step is a predicted one."""
        return replace(self, interval=2, warm_up=1, stop=None, dtype="float32")


def list_attention(denoiser: nn.Module) -> list[str]:
    """The names of a denoiser's attention modules."""
    # diffusers takes seconds to import, and settings are composed without it
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return [name for name, module in denoiser.named_modules() if isinstance(module, _ATTENTION_CLASSES)]
