"""What one program computes of a product with a grouped weight; `kernel.py` launches it.

It is `int8_linear/programs.py` but for the walk along K, where the weight's tile is decoded:

      codes [N, bytes]        WIDTH bytes: one piece of each span of a step
                             +--------------------------+
                BLOCK_N rows |  b0  b1  b2  ...         |     load
                             +--------------------------+
                                low 4 bits | high 4 bits      codes of two pieces, in the threads that loaded
                                     |           |            them
                                 table or level . scale       int8 [BLOCK_N, WIDTH], twice
                                     |           |
                              . q piece 0   . q piece 1       two products, one after the other

The weight is the first operand and q the second, so that the sums are y transposed: tensor cores take the
first operand from registers, where it was decoded, and each warp decodes other rows. With q first, every warp
would decode the whole tile (7 times the instructions on sm_89: tests/support/static_gate.py).

`decode_weight_kernel` decodes a whole weight, for products of so many rows that doing it once is quicker.
"""

import triton
import triton.language as tl

from int8run.kernels.grouped_weight import layout
from int8run.kernels.int8_linear.programs import find_output_tile, finish_output_tile

PIECE = tl.constexpr(layout.PIECE)
TABLE_ROWS = tl.constexpr(layout.E4M3_SCALES)


@triton.constexpr_function
def _choose_unit(group):
    """Columns that certainly share a scale: the largest power of two in a group, at most a piece."""
    return min(group & -group, layout.PIECE)


@triton.jit
def _find_columns(positions, BITS: tl.constexpr):
    """The columns of a step's first pieces: 0..31, then those of the next span."""
    SPAN: tl.constexpr = PIECE * (2 if BITS == 4 else 4)
    return positions // PIECE * SPAN + positions % PIECE


@triton.jit
def _load_scales(scale_ptr, rows, k, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """The scales of a step: [rows, UNITS, pieces], of each unit of columns of a piece."""
    PIECES: tl.constexpr = 2 if BITS == 4 else 4
    UNIT: tl.constexpr = _choose_unit(GROUP)
    columns = (
        k + _find_columns(tl.arange(0, UNITS) * UNIT, BITS)[:, None] + PIECE * tl.arange(0, PIECES)[None, :]
    )
    groups = tl.minimum(columns, K - 1) // GROUP
    offsets = (groups * N)[None, :, :] + rows[:, None, None]
    if scale_ptr.dtype.element_ty != tl.float32:
        offsets += TABLE_ROWS * (1 << BITS)
    return tl.load(scale_ptr + offsets)


@triton.jit
def _select_piece(scales, piece: tl.constexpr, BITS: tl.constexpr):
    """The scales of one piece of a step: [rows, UNITS] of [rows, UNITS, pieces]."""
    if BITS == 6:
        first, second = tl.split(tl.reshape(scales, [scales.shape[0], scales.shape[1], 2, 2]))
        scales = first if piece % 2 == 0 else second
    first, second = tl.split(scales)
    index: tl.constexpr = piece if BITS == 4 else piece // 2
    return first if index == 0 else second


@triton.jit
def _find_nibbles(positions):
    """Where the bytes of a step's first pieces are, with 6 bits: 64 bytes hold a span."""
    return positions // PIECE * (2 * PIECE) + positions % PIECE


@triton.jit
def _load_bytes(row_ptrs, offsets, end, EVEN_K: tl.constexpr):
    """Bytes of each row, zeros from `end` on."""
    ptrs = row_ptrs + offsets[None, :]
    return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=(offsets < end)[None, :], other=0)


@triton.jit
def _split_codes(packed, pairs, piece: tl.constexpr, BITS: tl.constexpr):
    """The codes of one piece: its four bits of `packed`, and with 6 bits its two of `pairs`."""
    codes = packed & 15 if piece % 2 == 0 else packed >> 4
    if BITS == 6:
        codes |= (pairs >> 2 * piece & 3) << 4
    return codes


