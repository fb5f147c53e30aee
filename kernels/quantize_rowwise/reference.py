"""Per-row symmetric int8 quantization, written to be read."""

import torch
from torch import Tensor

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
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
