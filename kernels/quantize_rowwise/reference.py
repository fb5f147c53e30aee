"""Per-row symmetric int8 quantization, written to be read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.hadamard.reference import Rotation, rotate_groups

INT8_MAX = 127
# keeps the division finite for an all-zero row; far below any scale that occurs
TINY = 1e-30


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with its own scale: `scale = absmax / 127`, ties to even.

    Args:
        x: [..., K], any float dtype; the arithmetic is float32.

    Returns:
        q: int8 [..., K] in -127..127, and scale: float32 [..., 1], so that `x ~ q * scale`.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=TINY)
    q = (x / scale).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8), scale


def check_factor(factor: Tensor | None, columns: int) -> None:
    """Raise ValueError unless a kernel can read a factor for each column, or there is none."""
    if factor is None:
        return
    if factor.shape != (columns,) or factor.dtype != torch.float32 or not factor.is_contiguous():
        raise ValueError(
            f"factor must be contiguous float32 [{columns}], not {factor.dtype} {list(factor.shape)}"
        )


def apply_gelu_to_columns(x: Tensor, start: int | None) -> Tensor:
    """Apply GELU (tanh) to the columns from `start` on; None or -1: none. x: [..., K]."""
    if start is None or start < 0:
        return x
    gelu = F.gelu(x[..., start:], approximate="tanh")
    return gelu if start == 0 else torch.cat([x[..., :start], gelu], dim=-1)


def transform_rows(
    x: Tensor,
    factor: Tensor | None = None,
    rotation: Rotation | None = None,
    gelu_from: int | None = None,
) -> Tensor:
    """Apply what may happen to rows before rounding: GELU, a factor per column, a rotation of groups.

    Args:
        x: [..., K].
        factor: [K] or None.
        rotation: of groups of g columns, where g divides K; or None.
        gelu_from: first column that goes through GELU; None or -1: none.

    Returns:
        [..., K] in x's dtype.
    """
    x = apply_gelu_to_columns(x, gelu_from)
    if factor is not None:
        x = (x.float() * factor).to(x.dtype)
    return x if rotation is None else rotate_groups(x, rotation.matrix.to(x.dtype))
