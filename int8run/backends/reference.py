"""The definition itself as a backend: exact, slow, runs everywhere."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.backends.base import Limits
from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Reference:
    """What every other backend is tested against."""

    name: ClassVar[str] = "reference"
    limits: ClassVar[Limits] = Limits()

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """The integers as they are, [N, K]."""
        return weight.qdata

    def linear(self, x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        """x: [M, K] -> [M, N]."""
        q, x_scale = quantize_rowwise(x)
        return int8_linear(q, x_scale, packed, w_scale, bias).to(x.dtype)