@triton.jit
def _load_levels(codebook_ptr, codes):
    """The codebook's level of each code, in halves: Triton would put 32-bit loads into shared memory."""
    halves = codebook_ptr.to(tl.pointer_type(tl.uint16)) + 2 * codes
    bits = tl.load(halves).to(tl.uint32) | tl.load(halves + 1).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode(codes, scale, scale_ptr, codebook_ptr, BITS: tl.constexpr):
    """The int8 numbers of codes.

    codes: uint8 [ROWS, WIDTH]; scale: [ROWS, UNITS] of scale_ptr's type, each for WIDTH / UNITS columns.
    """
    ROWS: tl.constexpr = codes.shape[0]
    WIDTH: tl.constexpr = codes.shape[1]
    UNITS: tl.constexpr = scale.shape[1]
    spread = tl.broadcast_to(scale[:, :, None], [ROWS, UNITS, WIDTH // UNITS])
    scale = tl.reshape(spread, [ROWS, WIDTH])
    if scale_ptr.dtype.element_ty != tl.float32:
        # a row of the table for each scale
        w = tl.load(scale_ptr + ((scale.to(tl.int32) << BITS) | codes)).to(tl.int8, bitcast=True)
    else:
        if codebook_ptr is not None:
            level = _load_levels(codebook_ptr, codes.to(tl.int32))
        else:
            # a code in the lowest bits of 2**23 is that much more
            level = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
            level -= 8388608.0 + (1 << BITS) // 2
        # clamped before it is rounded, to the same numbers: without, the compiler would make one operation of
        # the product and the sum below, which rounds once where the definition rounds twice
        product = tl.minimum(tl.maximum(level * scale, -127.0), 127.0)
        # ties to even: adding 1.5 * 2**23 leaves the integer in float32's lowest bits
        w = (product + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return w


@triton.jit(do_not_specialize=["M"])
def grouped_linear_kernel(
    q_ptr,  # int8 [M, K]
    x_scale_ptr,  # float32 [M, 1]
    codes_ptr,  # uint8 [N, bytes], see `layout.py`
    group_scale_ptr,  # float32 [K / GROUP, N], or uint8: the table, then e4m3 [K / GROUP, N]
    codebook_ptr,  # float32 [16]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N]
    h_ptr,  # float32 [M, R]
    up_ptr,  # [N, R]
    strengths_ptr,  # float32 [R]
    y_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    stride_hm,  # numbers from one row of h to the next
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # columns of h and up at a time, 0: no branch
    PRECISION: tl.constexpr,  # of the branch's product
    EVEN_N: tl.constexpr,  # whether BLOCK_N divides N
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # whole spans
    GROUP_M: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y."""
    rows, cols, safe_rows, safe_cols = find_output_tile(M, N, BLOCK_M, BLOCK_N, EVEN_N, GROUP_M)
    PIECES: tl.constexpr = 2 if BITS == 4 else 4
    SPAN: tl.constexpr = PIECE * PIECES
    WIDTH: tl.constexpr = BLOCK_K // PIECES
    UNITS: tl.constexpr = WIDTH // _choose_unit(GROUP)
    positions = tl.arange(0, WIDTH)
    columns = _find_columns(positions, BITS)
    q_ptrs = q_ptr + safe_rows.to(tl.int64)[:, None] * K + columns[None, :]  # [BLOCK_M, WIDTH]
    # of a row: bytes with four bits of each code, and with 6 bits half as many with the upper two
    nibble_bytes = tl.cdiv(K, SPAN) * (SPAN // 2)
    row_bytes = tl.cdiv(K, SPAN) * (SPAN * BITS // 8)
    row_ptrs = codes_ptr + safe_cols.to(tl.int64)[:, None] * row_bytes
    # where the bytes of the first two pieces are; those of the next two are 32 further
    nibbles = positions if BITS == 4 else _find_nibbles(positions)
    # with few rows, reading the last one 16 times would cost more than the mask
    FEW_ROWS: tl.constexpr = BLOCK_M == 16
    row_mask = (rows < M)[:, None]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    next_scales = _load_scales(group_scale_ptr, safe_cols, 0, N, K, BITS, GROUP, UNITS)
    for k in range(0, K, BLOCK_K):
        # a step ahead: nothing waits for them
        scales = next_scales
        next_scales = _load_scales(group_scale_ptr, safe_cols, k + BLOCK_K, N, K, BITS, GROUP, UNITS)
        if BITS == 6:
            pair_offsets = nibble_bytes + k // PIECES + positions
            pairs = _load_bytes(row_ptrs, pair_offsets, row_bytes, EVEN_K)
        else:
            pairs = 0
        for piece in tl.static_range(PIECES):
            if piece % 2 == 0:
                packed = _load_bytes(row_ptrs, k // 2 + nibbles + piece // 2 * PIECE, nibble_bytes, EVEN_K)
            codes = _split_codes(packed, pairs, piece, BITS)
            scale = _select_piece(scales, piece, BITS)  # [BLOCK_N, UNITS]
            w = _decode(codes, scale, group_scale_ptr, codebook_ptr, BITS)  # [BLOCK_N, WIDTH]
            piece_ptrs = q_ptrs + piece * PIECE
            if EVEN_K:
                q = tl.load(piece_ptrs, mask=row_mask, other=0) if FEW_ROWS else tl.load(piece_ptrs)
            else:
                inside = (columns < K - k - piece * PIECE)[None, :]
                q = tl.load(piece_ptrs, mask=inside & row_mask if FEW_ROWS else inside, other=0)
            # [BLOCK_N, WIDTH] . [WIDTH, BLOCK_M] -> int32 [BLOCK_N, BLOCK_M]
            acc = tl.dot(w, tl.trans(q), acc, out_dtype=tl.int32)
        q_ptrs += BLOCK_K

    y = tl.trans(acc).to(tl.float32) * tl.load(w_scale_ptr + safe_cols)[None, :]
    finish_output_tile(
        y,
        rows,
        cols,
        safe_rows,
        safe_cols,
        x_scale_ptr,
        bias_ptr,
        h_ptr,
        up_ptr,
        strengths_ptr,
        y_ptr,
        M,
        N,
        R,
        stride_hm,
        HAS_BIAS,
        BLOCK_R,
        PRECISION,
        EVEN_N,
    )


@triton.jit
def decode_weight_kernel(
    codes_ptr,  # uint8 [N, bytes], see `layout.py`
    group_scale_ptr,  # float32 [K / GROUP, N], or uint8: the table, then e4m3 [K / GROUP, N]
    codebook_ptr,  # float32 [16]
    qdata_ptr,  # int8 [N, K]
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # whole spans
):
    """BLOCK_K columns of BLOCK_N rows of the int8 weight."""
    PIECES: tl.constexpr = 2 if BITS == 4 else 4
    SPAN: tl.constexpr = PIECE * PIECES
    WIDTH: tl.constexpr = BLOCK_K // PIECES
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, N - 1)
    k = tl.program_id(1) * BLOCK_K
    positions = tl.arange(0, WIDTH)
    columns = _find_columns(positions, BITS)
    nibble_bytes = tl.cdiv(K, SPAN) * (SPAN // 2)
    row_bytes = tl.cdiv(K, SPAN) * (SPAN * BITS // 8)
    row_ptrs = codes_ptr + safe_rows.to(tl.int64)[:, None] * row_bytes
    out_ptrs = qdata_ptr + safe_rows.to(tl.int64)[:, None] * K
    nibbles = positions if BITS == 4 else _find_nibbles(positions)
    scales = _load_scales(group_scale_ptr, safe_rows, k, N, K, BITS, GROUP, WIDTH // _choose_unit(GROUP))
    if BITS == 6:
        pairs = _load_bytes(row_ptrs, nibble_bytes + k // PIECES + positions, row_bytes, EVEN_K=False)
    else:
        pairs = 0
    for piece in tl.static_range(PIECES):
        if piece % 2 == 0:
            packed = _load_bytes(row_ptrs, k // 2 + nibbles + piece // 2 * PIECE, nibble_bytes, EVEN_K=False)
        codes = _split_codes(packed, pairs, piece, BITS)
        w = _decode(codes, _select_piece(scales, piece, BITS), group_scale_ptr, codebook_ptr, BITS)
        first = k + piece * PIECE
        inside = (rows < N)[:, None] & (columns < K - first)[None, :]
        tl.store(out_ptrs + (first + columns)[None, :], w, mask=inside)
