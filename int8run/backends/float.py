"""The layer that INT8 has to beat: a float product in the place of a backend.

With `backend=float` every layer stays as it is; `Float` then only holds the integers that `save=` and the
cache want. `backend=auto` and `task=bench` time a `TimedFloat` beside the INT8 backends, by the same calls.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.base import FusedBranch, Limits, QuantizedInput
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.reference import transform_rows
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Float:
    """The float layer. As a backend of an `Int8Linear`: integer weights, float inputs."""

    name: ClassVar[str] = "float"
    limits: ClassVar[Limits] = Limits(devices=("cpu", "cuda", "xpu"))

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
        """x: [M, K], transformed and not quantized."""
        transformed = transform_rows(x, factor, rotation, gelu_from)
        # nothing reads the scale; the field has to hold a tensor
        return QuantizedInput(transformed, scale=x)

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
        y = F.linear(x.q.float(), packed.float()) * w_scale
        return (y if bias is None else y + bias).to(dtype)


@dataclass(frozen=True)
class TimedFloat(Float):
    """`F.linear` with the weight that the integers stand for, to be timed.

    Args:
        dtype: of weight and input.
    """

    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, ..."""
        return str(self.dtype).removeprefix("torch.")

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """[N, K], in float."""
        return weight.dequantize(self.dtype)

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
        if bias is not None:
            bias = bias.to(dtype)
        return F.linear(x.q, packed, bias)
