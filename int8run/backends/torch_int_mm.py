"""`torch._int_mm`: torch's own int8 product, with the scales applied after it.

It needs nothing but torch, so it is the candidate of `backend=auto` that most machines can run.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.base import INT8_CPU_FEATURES, MAX_SIGNED_PRODUCTS, FusedBranch, Limits, QuantizedInput
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.eager import count_chunks, quantize_transformed
from int8run.quant.weight import QuantizedWeight

# cuBLASLt's int8 product takes more than 16 rows, and K and N in multiples of 8 (pytorch PR 178469). On CPUs
# with K = 1 the transpose has two strides of 1, and torch writes nothing.
CUDA_MIN_ROWS, MULTIPLE = 17, 8


@dataclass(frozen=True)
class TorchIntMM:
    """Works wherever torch has an int8 product; repacks the weight at every call on CPUs."""

    name: ClassVar[str] = "torch_int_mm"
    limits: ClassVar[Limits] = Limits(
        devices=("cpu", "cuda", "xpu"),
        cpu_features=INT8_CPU_FEATURES,
        uses_onednn=True,
        max_in_features=MAX_SIGNED_PRODUCTS,
    )

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The integers, padded with zeros to multiples of 8: alike everywhere, so that they can be moved.

        [N, K].
        """
        n, k = weight.qdata.shape
        return pad_rows_and_columns(weight.qdata, -n % MULTIPLE, -k % MULTIPLE)

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> int8 and scales [M, 1]; padded for `_int_mm`, so M and K may be larger."""
        q, scale = quantize_transformed(x, factor, rotation, gelu_from)
        rows, k = q.shape
        missing_rows = max(0, CUDA_MIN_ROWS - rows) if q.is_cuda else 0
        return QuantizedInput(pad_rows_and_columns(q, missing_rows, -k % MULTIPLE), scale)

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
        """x: [M, K] -> [M, N]. The sums are of a chunk of rows at a time, not of all of them."""
        rows, columns = x.scale.shape[0], w_scale.shape[0]
        n_chunks = count_chunks(rows, columns)
        if n_chunks == 1:
            return multiply_rows(x.q, x.scale, packed, w_scale, bias).to(dtype)
        y = x.scale.new_empty((rows, columns), dtype=dtype)
        # q has no rows of padding here: few rows are one chunk
        chunks = (tensor.chunk(n_chunks) for tensor in (x.q, x.scale, y))
        for q, scale, part in zip(*chunks, strict=True):
            part.copy_(multiply_rows(q, scale, packed, w_scale, bias))
        return y


def multiply_rows(q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product with scales and bias. q: [M or more, K or more] -> float32 [M, N], without the padding."""
    rows, columns = x_scale.shape[0], w_scale.shape[0]
    accumulated = torch._int_mm(q, packed.T)[:rows, :columns]  # int32
    y = accumulated.float().mul_(w_scale)
    return y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale)


def pad_rows_and_columns(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with so many more rows and columns of zeros; the same one where it needs none."""
    if not rows and not columns:
        return matrix  # torch would copy it
    return F.pad(matrix, (0, columns, 0, rows))
