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

from dataclasses import dataclass
from math import ceil

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


@dataclass(frozen=True)
class Storage:
    """How the bytes of a weight and of its scales are to be read.

    Args:
        codes: int8, e4m3, e5m2 or e2m1.
        scales: float32, e8m0 or e4m3.
        swizzled: whether the scales lie in cuBLAS's tiles.
        high_first: of e2m1, whether even columns are in the high half of a byte.
    """

    codes: str
    scales: str
    swizzled: bool = False
    high_first: bool = False


def _launch(
    qdata: Tensor,
    scale: Tensor,
    out: Tensor,
    blocks: tuple[int, int],
    storage: Storage,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Run the kernel over a weight.

    Args:
        qdata: [N, K] or, two numbers in a byte, [N, K / 2].
        scale: one for each block.
        out: [N, K], written.
        blocks: rows and columns of a block.
        storage: of qdata and scale.
        global_scale: one number, with e2m1.

    Returns:
        `out`.
    """
    n, k = out.shape
    height, width = blocks
    group = BLOCK_COLUMNS
    if width < k:
        # the largest power of two that divides the width
        group = min(width & -width, BLOCK_COLUMNS)
    grid = (n, ceil(k / BLOCK_COLUMNS))
    # Triton launches on the current device, which need not be qdata's
    with torch.accelerator.device_index(qdata.device.index):
        _dequantize_kernel[grid](
            qdata.contiguous(),
            scale.contiguous(),
            global_scale_ptr=global_scale,
            out_ptr=out,
            K=k,
            columns=ceil(k / width),
            height=height,
            width=width,
            FORMAT=storage.codes,
            SCALE=storage.scales,
            SWIZZLED=storage.swizzled,
            HIGH_FIRST=storage.high_first,
            GROUPS=BLOCK_COLUMNS // group,
            GROUP=group,
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
    return _launch(qdata, scale.float(), out, blocks, Storage("int8", "float32"))


@torch.library.custom_op("int8run::triton_dequantize_fp8", mutates_args=())
def dequantize_fp8(
    qdata: Tensor, scale: Tensor, block: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    blocks = infer_block_shape(qdata.shape, scale.shape, block)
    out = qdata.new_empty(qdata.shape, dtype=dtype)
    storage = Storage(FP8_FORMATS[qdata.dtype], "float32")
    return _launch(qdata.view(torch.uint8), scale.float(), out, blocks, storage)


@torch.library.custom_op("int8run::triton_dequantize_mxfp8", mutates_args=())
def dequantize_mxfp8(
    qdata: Tensor, scale: Tensor, *, swizzled: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See the reference."""
    check_qdata(qdata, *FP8)
    n, k = qdata.shape
    scale = view_scale_bytes(scale, torch.float8_e8m0fnu, n, ceil(k / MXFP8_BLOCK), swizzled=swizzled)
    out = qdata.new_empty(n, k, dtype=dtype)
    storage = Storage(FP8_FORMATS[qdata.dtype], "e8m0", swizzled=swizzled)
    return _launch(qdata.view(torch.uint8), scale, out, (1, MXFP8_BLOCK), storage)


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
    scale = view_scale_bytes(scale, torch.float8_e4m3fn, n, ceil(k / NVFP4_BLOCK), swizzled=swizzled)
    out = qdata.new_empty(n, k, dtype=dtype)
    storage = Storage("e2m1", "e4m3", swizzled=swizzled, high_first=high_first)
    return _launch(qdata, scale, out, (1, NVFP4_BLOCK), storage, global_scale)


# -- what torch.compile must know: shapes and dtypes of the results --------------------------------


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
