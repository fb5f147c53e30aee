"""The same as the reference in few passes over the memory, for CPUs. Results are equal bit for bit.

torch converts 8-bit floats one by one on a CPU; a look-up in the table of their 256 values is several times
faster.
"""

from math import ceil

import torch
from torch import Tensor

from int8run.kernels.dequantize.reference import (
    E2M1,
    FP8,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    check_global_scale,
    check_qdata,
    infer_block_shape,
    unswizzle_scales,
)


def dequantize_int8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, torch.int8)
    blocks = infer_block_shape(qdata.shape, scale.shape, block)
    return multiply_blocks_(qdata.float(), scale.float(), blocks).to(dtype)


def dequantize_fp8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    blocks = infer_block_shape(qdata.shape, scale.shape, block)
    return multiply_blocks_(decode_fp8(qdata), scale.float(), blocks).to(dtype)


def dequantize_mxfp8(
    qdata: Tensor, scale: Tensor, *, swizzled: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    n, k = qdata.shape
    scale = unswizzle_scales(scale, torch.float8_e8m0fnu, n, ceil(k / MXFP8_BLOCK), swizzled=swizzled)
    return multiply_blocks_(decode_fp8(qdata), scale, (1, MXFP8_BLOCK)).to(dtype)


def dequantize_nvfp4(
    qdata: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    swizzled: bool,
    high_first: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, torch.uint8)
    check_global_scale(global_scale)
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    scale = unswizzle_scales(scale, torch.float8_e4m3fn, n, ceil(k / NVFP4_BLOCK), swizzled=swizzled)
    # a table of the two numbers of each byte, [256, 2]
    values = torch.tensor(E2M1, device=qdata.device)
    high, low = values.repeat_interleave(16), values.repeat(16)
    pairs = torch.stack((high, low) if high_first else (low, high), dim=-1)
    weight = pairs.index_select(0, qdata.flatten().int()).view(n, k)  # [N K / 2, 2] -> [N, K]
    return multiply_blocks_(weight, scale, (1, NVFP4_BLOCK)).mul_(global_scale.float()).to(dtype)


def decode_fp8(qdata: Tensor) -> Tensor:
    """8-bit floats as new float32 numbers of the same shape."""
    if qdata.is_cuda:
        return qdata.float()
    values = torch.arange(256, dtype=torch.uint8, device=qdata.device).view(qdata.dtype).float()
    return values.index_select(0, qdata.view(torch.uint8).flatten().int()).view(qdata.shape)


def multiply_blocks_(weight: Tensor, scale: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Multiply each block by its scale, in place.

    Args:
        weight: float32 [N, K].
        scale: float32, one number for each block.
        blocks: rows and columns of a block.

    Returns:
        `weight`.
    """
    n, k = weight.shape
    height, width = blocks
    scale = scale.reshape(ceil(n / height), ceil(k / width))
    if height not in (1, n):  # with 1 or n, broadcasting does it
        scale = scale.repeat_interleave(height, dim=0)[:n]
    if width >= k:
        return weight.mul_(scale)
    if k % width:
        return weight.mul_(scale.repeat_interleave(width, dim=1)[:, :k])
    weight.view(n, -1, width).mul_(scale[:, :, None])
    return weight
