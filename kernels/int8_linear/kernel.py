"""The INT8 linear layer on the GPU, in one Triton kernel: product, scales, bias and LoRA's second half.

`reference.py` is the definition, `tile.py` the tile sizes, `backends/triton.py` calls this.

One program computes one tile of y [M, N]. It walks along K, BLOCK_K columns at a time, with `stages` such
steps in flight:

                          qdata [N, K]      BLOCK_K
                                         +-----------+-----------+---
                      BLOCK_N rows       |  step 0   |  step 1   | ...      int8
                                         +-----------+-----------+---
        q [M, K]      BLOCK_K
                   +-----------+---         +-----------------+
    BLOCK_M rows   |  step 0   | ...        |   tile of y     |   += q . qdata^T, int32 sums
                   +-----------+---         +-----------------+
                      int8                       BLOCK_N

After the walk the sums get the scales of their columns and rows, the bias, and the low-rank branch `h .
up^T`, in float32; then the tile is stored once.

The weight stays [N, K], K contiguous, and its tile is loaded as [BLOCK_N, BLOCK_K] and transposed with
`tl.trans`: loaded through a [K, N] view, Triton 3.9 shuffles bytes and spills registers in the k loop
(tests/support/static_gate.py counts both).
"""

import functools
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8run.kernels.int8_linear.layouts import check_branch, check_product
from int8run.kernels.int8_linear.tile import PORTABLE, Tile, choose_block_r
from int8run.kernels.triton_calls import Layout, choose_dot_precision, describe_layout, needs_operator

log = logging.getLogger(__name__)


def int8_linear(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    group: int,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    strengths: Tensor | None = None,
) -> Tensor:
    """`y = (q · qdataᵀ) · w_scale · x_scale + bias + (h · strengths) · upᵀ`, exact up to the scales.

    M is not part of what is compiled: another resolution runs the same code. With at most 16 rows choose a
    tile with block_m 16; it leaves rows that do not exist unread, so that the weight is all that moves.

    Args:
        q: int8 [M, K].
        x_scale: float32 [M, 1].
        qdata: int8 [N, K].
        w_scale: float32, [N] per row; [N, ceil(K / group)] per group; or [ceil(N / group), ceil(K / group)]
            for square blocks.
        group: 0 for scales per row, otherwise the group or block size, a multiple of 32. Sums of a group are
            scaled in float32.
        bias: [N], any float dtype, or None.
        h: float32 [M, R], the input times the first factor of a low-rank branch; with `up` or not at all.
            Its rows may lie apart: a part of the columns that several branches computed together.
        up: [N, R], its second factor. The product uses tensor cores in up's dtype, float32 sums.
        out_dtype: bfloat16, float16 or float32.
        tile: see `tile.py`. block_k becomes smaller where a group asks for it.
        strengths: float32 [R], a factor for each column of h; None: 1.

    Returns:
        [M, N] in out_dtype.

    Raises:
        ValueError: for shapes, dtypes or strides that do not fit each other, or K above 131072.
    """
    if needs_operator(q):
        op = torch.ops.int8run.triton_int8_linear.default
        y: Tensor = op(q, x_scale, qdata, w_scale, group, bias, h, up, strengths, out_dtype, tile.as_list())
        return y
    return _launch_int8_linear(q, x_scale, qdata, w_scale, group, bias, h, up, strengths, out_dtype, tile)


