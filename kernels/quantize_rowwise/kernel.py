"""Per-row int8 quantization on the GPU, fused with what comes before it.

That is GELU, a factor for each column, a rotation of groups, and LoRA's first half. `reference.py` is the
definition, `backends/triton.py` calls this. There are two Triton kernels:

- `_quantize_one_row_kernel` holds a whole row in registers: one program for each row. For rows up to 16,384
  columns without rotation and low-rank product.
- `_quantize_row_block_kernel` takes 16 rows for each program, so that tensor cores can do the rotation and
  the low-rank product. It walks along the rows twice: once for the largest magnitude (and h), once to round,
  when the scale is known. x comes from memory once: the second walk finds it in cache.

      x [M, K]        64 columns: a part
                   +--------+--------+--------+--------+--------+---
      16 rows      |        |        |        |        |        | ...
                   +--------+--------+--------+--------+--------+---
                   |<-  PARTS parts at a step of a walk  ->|

Rotation. A group of G columns is multiplied by a Hadamard matrix, a Kronecker power of a small block. Within
a part of 64 columns that is one product with a [64, 64] matrix of signs on the tensor cores (for G < 64, G x
G blocks along its diagonal). For G > 64 the remaining factors of the Kronecker product are sums and
differences between whole parts; the 64 columns of a part stay where they are. The norm 1 / sqrt(G) is applied
once, at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8run.kernels.quantize_rowwise.reference import check_factor

MAX_K_IN_REGISTERS = 16384  # the longest row that stays in registers
MAX_RANK = 256
ROTATIONS = (0, 4, 16, 64, 256, 1024)
SYLVESTER_ROTATIONS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

TINY = tl.constexpr(1e-30)  # the reference's
PART = tl.constexpr(64)  # columns that the row-block kernel handles as one matrix
BLOCK_M = tl.constexpr(16)  # its rows; the smallest tensor-core product, so that few rows still fill the GPU


def quantize_rowwise(
    x: Tensor,
    factor: Tensor | None = None,
    rotation: int = 0,
    *,
    sylvester: bool = False,
    gelu_from: int = -1,
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transform each row, then round it to int8 with its own scale; ties to even.

    The order is GELU (tanh approximation), factor, rotation, `scale = absmax / 127`. The arithmetic is
    float32; what enters the rotation is rounded to x's dtype, as it would be between separate operators, and
    so is what enters the product with `down`. A row with NaN or infinity gets such a scale, so that it stays
    visible in the result.

    Args:
        x: bfloat16, float16 or float32 [M, K]; rows may lie apart, columns may not.
        factor: float32 [K] or None.
        rotation: columns of a rotated group, a divisor of K; 0: none.
        sylvester: by Sylvester's Hadamard matrix (a power of 2), else by the regular one (a power of 4;
            `kernels/hadamard`).
        gelu_from: columns from this one on pass through GELU first; -1: none.
        down: [R, K] in x's dtype or None; it takes the transformed x.

    Returns:
        q: int8 [M, K]; scale: float32 [M, 1]; h = x' downᵀ: float32 [M, R], or [M, 0] without `down`.

    Raises:
        ValueError: for a shape, stride, dtype, rotation or rank that the kernels do not take.
    """
    op = torch.ops.int8run.triton_quantize_rowwise.default
    outputs: tuple[Tensor, Tensor, Tensor] = op(x, factor, rotation, sylvester, gelu_from, down)
    return outputs


