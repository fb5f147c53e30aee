"""What the programs of the quantization compute: the Triton kernels behind `kernel.py`, which launches them.

- `quantize_row_kernel` holds a whole row in registers: one program for each row.
- `quantize_row_matrix_kernel` sees the row as a matrix, so that tensor cores can rotate it. Of a long row it
  takes one matrix after the other, twice: for the largest magnitude, then to round.

                          64 columns: a part
                         +--------+--------+--------+--------+
      columns 0, ...     |        |        |        |        |      a row of the matrix holds at least one
                         +--------+--------+--------+--------+      rotated group: PARTS parts
      columns 256, ...   |        |        |        |        |
                         +--------+--------+--------+--------+      at least 16 rows: the smallest
      columns 512, ...      ...                                     tensor-core product

- `quantize_row_block_kernel` takes 16 rows for each program, so that tensor cores can multiply them with a
  LoRA's first half. It walks along the rows twice: once for the largest magnitude and h, once to round, when
  the scale is known. x comes from memory once: the second walk finds it in cache.

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

import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)  # the reference's
PART = tl.constexpr(64)  # columns that are rotated as one matrix
BLOCK_M = tl.constexpr(16)  # rows of a row block: the smallest tensor-core product


# -- what the kernels share ------------------------------------------------------------------------


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
    """x: float32; cols and mask: of its shape, or with a 1 for its rows."""
    if GELU:
        # x * sigmoid(2u), which is x * (1 + tanh(u)) / 2 for u = sqrt(2/pi) (x + 0.044715 x^3)
        gelu = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        x = tl.where(cols >= gelu_from, gelu, x)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + cols, mask=mask, other=0.0)
    return x


# -- one row for each program ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["gelu_from"])
def quantize_row_kernel(
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


# -- rotation --------------------------------------------------------------------------------------


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
    row_ptrs,  # pointers to rows of x, [rows, 1] or one
    starts,  # the first column of each row of the matrices, [rows, 1] or one
    factor_ptr,
    K,
    gelu_from,
    signs,
    HAS_FACTOR: tl.constexpr,
    GELU: tl.constexpr,
    ROTATION: tl.constexpr,
    SYLVESTER: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Columns start .. start + 64 * PARTS of each row after GELU, factor and rotation.

    PARTS float32 matrices [rows, 64].
    """
    parts = ()
    for i in tl.static_range(PARTS):
        cols = starts + i * PART + tl.arange(0, PART)[None, :]
        mask = cols < K
        x_ptrs = row_ptrs + cols  # [rows, 64]
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=mask, other=0.0)
        part = _apply_gelu_and_factor(x.to(tl.float32), cols, factor_ptr, mask, gelu_from, HAS_FACTOR, GELU)
        if ROTATION:
            part = tl.dot(part.to(x.dtype), signs, input_precision=PRECISION)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return _combine_parts(parts, ROTATION, SYLVESTER, PARTS)


@triton.jit
def _combine_parts(parts, ROTATION: tl.constexpr, SYLVESTER: tl.constexpr, PARTS: tl.constexpr):
    """What a rotation does between parts that are rotated within themselves, and its norm."""
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


# -- one row for each program, as a matrix ---------------------------------------------------------


@triton.jit
def _reduce_magnitude(magnitude, parts, PARTS: tl.constexpr):
    """The larger magnitude at each place of a part."""
    for i in tl.static_range(PARTS):
        magnitude = tl.maximum(magnitude, _magnitude_bits(parts[i]))
    return magnitude


@triton.jit
def _store_rounded(q_ptrs, parts, starts, inverse, K, EVEN_K: tl.constexpr, PARTS: tl.constexpr):
    """Round the matrices and store them. starts: the first column of each of their rows."""
    for i in tl.static_range(PARTS):
        cols = starts + i * PART + tl.arange(0, PART)[None, :]
        q = _round_to_int8(parts[i] * inverse)
        if EVEN_K:
            tl.store(q_ptrs + cols, q)
        else:
            tl.store(q_ptrs + cols, q, mask=cols < K)


