"""The same as the reference in Triton, in one read and one store. Results are equal bit for bit.

Every format is decoded by integer arithmetic: native fp8 conversions begin at sm_89, and these are exact on
any device.

One program computes 2,048 columns of one row. They are seen as GROUPS groups of GROUP columns, each within
one block of the weight, so that its scale is read once:

      row n of W [N, K]
        +-----------+-----------+-----------+---       +-----------+
        |  GROUP    |  GROUP    |  GROUP    |   ...    |           |      GROUPS * GROUP = 2,048
        +-----------+-----------+-----------+---       +-----------+
             s           s           s           ...         s            one scale for each

GROUP is the largest power of two in the block's width; of a scale for the whole row, all 2,048.
"""

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8run.kernels.dequantize.reference import (
    FP8,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    check_global_scale,
    check_qdata,
    infer_block_shape,
    view_scale_bytes,
)

# columns of a program: 16 bytes of qdata for each of 128 threads
BLOCK_COLUMNS = 2048
FP8_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@triton.jit
def _decode(codes, FORMAT: tl.constexpr):  # Triton reads annotations
    """The values of codes, float32 of the same shape."""
    if FORMAT == "int8" or FORMAT == "float32":
        values = codes.to(tl.float32)
    elif FORMAT == "e8m0":
        # an exponent of float32, whose 0 and 255 mean something else there: 0 is 2**-127, which is subnormal,
        # 255 is NaN
        bits = codes.to(tl.int32) << 23
        bits = tl.where(codes == 0, 0x00400000, tl.where(codes == 255, 0x7FC00000, bits))
        values = bits.to(tl.float32, bitcast=True)
    else:
        # the bits become those of a float16, subnormals included; what remains is the difference of the two
        # biases:
        #
        #              sign  exponent  mantissa     bias
        #   float16     1       5         10         15
        #   e5m2        1       5          2         15
        #   e4m3        1       4          3          7      8 less: times 2**8
        #   e2m1        1       2          1          1     14 less: times 2**14
        bits = codes.to(tl.int32)
        if FORMAT == "e2m1":
            bits, power = (bits & 8) << 12 | (bits & 7) << 9, 1 << 14
        elif FORMAT == "e4m3":
            bits, power = (bits & 128) << 8 | (bits & 127) << 7, 1 << 8
        else:
            bits, power = bits << 8, 1
        values = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * power
        if FORMAT == "e4m3":
            # e4m3fn has no infinity and one NaN, with all bits set but the sign's
            values = tl.where((codes & 127) == 127, float("nan"), values)
    return values