def _launch_quantize_rowwise(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(x, factor, down, rotation=rotation, sylvester=sylvester)
    q, scale, h = _allocate_outputs(x, down)
    fits_registers = x.shape[1] <= MAX_K_IN_REGISTERS
    # Triton launches on the current device, which need not be x's
    with torch.accelerator.device_index(x.device.index):
        if fits_registers and not rotation and down is None:
            _launch_one_row_kernel(x, factor, q, scale, gelu_from)
        else:
            _launch_row_block_kernel(
                x, factor, down, q, scale, h, rotation=rotation, sylvester=sylvester, gelu_from=gelu_from
            )
    return q, scale, h


def _launch_one_row_kernel(
    x: Tensor, factor: Tensor | None, q: Tensor, scale: Tensor, gelu_from: int
) -> None:
    rows, columns = x.shape
    block_k = triton.next_power_of_2(columns)
    _quantize_one_row_kernel[(rows,)](
        x,
        factor,
        q,
        scale,
        columns,
        x.stride(0),
        gelu_from,
        HAS_FACTOR=factor is not None,
        GELU=gelu_from >= 0,
        BLOCK_K=block_k,
        num_warps=choose_one_row_warps(block_k),
        enable_fp_fusion=True,
    )


def _launch_row_block_kernel(
    x: Tensor,
    factor: Tensor | None,
    down: Tensor | None,
    q: Tensor,
    scale: Tensor,
    h: Tensor,
    *,
    rotation: int,
    sylvester: bool,
    gelu_from: int,
) -> None:
    rows, columns = x.shape
    rank = h.shape[1]
    # at least a whole rotated group in a step, and at least four parts, so that loads are long
    parts = max(rotation // PART.value, 4)
    block_r = choose_block_r(rank)
    _quantize_row_block_kernel[(triton.cdiv(rows, BLOCK_M.value),)](
        x,
        factor,
        down,
        q,
        scale,
        h,
        rows,
        columns,
        rank,
        x.stride(0),
        gelu_from,
        HAS_FACTOR=factor is not None,
        GELU=gelu_from >= 0,
        ROTATION=rotation,
        SYLVESTER=sylvester,
        BLOCK_R=block_r,
        EVEN_K=columns % (parts * PART.value) == 0,
        PARTS=parts,
        num_warps=choose_row_block_warps(rotation, block_r),
        num_stages=1,
        enable_fp_fusion=True,
    )


def choose_one_row_warps(block_k: int) -> int:
    """Warps of the one-row kernel: 32 values for each thread."""
    return min(max(block_k // 1024, 1), 16)


def choose_block_r(rank: int) -> int:
    """Rank as the row-block kernel computes it; 0 without any.

    At least twice BLOCK_M: Triton spreads both of two chained products over the warps along the rows where
    the second is not wider than high, and 16 rows do not divide; every warp would then compute the whole
    rotation, with spilled registers.
    """
    if rank == 0:
        return 0
    block_r: int = max(2 * BLOCK_M.value, triton.next_power_of_2(rank))
    return block_r


def choose_row_block_warps(rotation: int, block_r: int) -> int:
    """As few warps as hold the sums in registers (tests/support/static_gate.py).

    float32 spills beyond rank 32 or group 256.
    """
    if block_r == 256:
        return 16
    if block_r or rotation == 1024:
        return 8
    return 4


def _quantize_rowwise_fake(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_outputs(x, down)


def _allocate_outputs(x: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    rank = 0 if down is None else down.shape[0]
    q = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    h = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    return q, scale, h


def _check_arguments(
    x: Tensor, factor: Tensor | None, down: Tensor | None, *, rotation: int, sylvester: bool
) -> None:
    if x.dim() != 2 or 0 in x.shape or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"x must be [M, K] with neighbouring columns, not {list(x.shape)} with strides {x.stride()}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    columns = x.shape[1]
    check_factor(factor, columns)
    rotations = SYLVESTER_ROTATIONS if sylvester else ROTATIONS
    if rotation not in rotations or (rotation and columns % rotation):
        raise ValueError(f"rotation must be one of {rotations} and divide {columns} columns, not {rotation}")
    if down is not None:
        _check_down(down, x)


def _check_down(down: Tensor, x: Tensor) -> None:
    columns = x.shape[1]
    if down.dim() != 2 or down.shape[1] != columns or down.dtype != x.dtype or not down.is_contiguous():
        raise ValueError(
            f"down must be contiguous {x.dtype} [R, {columns}], not {down.dtype} {list(down.shape)}"
        )
    if not 1 <= down.shape[0] <= MAX_RANK:
        raise ValueError(
            f"down may have 1 to {MAX_RANK} rows, not {down.shape[0]}; merge a larger LoRA into the weight"
        )


# -- what both kernels use -------------------------------------------------------------------------


@triton.jit
def _magnitude_bits(x):
    """The bits of |x|, which sort like |x| with NaN above infinity; a float maximum would drop NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_from_magnitude(magnitude):
    """absmax / 127 and its inverse, from the largest magnitude. NaN stays, which `tl.maximum` would drop."""
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), 127.0)
    scale = tl.where(scale < TINY, TINY, scale)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _round_to_int8(x):
    """Round |x| <= 127, ties to even: adding 1.5 * 2**23 leaves the integer in float32's lowest bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _apply_gelu_and_factor(
    x, cols, factor_ptr, mask, gelu_from, HAS_FACTOR: tl.constexpr, GELU: tl.constexpr
):
    """x: float32 [..., columns]; cols and mask: [columns]."""
    if GELU:
        # x * sigmoid(2u), which is x * (1 + tanh(u)) / 2 for u = sqrt(2/pi) (x + 0.044715 x^3)
        gelu = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        x = tl.where(cols >= gelu_from, gelu, x)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + cols, mask=mask, other=0.0)
    return x


# -- one row for each program ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["gelu_from"])
def _quantize_one_row_kernel(
    x_ptr,  # [M, K]
    factor_ptr,  # float32 [K]
    q_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M, 1]
    K,
    stride_xm,  # numbers from one row of x to the next
    gelu_from,
    HAS_FACTOR: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K up to a power of two
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    mask = cols < K
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_K]
    x = _apply_gelu_and_factor(x, cols, factor_ptr, mask, gelu_from, HAS_FACTOR, GELU)
    scale, inverse = _scale_from_magnitude(tl.max(_magnitude_bits(x), axis=0))
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + row * K + cols, _round_to_int8(x * inverse), mask=mask)


# -- sixteen rows for each program -----------------------------------------------------------------


@triton.jit
def _hadamard_signs(ROTATION: tl.constexpr, SYLVESTER: tl.constexpr, dtype: tl.constexpr):
    """[64, 64]: the Hadamard matrix times 8; for a smaller group its signs in blocks along the diagonal.

    The sign at (row, column) follows from the bits of both numbers. The regular matrix's 4x4 block is -1
    where the base-4 digits of row and column add up to 3, that is, where both their bits differ; its
    Kronecker power counts such digits. Sylvester's 2x2 block is -1 where both bits are set; `minus` counts
    two such digits at a time. An odd count is a -1.
    """
    row, column = tl.arange(0, PART)[:, None], tl.arange(0, PART)[None, :]
    differ = row ^ column
    if SYLVESTER:
        both = row & column & (ROTATION - 1)
        minus = both ^ (both >> 1)
    else:
        minus = differ & (differ >> 1)
    odd = (minus ^ (minus >> 2) ^ (minus >> 4)) & 1
    # row and column are of different groups where they differ in a bit above the group's
    return tl.where(differ < ROTATION, 1.0 - 2.0 * odd, 0.0).to(dtype)


@triton.jit
def _combine_four(a, b, c, d):
    """The 4x4 block applied to four matrices: the sum of all, with the sign of one of them turned."""
    total = (a + b) + (c + d)
    return total - 2 * d, total - 2 * c, total - 2 * b, total - 2 * a


@triton.jit
def _combine_pairs(parts, digit: tl.constexpr, PARTS: tl.constexpr):
    """The 2x2 block applied to all pairs of matrices whose places differ in one base-2 digit."""
    mixed = ()
    for i in tl.static_range(PARTS):
        other = parts[i ^ (1 << digit)]
        mixed = mixed + (other - parts[i] if i & (1 << digit) else other + parts[i],)  # type: ignore[assignment]  # noqa: RUF005
    return mixed


@triton.jit
def _load_transformed(
    x_ptr,
    row_offsets,
    factor_ptr,
    k,
    K,
    gelu_from,
    signs,
    HAS_FACTOR: tl.constexpr,
    GELU: tl.constexpr,
    ROTATION: tl.constexpr,
    SYLVESTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Columns k .. k + 64 * PARTS after GELU, factor and rotation: PARTS float32 matrices [BLOCK_M, 64]."""
    parts = ()
    for i in tl.static_range(PARTS):
        cols = k + i * PART + tl.arange(0, PART)
        mask = cols < K
        if EVEN_K:
            x = tl.load(x_ptr + row_offsets + cols[None, :])  # [BLOCK_M, 64]
        else:
            x = tl.load(x_ptr + row_offsets + cols[None, :], mask=mask[None, :], other=0.0)
        part = _apply_gelu_and_factor(x.to(tl.float32), cols, factor_ptr, mask, gelu_from, HAS_FACTOR, GELU)
        if ROTATION:
            # of float32 operands three products in tf32 make up for its 10 bits of mantissa
            part = tl.dot(part.to(x.dtype), signs, input_precision="tf32x3")
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    if SYLVESTER:
        # a large group is 2x2 blocks between matrices; each round works on one base-2 digit
        for digit in tl.static_range(4):
            if PART << digit < ROTATION:
                parts = _combine_pairs(parts, digit, PARTS)
    else:
        # a large group is 4x4 blocks between matrices; each round works on one base-4 digit and moves it to
        # the other end
        ROUNDS: tl.constexpr = 2 if ROTATION == 1024 else 1 if ROTATION == 256 else 0
        for _ in tl.static_range(ROUNDS):
            mixed = ()
            for i in tl.static_range(PARTS // 4):
                mixed = mixed + _combine_four(
                    parts[i], parts[i + PARTS // 4], parts[i + PARTS // 2], parts[i + 3 * PARTS // 4]
                )
            parts = mixed
    # the only normalization
    NORM: tl.constexpr = ROTATION**-0.5 if ROTATION else 1.0
    normalized = ()
    for i in tl.static_range(PARTS):
        normalized = normalized + (parts[i] * NORM,)  # type: ignore[assignment]  # noqa: RUF005
    return normalized


@triton.jit(do_not_specialize=["M", "gelu_from"])
def _quantize_row_block_kernel(
    x_ptr,  # [M, K]
    factor_ptr,  # float32 [K]
    down_ptr,  # [R, K]
    q_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M, 1]
    h_ptr,  # float32 [M, R]
    M,
    K,
    R,
    stride_xm,  # numbers from one row of x to the next
    gelu_from,
    HAS_FACTOR: tl.constexpr,
    GELU: tl.constexpr,
    ROTATION: tl.constexpr,  # columns of a group; 0: none
    SYLVESTER: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R up to a power of two; 0: no `down`
    EVEN_K: tl.constexpr,  # whether 64 * PARTS divides K
    PARTS: tl.constexpr,  # parts of 64 columns in one step of a walk
):
    """BLOCK_M rows per program: one walk for absmax and h, one for q."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # past the end, the last row or rank again: never stored, so the walks need no mask for them
    row_offsets = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    ranks = tl.arange(0, BLOCK_R if BLOCK_R else 32)
    safe_ranks = tl.minimum(ranks, R - 1)
    signs = _hadamard_signs(ROTATION, SYLVESTER, x_ptr.dtype.element_ty)  # [64, 64]

    # First walk. The largest magnitude is kept for each of 64 places in a part and reduced once, at the end.
    magnitude = tl.zeros([BLOCK_M, PART], tl.int32)
    h = tl.zeros([BLOCK_M, BLOCK_R if BLOCK_R else 32], tl.float32)
    for k in range(0, K, PARTS * PART):
        parts = _load_transformed(
            x_ptr,
            row_offsets,
            factor_ptr,
            k,
            K,
            gelu_from,
            signs,
            HAS_FACTOR,
            GELU,
            ROTATION,
            SYLVESTER,
            EVEN_K,
            PARTS,
        )
        for i in tl.static_range(PARTS):
            magnitude = tl.maximum(magnitude, _magnitude_bits(parts[i]))
            if BLOCK_R:
                cols = k + i * PART + tl.arange(0, PART)
                down_ptrs = down_ptr + safe_ranks[:, None] * K + cols[None, :]  # [BLOCK_R, 64]
                down = (
                    tl.load(down_ptrs) if EVEN_K else tl.load(down_ptrs, mask=(cols < K)[None, :], other=0.0)
                )
                # [BLOCK_M, 64] . [64, BLOCK_R]
                h = tl.dot(parts[i].to(down.dtype), tl.trans(down), h, input_precision="tf32x3")

    scale, inverse = _scale_from_magnitude(tl.max(magnitude, axis=1))  # [BLOCK_M]
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    if BLOCK_R:
        h_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(h_ptr + h_offsets, h, mask=(rows < M)[:, None] & (ranks < R)[None, :])

    # Second walk. To transform again costs less than to keep the transformed rows in memory.
    for k in range(0, K, PARTS * PART):
        parts = _load_transformed(
            x_ptr,
            row_offsets,
            factor_ptr,
            k,
            K,
            gelu_from,
            signs,
            HAS_FACTOR,
            GELU,
            ROTATION,
            SYLVESTER,
            EVEN_K,
            PARTS,
        )
        for i in tl.static_range(PARTS):
            cols = k + i * PART + tl.arange(0, PART)
            q = _round_to_int8(parts[i] * inverse[:, None])
            mask = (rows < M)[:, None] if EVEN_K else (rows < M)[:, None] & (cols < K)[None, :]
            tl.store(q_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], q, mask=mask)


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_quantize_rowwise(Tensor x, Tensor? factor, int rotation, bool sylvester, int gelu_from, Tensor? "
    "down) "
    "-> (Tensor, Tensor, Tensor)"
)
ops.impl("triton_quantize_rowwise", _launch_quantize_rowwise, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_quantize_rowwise", _quantize_rowwise_fake, lib=ops)
