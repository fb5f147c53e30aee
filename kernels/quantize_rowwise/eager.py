"""Per-row int8 quantization in few passes of plain torch, with the reference's numbers.

The backends `torch_int_mm` and `onednn` quantize by it.
"""

import torch
from torch import Tensor

from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY


def quantize_rowwise(x: Tensor, zero_point: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize as the reference does, in one buffer that stays in cache.

    Args:
        x: [..., K], any float dtype.
        zero_point: 0 for int8; 128 stores `q + 128` as uint8.

    Returns:
        q: int8 or uint8 [..., K], and scale: float32 [..., 1].
    """
    x = x.float()
    buffer = x.abs()
    scale = buffer.amax(dim=-1, keepdim=True).div_(INT8_MAX).clamp_(min=TINY)
    # no clamp: |x| / scale is at most 127
    torch.div(x, scale, out=buffer).round_()
    if zero_point:
        return buffer.add_(zero_point).to(torch.uint8), scale
    return buffer.to(torch.int8), scale