@triton.jit(do_not_specialize=["gelu_from"])
def quantize_row_matrix_kernel(
    x_ptr,  # [M, K]
    factor_ptr,  # float32 [K]
    q_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M, 1]
    K,
    stride_xm,  # numbers from one row of x to the next
    gelu_from,
    HAS_FACTOR: tl.constexpr,
    GELU: tl.constexpr,
    ROTATION: tl.constexpr,  # columns of a group; 0: none
    SYLVESTER: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether matrices without a gap have K entries
    IN_REGISTERS: tl.constexpr,  # whether one matrix holds the row
    PARTS: tl.constexpr,  # parts of 64 columns in a row of the matrix: a whole group
    BLOCK_G: tl.constexpr,  # rows of the matrix
):
    """One row per program: one walk where a matrix [BLOCK_G, 64 * PARTS] holds it, else two."""
    row = tl.program_id(0).to(tl.int64)
    x_row, q_row = x_ptr + row * stride_xm, q_ptr + row * K
    starts = tl.arange(0, BLOCK_G)[:, None] * (PARTS * PART)  # [BLOCK_G, 1]
    signs = _hadamard_signs(ROTATION, SYLVESTER, x_ptr.dtype.element_ty)  # [64, 64]
    STEP: tl.constexpr = BLOCK_G * PARTS * PART

    # the largest magnitude is kept for each place in a part and reduced once, at the end
    magnitude = tl.zeros([BLOCK_G, PART], tl.int32)
    if IN_REGISTERS:
        parts = _load_transformed(
            x_row,
            starts,
            factor_ptr,
            K,
            gelu_from,
            signs,
            HAS_FACTOR,
            GELU,
            ROTATION,
            SYLVESTER,
            PRECISION,
            EVEN_K,
            PARTS,
        )
        magnitude = _reduce_magnitude(magnitude, parts, PARTS)
        scale, inverse = _scale_from_magnitude(tl.max(tl.max(magnitude, axis=1), axis=0))
        _store_rounded(q_row, parts, starts, inverse, K, EVEN_K, PARTS)
    else:
        for k in range(0, K, STEP):
            parts = _load_transformed(
                x_row,
                k + starts,
                factor_ptr,
                K,
                gelu_from,
                signs,
                HAS_FACTOR,
                GELU,
                ROTATION,
                SYLVESTER,
                PRECISION,
                EVEN_K,
                PARTS,
            )
            magnitude = _reduce_magnitude(magnitude, parts, PARTS)
        scale, inverse = _scale_from_magnitude(tl.max(tl.max(magnitude, axis=1), axis=0))
        # to transform again costs less than to keep the transformed row in memory
        for k in range(0, K, STEP):
            parts = _load_transformed(
                x_row,
                k + starts,
                factor_ptr,
                K,
                gelu_from,
                signs,
                HAS_FACTOR,
                GELU,
                ROTATION,
                SYLVESTER,
                PRECISION,
                EVEN_K,
                PARTS,
            )
            _store_rounded(q_row, parts, k + starts, inverse, K, EVEN_K, PARTS)
    tl.store(scale_ptr + row, scale)


# -- sixteen rows for each program -----------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "gelu_from"])
def quantize_row_block_kernel(
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
    PRECISION: tl.constexpr,  # of both products
    BLOCK_R: tl.constexpr,  # R up to a power of two
    EVEN_K: tl.constexpr,  # whether 64 * PARTS divides K
    PARTS: tl.constexpr,  # parts of 64 columns in one step of a walk
):
    """BLOCK_M rows per program: one walk for absmax and h, one for q."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # past the end, the last row or rank again: never stored, so the walks need no mask for them
    x_rows = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    ranks = tl.arange(0, BLOCK_R)
    down_rows = down_ptr + tl.minimum(ranks, R - 1)[:, None] * K  # [BLOCK_R, 1]
    signs = _hadamard_signs(ROTATION, SYLVESTER, x_ptr.dtype.element_ty)  # [64, 64]

    # First walk. The largest magnitude is kept for each of 64 places in a part and reduced once, at the end.
    magnitude = tl.zeros([BLOCK_M, PART], tl.int32)
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, PARTS * PART):
        parts = _load_transformed(
            x_rows,
            k,
            factor_ptr,
            K,
            gelu_from,
            signs,
            HAS_FACTOR,
            GELU,
            ROTATION,
            SYLVESTER,
            PRECISION,
            EVEN_K,
            PARTS,
        )
        magnitude = _reduce_magnitude(magnitude, parts, PARTS)
        for i in tl.static_range(PARTS):
            cols = k + i * PART + tl.arange(0, PART)[None, :]
            down_ptrs = down_rows + cols  # [BLOCK_R, 64]
            down = tl.load(down_ptrs) if EVEN_K else tl.load(down_ptrs, mask=cols < K, other=0.0)
            # [BLOCK_M, 64] . [64, BLOCK_R]
            h = tl.dot(parts[i].to(down.dtype), tl.trans(down), h, input_precision=PRECISION)

    scale, inverse = _scale_from_magnitude(tl.max(magnitude, axis=1))  # [BLOCK_M]
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    h_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(h_ptr + h_offsets, h, mask=(rows < M)[:, None] & (ranks < R)[None, :])

    # Second walk. To transform again costs less than to keep the transformed rows in memory.
    for k in range(0, K, PARTS * PART):
        parts = _load_transformed(
            x_rows,
            k,
            factor_ptr,
            K,
            gelu_from,
            signs,
            HAS_FACTOR,
            GELU,
            ROTATION,
            SYLVESTER,
            PRECISION,
            EVEN_K,
            PARTS,
        )
        for i in tl.static_range(PARTS):
            cols = k + i * PART + tl.arange(0, PART)[None, :]
            q = _round_to_int8(parts[i] * inverse[:, None])
            mask = (rows < M)[:, None] if EVEN_K else (rows < M)[:, None] & (cols < K)
            tl.store(q_ptr + rows.to(tl.int64)[:, None] * K + cols, q, mask=mask)
