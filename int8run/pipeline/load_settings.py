"""What decides how a model is loaded: `step_settings` makes it of a run's settings, `load` takes it."""

from dataclasses import dataclass

import torch

from int8run.backends.base import Backend
from int8run.models.family import (
    AutoFamily,
    ModelFamily,
    ModelSource,
)
from int8run.models.sampling import Sampling
from int8run.text_encoders.base import TextEncoders


@dataclass(frozen=True)
class LoadSettings:
    """What decides how a model is loaded.

    Args:
        model: where it is.
        model_type: its family, or `auto`.
        sampling: with all defaults filled in.
        clip: which text encoders are to be quantized.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N`, `mps`.
        attention: diffusers' attention backend.
        offload: diffusers' offloading, see `set_offload`.
        backend: of the INT8 layers; None where there will be none.
        needs_float_denoiser: read all weights of the denoiser; else it is a skeleton, to be filled as needed.
        needs_float_encoders: read the text encoders that `clip` changes, too.
    """

    model: ModelSource
    model_type: ModelFamily | AutoFamily
    sampling: Sampling
    clip: TextEncoders
    device: str
    attention: str
    offload: str
    backend: Backend | None
    needs_float_denoiser: bool
    needs_float_encoders: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the float model."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return dtype