@triton.jit
def _dequantize_kernel(
    qdata_ptr,  # [N, K], for e2m1 [N, K / 2]
    scale_ptr,  # one for height x width entries of the weight
    global_scale_ptr,  # one number, only for e2m1
    out_ptr,  # [N, K]
    K,
    columns,  # blocks of a row
    height,  # rows of a block
    width,  # columns of a block
    FORMAT: tl.constexpr,  # of qdata
    SCALE: tl.constexpr,  # format of the scales
    SWIZZLED: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """GROUPS * GROUP columns of one row."""
    n = tl.program_id(0).to(tl.int64)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)) * GROUP  # first column of each group, [GROUPS]
    k = group[:, None] + tl.arange(0, GROUP)[None, :]  # [GROUPS, GROUP]

    # row and column of the block, and where its scale is: see `compute_swizzled_offsets` in the reference
    r, c = n // height, group // width
    rowwise = r * columns + c
    tiled = (r // 128 * tl.cdiv(columns, 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    s = _decode(tl.load(scale_ptr + (tiled if SWIZZLED else rowwise), mask=group < K, other=0), SCALE)

    if FORMAT == "e2m1":
        # each byte holds two neighboring columns
        byte = group[:, None] // 2 + tl.arange(0, GROUP // 2)[None, :]  # [GROUPS, GROUP / 2]
        pair = tl.load(qdata_ptr + n * (K // 2) + byte, mask=byte < K // 2, other=0)
        code = tl.interleave(pair >> 4, pair & 15) if HIGH_FIRST else tl.interleave(pair & 15, pair >> 4)
    else:
        code = tl.load(qdata_ptr + n * K + k, mask=k < K, other=0)  # [GROUPS, GROUP]
    w = _decode(code, FORMAT) * s[:, None]
    if FORMAT == "e2m1":
        w = w * tl.load(global_scale_ptr).to(tl.float32)
    tl.store(out_ptr + n * K + k, w.to(out_ptr.dtype.element_ty), mask=k < K)


def _launch(
    qdata: Tensor,
    scale: Tensor,
    out: Tensor,
    blocks: tuple[int, int],
    code_format: str,
    scale_format: str,
    **options: Any,
) -> Tensor:
    """Run the kernel over a weight.

    Args:
        qdata: [N, K] or, two numbers in a byte, [N, K / 2].
        scale: one for each block.
        out: [N, K], written.
        blocks: rows and columns of a block.
        code_format: of qdata: int8, e4m3, e5m2 or e2m1.
        scale_format: float32, e8m0 or e4m3.
        options: arguments of the kernel that only some formats have.

    Returns:
        `out`.
    """
    n, k = out.shape
    height, width = blocks
    options = {"global_scale_ptr": None, "SWIZZLED": False, "HIGH_FIRST": False} | options
    # the largest power of two that divides the width
    group = BLOCK_COLUMNS if width >= k else min(width & -width, BLOCK_COLUMNS)
    grid = (n, ceil(k / BLOCK_COLUMNS))
    with torch.cuda.device_of(qdata):
        _dequantize_kernel[grid](
            qdata.contiguous(),
            scale.contiguous(),
            out_ptr=out,
            K=k,
            columns=ceil(k / width),
            height=height,
            width=width,
            FORMAT=code_format,
            SCALE=scale_format,
            GROUPS=BLOCK_COLUMNS // group,
            GROUP=group,
            **options,
        )
    return out


@torch.library.custom_op("int8run::triton_dequantize_int8", mutates_args=())
def dequantize_int8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, torch.int8)
    blocks = infer_block_shape(qdata.shape, scale.shape, block)
    out = qdata.new_empty(qdata.shape, dtype=dtype)
    return _launch(qdata, scale.float(), out, blocks, "int8", "float32")


@torch.library.custom_op("int8run::triton_dequantize_fp8", mutates_args=())
def dequantize_fp8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    blocks = infer_block_shape(qdata.shape, scale.shape, block)
    out = qdata.new_empty(qdata.shape, dtype=dtype)
    return _launch(qdata.view(torch.uint8), scale.float(), out, blocks, FP8_FORMATS[qdata.dtype], "float32")


@torch.library.custom_op("int8run::triton_dequantize_mxfp8", mutates_args=())
def dequantize_mxfp8(
    qdata: Tensor, scale: Tensor, *, swizzled: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    n, k = qdata.shape
    scale = view_scale_bytes(scale, torch.float8_e8m0fnu, n, ceil(k / MXFP8_BLOCK), swizzled)
    return _launch(
        qdata.view(torch.uint8),
        scale,
        qdata.new_empty(n, k, dtype=dtype),
        (1, MXFP8_BLOCK),
        FP8_FORMATS[qdata.dtype],
        "e8m0",
        SWIZZLED=swizzled,
    )


@torch.library.custom_op("int8run::triton_dequantize_nvfp4", mutates_args=())
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
    scale = view_scale_bytes(scale, torch.float8_e4m3fn, n, ceil(k / NVFP4_BLOCK), swizzled)
    return _launch(
        qdata,
        scale,
        qdata.new_empty(n, k, dtype=dtype),
        (1, NVFP4_BLOCK),
        "e2m1",
        "e4m3",
        global_scale_ptr=global_scale,
        SWIZZLED=swizzled,
        HIGH_FIRST=high_first,
    )


# -- what torch.compile must know: shapes and dtypes of the results
# ---------------------------------------------------------


@dequantize_int8.register_fake
@dequantize_fp8.register_fake
def _(qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    return qdata.new_empty(qdata.shape, dtype=dtype)


@dequantize_mxfp8.register_fake
def _(qdata: Tensor, scale: Tensor, *, swizzled: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    return qdata.new_empty(qdata.shape, dtype=dtype)


@dequantize_nvfp4.register_fake
def _(
    qdata: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    swizzled: bool,
    high_first: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return qdata.new_empty(qdata.shape[0], 2 * qdata.shape[1], dtype=dtype)
