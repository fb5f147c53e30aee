"""What one program of the product computes: the Triton kernel behind `kernel.py`, which launches it.

`grouped_weight/programs.py` shares everything here but the walk along K.
"""

import triton
import triton.language as tl


@triton.jit
def find_output_tile(
    M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Rows [BLOCK_M] and columns [BLOCK_N] of y that are this program's, and the same to read from.

    Those to read from are the last row or column again past the end: never stored, so that the walk along K
    needs no mask for them.
    """
    # Programs start in the order of their number; GROUP_M row blocks go through all column blocks together,
    # so that the weight tile of one serves the others from L2. For GROUP_M = 2:
    #
    #              column blocks
    #     rows     0    1    2
    #       0      0    2    4
    #       1      1    3    5
    #       2      6    8   10
    #       3      7    9   11
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)  # the last group may have fewer row blocks
    pid_m = first_m + pid % (GROUP_M * blocks_n) % group_m
    pid_n = pid % (GROUP_M * blocks_n) // group_m

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, M - 1)
    safe_cols = cols if EVEN_N else tl.minimum(cols, N - 1)
    return rows, cols, safe_rows, safe_cols


@triton.jit
def finish_output_tile(
    y,  # float32 [BLOCK_M, BLOCK_N]: the sums, times the scales of the weight
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
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """The scales of the input's rows, the bias and the low-rank branch; then the tile is stored once."""
    y *= tl.load(x_scale_ptr + safe_rows)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    if BLOCK_R:
        # not pipelined: it would ask for more shared memory than the tiles, which are done with
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            ranks = r + tl.arange(0, BLOCK_R)
            rank_mask = (ranks < R)[None, :]
            h_ptrs = h_ptr + safe_rows.to(tl.int64)[:, None] * stride_hm + ranks[None, :]
            h = tl.load(h_ptrs, mask=rank_mask, other=0.0)  # [BLOCK_M, BLOCK_R]
            if strengths_ptr is not None:
                h *= tl.load(strengths_ptr + ranks, mask=ranks < R, other=0.0)[None, :]
            up_ptrs = up_ptr + safe_cols[:, None] * R + ranks[None, :]
            up = tl.load(up_ptrs, mask=rank_mask, other=0.0)  # [BLOCK_N, BLOCK_R]
            y = tl.dot(h.to(up.dtype), tl.trans(up), y, input_precision=PRECISION)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    row_mask = (rows < M)[:, None]
    mask = row_mask if EVEN_N else row_mask & (cols < N)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    q_ptr,  # int8 [M, K]
    x_scale_ptr,  # float32 [M, 1]
    qdata_ptr,  # int8 [N, K]
    w_scale_ptr,  # float32 [N], or [N or its blocks, groups of K]
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
    GROUP: tl.constexpr,  # columns that share a weight scale, 0: all
    SCALE_ROWS: tl.constexpr,  # rows of the weight that share one
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # columns of h and up at a time, 0: no branch
    PRECISION: tl.constexpr,  # of the branch's product
    EVEN_N: tl.constexpr,  # whether BLOCK_N divides N
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y."""
    rows, cols, safe_rows, safe_cols = find_output_tile(M, N, BLOCK_M, BLOCK_N, EVEN_N, GROUP_M)
    ks = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + safe_rows.to(tl.int64)[:, None] * K + ks[None, :]  # [BLOCK_M, BLOCK_K]
    qdata_ptrs = qdata_ptr + safe_cols.to(tl.int64)[:, None] * K + ks[None, :]  # [BLOCK_N, BLOCK_K]
    # with few rows, reading the last one 16 times would cost more than the mask
    FEW_ROWS: tl.constexpr = BLOCK_M == 16
    row_mask = (rows < M)[:, None]

    # With one scale for a row of the weight the sums stay integers to the end. With scales per group the
    # integers of each step are scaled and added in float32.
    if GROUP:
        w_scale_ptrs = w_scale_ptr + safe_cols // SCALE_ROWS * tl.cdiv(K, GROUP)
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            q = tl.load(q_ptrs, mask=row_mask, other=0) if FEW_ROWS else tl.load(q_ptrs)
            qdata = tl.load(qdata_ptrs)
        else:
            inside = (ks < K - k)[None, :]
            q = tl.load(q_ptrs, mask=inside & row_mask if FEW_ROWS else inside, other=0)
            qdata = tl.load(qdata_ptrs, mask=inside, other=0)
        # [BLOCK_M, BLOCK_K] . [BLOCK_K, BLOCK_N] -> int32 [BLOCK_M, BLOCK_N]
        if GROUP:
            part = tl.dot(q, tl.trans(qdata), out_dtype=tl.int32)
            y += part.to(tl.float32) * tl.load(w_scale_ptrs + k // GROUP)[None, :]
        else:
            acc = tl.dot(q, tl.trans(qdata), acc, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        qdata_ptrs += BLOCK_K

    if not GROUP:
        y = acc.to(tl.float32) * tl.load(w_scale_ptr + safe_cols)[None, :]
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
