"""Quantized weights of checkpoint files back into floats, one function for each format, written to be read.

Each computes `value of the stored number * scale` in float32 and rounds to `dtype` at the end. Files may pad
N and K; the result has the padded shape, and the caller cuts (`quant/packed_weight.py`). `eager.py` and
`kernel.py` give the same bits faster.
"""

from math import ceil

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MXFP8_BLOCK = 32
NVFP4_BLOCK = 16
# the value of each code: sign, two bits of exponent, one of mantissa
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize_int8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`W[n, k] = qdata[n, k] * s`.

    ComfyUI's int8_tensorwise (per tensor and per row) and int8_blockwise, and Wan-INT8's groups.

    Args:
        qdata: int8 [N, K], -128 included.
        scale: any float dtype; its shape shows the layout, see `infer_block_shape`.
        block: the block size, needed only where N or K is not a multiple of it.
        dtype: of the result.

    Returns:
        dtype [N, K].

    Raises:
        ValueError: when qdata is not int8 [N, K] or the scale fits no layout.
    """
    check_qdata(qdata, torch.int8)
    return (qdata.float() * expand_scales(scale, qdata.shape, block)).to(dtype)


def dequantize_fp8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`W[n, k] = qdata[n, k] * s`.

    float8_e4m3fn, float8_e5m2, their _rowwise, _blockwise and _block3d, and DeepSeek's fp8. NaN stays NaN,
    e5m2's infinities stay infinite.

    Args:
        qdata: float8_e4m3fn or float8_e5m2 [N, K].
        scale: any float dtype; its shape shows the layout, see `infer_block_shape`.
        block: the block size, needed only where N or K is not a multiple of it.
        dtype: of the result.

    Returns:
        dtype [N, K].

    Raises:
        ValueError: when qdata is not fp8 [N, K] or the scale fits no layout.
    """
    check_qdata(qdata, *FP8)
    return (qdata.float() * expand_scales(scale, qdata.shape, block)).to(dtype)