def _run_operator(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    group: int,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    """As an operator of torch, which knows no tiles."""
    return _launch_int8_linear(
        q, x_scale, qdata, w_scale, group, bias, h, up, strengths, out_dtype, Tile.from_list(tile)
    )


def _launch_int8_linear(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    group: int,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    if tile.kernel != PORTABLE:
        tile = _choose_kernel(tile, q, qdata, group, up)
    options = _plan_launch(
        describe_layout(q),
        describe_layout(x_scale),
        describe_layout(qdata),
        describe_layout(w_scale),
        None if bias is None else describe_layout(bias),
        None if h is None else describe_layout(h),
        None if up is None else describe_layout(up),
        None if strengths is None else describe_layout(strengths),
        group,
        out_dtype,
        tile,
    )
    m, k = q.shape
    n = qdata.shape[0]
    rank, stride_hm = (0, 0) if h is None else (h.shape[1], h.stride(0))
    device = q.device
    y = torch.empty(m, n, dtype=out_dtype, device=device)
    if tile.kernel != PORTABLE:
        from int8run.kernels.int8_linear.hopper import launch_hopper

        with torch.accelerator.device_index(device.index):
            launch_hopper(q, x_scale, qdata, w_scale, bias, h, up, strengths, y, tile)
        return y
    n_programs = -(-m // tile.block_m) * -(-n // tile.block_n)
    # Triton launches on the current device, which need not be q's
    with torch.accelerator.device_index(device.index):
        _int8_linear_kernel[(n_programs,)](
            q,
            x_scale,
            qdata,
            w_scale,
            bias,
            h,
            up,
            strengths,
            y,
            m,
            n,
            k,
            rank,
            stride_hm,
            **options,
        )
    return y


def _choose_kernel(tile: Tile, q: Tensor, qdata: Tensor, group: int, up: Tensor | None) -> Tile:
    """The tile; for the portable kernel where the one that it asks for cannot take these arguments."""
    # imported here, because on other GPUs than Hopper Triton need not have Gluon
    from int8run.kernels.int8_linear.hopper import find_unsupported

    reason = find_unsupported(q, qdata, group, up)
    if reason is None:
        return tile
    _report_portable(reason)
    return tile.as_portable()


@functools.cache
def _report_portable(reason: str) -> None:
    """Say once why the portable kernel takes the Hopper kernel's place."""
    log.warning("the Hopper kernel is left out for some layers: %s", reason)


@functools.lru_cache(maxsize=4096)
def _plan_launch(
    q: Layout,
    x_scale: Layout,
    qdata: Layout,
    w_scale: Layout,
    bias: Layout | None,
    h: Layout | None,
    up: Layout | None,
    strengths: Layout | None,
    group: int,
    out_dtype: torch.dtype,
    tile: Tile,
) -> dict[str, Any]:
    """Check the arguments, once for every layout of them, and choose the kernel's constants and its warps.

    Raises:
        ValueError: for layouts that do not fit each other, or that the kernel does not take.
    """
    check_product(q, x_scale, qdata, w_scale, bias, group=group, out_dtype=out_dtype)
    rank = check_branch(h, up, strengths, m=q.shape[0], n=qdata.shape[0])
    n, k = qdata.shape
    block_k = limit_block_k(tile.block_k, group)
    is_square_block = bool(group) and w_scale.shape[0] != n
    return {
        "GROUP": group,
        "SCALE_ROWS": group if is_square_block else 1,
        "HAS_BIAS": bias is not None,
        "BLOCK_R": choose_block_r(rank),
        "PRECISION": choose_dot_precision(torch.float32 if up is None else up.dtype),
        "EVEN_N": n % tile.block_n == 0,
        "EVEN_K": k % block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _int8_linear_fake(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    group: int,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    return q.new_empty((q.shape[0], qdata.shape[0]), dtype=out_dtype)


def limit_block_k(block_k: int, group: int) -> int:
    """Limit block_k to the largest power of two in a group: no step may reach into the next group."""
    return min(block_k, group & -group) if group else block_k


@triton.jit(do_not_specialize=["M"])
def _int8_linear_kernel(
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
    # Which tile. Programs start in the order of their number; GROUP_M row blocks go through all column blocks
    # together, so that the weight tile of one serves the others from L2. For GROUP_M = 2:
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

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # past the end, the last row or column again: never stored, so the k loop needs no mask for them
    safe_rows = tl.minimum(rows, M - 1)
    safe_cols = cols if EVEN_N else tl.minimum(cols, N - 1)
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
    mask = row_mask if EVEN_N else row_mask & (cols < N)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_int8_linear(Tensor q, Tensor x_scale, Tensor qdata, Tensor w_scale, int group, Tensor? bias, "
    "Tensor? h, Tensor? up, Tensor? strengths, ScalarType out_dtype, int[] tile) -> Tensor"
)
ops.impl("triton_int8_linear", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_int8_linear", _int8_linear_fake, lib=ops)
