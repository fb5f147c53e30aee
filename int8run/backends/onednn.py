"""oneDNN through torch's own operators: weights packed once, activations as unsigned bytes.

`backend=auto` times it on CPUs. It fuses neither a GELU nor a LoRA branch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.backends.base import (
    INT8_CPU_FEATURES,
    MAX_UNSIGNED_PRODUCTS,
    FusedBranch,
    Limits,
    QuantizedInput,
)
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.eager import quantize_transformed
from int8run.quant.weight import QuantizedWeight

# signed activations fall to oneDNN's reference path, 800 times slower on AVX512-VNNI; q + 128 with a zero
# point of 128 does not
ZERO_POINT = 128


@torch.library.custom_op("int8run::onednn_linear", mutates_args=())
def onednn_linear(
    q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product with scales and bias, as one operator.

    Inductor requires a packed weight to be a constant of its graph; inside an operator of its own it does not
    see the weight.

    Args:
        q: uint8 [M, K].
        x_scale: float32 [M, 1].
        packed: oneDNN's layout of an int8 [N, K].
        w_scale: float32 [N].
        bias: float32 [N] or None.
        dtype: of the result.

    Returns:
        dtype [M, N].
    """
    no_zero_points = torch.zeros(w_scale.shape[0], dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, ZERO_POINT, packed, w_scale, no_zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale)
    return y.to(dtype)


@onednn_linear.register_fake
def _(
    q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return w_scale.new_empty((q.shape[0], w_scale.shape[0]), dtype=dtype)


@torch.library.custom_op("int8run::onednn_linear_once", mutates_args=())
def onednn_linear_once(
    q: Tensor, x_scale: Tensor, qdata: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`onednn_linear` with an int8 weight [N, K] as it is: no graph can hold oneDNN's opaque layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(qdata, None)
    y: Tensor = onednn_linear(q, x_scale, packed, w_scale, bias, dtype)
    return y


@onednn_linear_once.register_fake
def _(
    q: Tensor, x_scale: Tensor, qdata: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return w_scale.new_empty((q.shape[0], w_scale.shape[0]), dtype=dtype)


@dataclass(frozen=True)
class OneDnn:
    """Prepacked u8 x s8: weight scales inside oneDNN, token scales and bias in one pass after it."""

    name: ClassVar[str] = "onednn"
    limits: ClassVar[Limits] = Limits(
        devices=("cpu",),
        cpu_features=INT8_CPU_FEATURES,
        uses_onednn=True,
        max_in_features=MAX_UNSIGNED_PRODUCTS,
    )

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """oneDNN's private blocked layout, [K, N]; opaque, so it cannot be saved."""
        packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.qdata, None)
        return packed

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> uint8 [M, K] and scales [M, 1]."""
        q, scale = quantize_transformed(x, factor, rotation, gelu_from, ZERO_POINT)
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
        y: Tensor = onednn_linear(x.q, x.scale, packed, w_scale, bias, dtype)
        return y

    def multiply_once(
        self, x: QuantizedInput, weight: QuantizedWeight, *, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        """x: [M, K] -> [M, N], with a weight that is packed for this one product."""
        w_scale = weight.scale[:, 0].contiguous()
        y: Tensor = onednn_linear_once(x.q, x.scale, weight.qdata, w_scale, bias, dtype)
        return y
