"""Per-row int8 quantization in few passes of plain torch, with the reference's numbers.

The backends `torch_int_mm` and `onednn` quantize by it.
"""

from math import ceil

import torch
from torch import Tensor

from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY, transform_rows

# memory of one float32 copy of rows that are in the works; a video's 75,000 rows would take gigabytes at once
CHUNK_BYTES = 2**28


def count_chunks(rows: int, columns: int) -> int:
    """Into how many chunks rows are cut, so that a float32 copy of one is at most CHUNK_BYTES.

    One in compiled code: a compiler fuses the steps, and a loop over rows would be compiled anew for each
    number of them.
    """
    if torch.compiler.is_compiling():
        return 1
    return max(1, ceil(4 * rows * columns / CHUNK_BYTES))


def quantize_transformed(
    x: Tensor,
    factor: Tensor | None,
    rotation: Rotation | None,
    gelu_from: int | None,
    zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """Transform and quantize rows, a chunk of them after the other. Temporary memory does not grow with them.

    Args:
        x: [M, K].
        factor: as for `transform_rows`.
        rotation: as for `transform_rows`.
        gelu_from: as for `transform_rows`.
        zero_point: as for `quantize_rowwise`.

    Returns:
        As `quantize_rowwise`.
    """
    n_chunks = count_chunks(*x.shape)
    if n_chunks == 1:
        return quantize_rowwise(transform_rows(x, factor, rotation, gelu_from), zero_point)
    q = x.new_empty(x.shape, dtype=torch.uint8 if zero_point else torch.int8)
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    for part, part_q, part_scale in zip(
        x.chunk(n_chunks), q.chunk(n_chunks), scale.chunk(n_chunks), strict=True
    ):
        rounded, its_scale = quantize_rowwise(transform_rows(part, factor, rotation, gelu_from), zero_point)
        part_q.copy_(rounded)
        part_scale.copy_(its_scale)
    return q, scale


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
