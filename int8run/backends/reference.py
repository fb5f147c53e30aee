"""The definition as a backend: exact, slow, runs everywhere.

Tests compare every other backend with it, and `backend=auto` falls back to it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.backends.base import FusedBranch, Limits, QuantizedInput
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise, transform_rows
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Reference:
    """What every other backend is tested against."""

    name: ClassVar[str] = "reference"
    limits: ClassVar[Limits] = Limits()

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The integers as they are, [N, K]."""
        return weight.qdata

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> int8 [M, K] and scales [M, 1]."""
        q, scale = quantize_rowwise(transform_rows(x, factor, rotation, gelu_from))
        return QuantizedInput(q, scale)

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """x: [M, K] -> [M, N]."""
        return int8_linear(x.q, x.scale, packed, w_scale, bias).to(dtype)