def dequantize_mxfp8(
    qdata: Tensor, scale: Tensor, *, swizzled: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`W[n, k] = qdata[n, k] * 2**(scale[n, k // 32] - 127)`: mxfp8 of ComfyUI and of the OCP MX standard.

    As in the standard, scale 255 is NaN and scale 0 is 2**-127; comfy-kitchen reads them as infinity and
    0.

    Args:
        qdata: float8_e4m3fn or float8_e5m2 [N, K].
        scale: e8m0 [N, ceil(K / 32)], float8_e8m0fnu or its bytes as uint8.
        swizzled: whether the scales lie in cuBLAS's tiles (ComfyUI), see `compute_swizzled_offsets`, or in
            rows (compressed-tensors, ModelOpt). The shape cannot always show which.
        dtype: of the result.

    Returns:
        dtype [N, K].

    Raises:
        ValueError: when qdata is not fp8 [N, K] or the scales do not fit.
    """
    check_qdata(qdata, *FP8)
    n, k = qdata.shape
    scale = unswizzle_scales(scale, torch.float8_e8m0fnu, n, ceil(k / MXFP8_BLOCK), swizzled=swizzled)
    scale = scale.repeat_interleave(MXFP8_BLOCK, dim=1)[:, :k]  # [N, ceil(K / 32)] -> [N, K]
    return (qdata.float() * scale).to(dtype)


def dequantize_nvfp4(
    qdata: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    swizzled: bool,
    high_first: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`W[n, k] = E2M1[code[n, k]] * scale[n, k // 16] * global_scale`: nvfp4.

    Code times block scale is exact in float32, so that the product is rounded once.

    Args:
        qdata: uint8 [N, K / 2], two codes in a byte.
        scale: e4m3 [N, ceil(K / 16)], float8_e4m3fn or its bytes as uint8.
        global_scale: one number, `weight_scale_2`; of `weight_global_scale` (compressed-tensors, lightx2v)
            the reciprocal.
        swizzled: whether the block scales lie in cuBLAS's tiles (ComfyUI), see `compute_swizzled_offsets`, or
            in rows (ModelOpt).
        high_first: whether even columns are in the high half of a byte (ComfyUI) or in the low half
            (ModelOpt, torchao).
        dtype: of the result.

    Returns:
        dtype [N, K].

    Raises:
        ValueError: when qdata is not uint8 [N, K / 2] or the scales do not fit.
    """
    check_qdata(qdata, torch.uint8)
    check_global_scale(global_scale)
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    scale = unswizzle_scales(scale, torch.float8_e4m3fn, n, ceil(k / NVFP4_BLOCK), swizzled=swizzled)
    scale = scale.repeat_interleave(NVFP4_BLOCK, dim=1)[:, :k]  # [N, ceil(K / 16)] -> [N, K]
    high, low = qdata >> 4, qdata & 15
    halves = (high, low) if high_first else (low, high)
    codes = torch.stack(halves, dim=-1).flatten(1)  # [N, K / 2, 2] -> [N, K]
    values = torch.tensor(E2M1, device=qdata.device)[codes.int()]
    return (values * scale * global_scale.float()).to(dtype)


def check_qdata(qdata: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless qdata is a matrix of one of the dtypes."""
    if qdata.dtype not in dtypes or qdata.dim() != 2 or not qdata.numel():
        names = " or ".join(map(str, dtypes))
        raise ValueError(
            f"qdata is {qdata.dtype} {list(qdata.shape)}; allowed is a matrix of {names} that is not empty"
        )


def check_global_scale(scale: Tensor) -> None:
    """Raise ValueError unless the scale is one number."""
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(
            f"the global scale is {scale.dtype} {list(scale.shape)}; allowed is one floating-point number"
        )


def infer_block_shape(weight: torch.Size, scale: torch.Size, block: int | None) -> tuple[int, int]:
    """How many rows and columns of a weight share one scale, from the two shapes.

    | scale | rows, columns |
    |---|---|
    | one number: [], [1], [1, 1] | N, K |
    | [N], [N, 1] | 1, K |
    | [N, K / g], [N, K / g, 1] | 1, g |
    | [N / b, K / b] | b, b |

    The shape decides; labels in files are often wrong. Without `block` the divisions must leave no rest; with
    it b and g are `block`, and the last block of a row or column may be partial.

    Args:
        weight: shape of the weight, [N, K].
        scale: shape of the scale.
        block: the block size, if it is known.

    Raises:
        ValueError: when the scale has none of these shapes.
    """
    n, k = weight
    if scale.numel() == 1:
        return n, k
    if tuple(scale) in ((n,), (n, 1)):
        return 1, k
    is_block3d = len(scale) == 3 and (scale[0], scale[2]) == (n, 1)
    grid = tuple(scale[:2]) if is_block3d else tuple(scale)
    if len(grid) == 2 and 0 not in grid:
        width = max(k // grid[1] if block is None else block, 1)
        height = 1 if grid[0] == n else width
        may_be_partial = block is not None
        is_whole = n % height == 0 and k % width == 0
        if (may_be_partial or is_whole) and grid == (ceil(n / height), ceil(k / width)):
            return height, width
    blocks = f"blocks of {block}"
    if block is None:
        blocks = "whole blocks (give `block` if the last ones are partial)"
    raise ValueError(
        f"a scale of shape {list(scale)} fits no layout of a weight [{n}, {k}] in {blocks}; allowed are one "
        "number, "
        "[N], [N, 1], [N / b, K / b], [N, K / g] and [N, K / g, 1]"
    )


def expand_scales(scale: Tensor, weight: torch.Size, block: int | None) -> Tensor:
    """The scale of each entry of a weight.

    Args:
        scale: one for each block.
        weight: shape of the weight, [N, K].
        block: the block size, if it is known.

    Returns:
        float32 [N, K].
    """
    height, width = infer_block_shape(weight, scale.shape, block)
    n = torch.arange(weight[0], device=scale.device)
    k = torch.arange(weight[1], device=scale.device)
    grid = scale.float().reshape(ceil(weight[0] / height), ceil(weight[1] / width))
    return grid[(n // height)[:, None], (k // width)[None, :]]


def view_scale_bytes(scale: Tensor, dtype: torch.dtype, rows: int, columns: int, *, swizzled: bool) -> Tensor:
    """Block scales as uint8, checked against the blocks they serve.

    Args:
        scale: dtype or uint8, [rows, columns]; swizzled padded to [multiple of 128, multiple of 4] and of any
            shape with as many elements, because the shape is nominal.
        dtype: of the scales, of 8 bits.
        rows: of blocks, N.
        columns: of blocks, K over the block size.
        swizzled: whether the scales lie in cuBLAS's tiles.

    Raises:
        ValueError: when dtype or shape do not fit.
    """
    padded = [ceil(rows / 128) * 128, ceil(columns / 4) * 4]
    fits = scale.numel() == padded[0] * padded[1] if swizzled else list(scale.shape) == [rows, columns]
    if not fits or scale.dtype not in (dtype, torch.uint8):
        layout = f"swizzled, in {padded}" if swizzled else f"in [{rows}, {columns}]"
        raise ValueError(
            f"block scales {scale.dtype} {list(scale.shape)} do not fit {rows} x {columns} blocks; "
            f"allowed are {dtype} or its bytes as torch.uint8, {layout}"
        )
    return scale.view(torch.uint8)


def compute_swizzled_offsets(rows: int, columns: int) -> Tensor:
    """Where cuBLAS's block-scaled products keep the scale of each block, in elements from the start.

    Tiles of 128 x 4 scales follow each other row by row, 512 scales each. In a tile the four scales of a row
    stand together; rows 0, 32, 64 and 96 come first, then 1, 33, 65 and 97, and so on:

        row r of the tile is at 16 * (r % 32) + 4 * (r // 32)

    Returns:
        int64 [rows, columns].
    """
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = r // 128 * ceil(columns / 4) + c // 4
    in_tile = r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return tile * 512 + in_tile


def unswizzle_scales(scale: Tensor, dtype: torch.dtype, rows: int, columns: int, *, swizzled: bool) -> Tensor:
    """Scales in rows, whatever their layout was. Arguments as of `view_scale_bytes`.

    Returns:
        float32 [rows, columns].
    """
    scale = view_scale_bytes(scale, dtype, rows, columns, swizzled=swizzled)
    if swizzled:
        scale = scale.flatten()[compute_swizzled_offsets(rows, columns).to(scale.device)]
    return scale.view(dtype).float()
