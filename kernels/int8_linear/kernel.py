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
from torch import Tensor

from int8run.kernels.int8_linear.layouts import check_branch, check_product
from int8run.kernels.int8_linear.programs import int8_linear_kernel
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
        int8_linear_kernel[(n_programs,)](
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


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_int8_linear(Tensor q, Tensor x_scale, Tensor qdata, Tensor w_scale, int group, Tensor? bias, "
    "Tensor? h, Tensor? up, Tensor? strengths, ScalarType out_dtype, int[] tile) -> Tensor"
)
ops.impl("triton_int8_linear", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_int8_linear", _int8_linear_fake, lib=ops)
