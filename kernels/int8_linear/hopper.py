"""The INT8 linear layer for Hopper GPUs (compute capability 9.0), in Gluon: tensor cores that never wait.

`reference.py` is the definition; `kernel.py` runs on every GPU and launches this where a `Tile` says so. On
Hopper a product is asynchronous: a group of four warps starts it on operands in shared memory and goes on.
Triton waits for each int8 product before it starts the next one, so that the tensor cores idle in between.
Gluon, Triton's lower level, leaves the waiting to us:

    copy engine     | load 2 | load 3     | load 4     |        `stages` buffers, each with a barrier
    tensor cores    | product 0 | product 1 | product 2 |       that counts the bytes that have arrived
    warps            start 1,    start 2,
                     wait for 0, wait for 1,
                     refill 0    refill 1

1. The copy engine (TMA) brings a step of q and of qdata into a buffer; outside of the matrices it writes
   zeros, which settles the tails of M, N and K.
2. As soon as a buffer is full its product is started. Only then do the warps wait for the product before it,
   whose buffer is free now, and order the next step into it.
3. A program computes tile after tile, and orders the first steps of the next before it has stored this one.
4. A finished tile is scaled and stored a few columns at a time, which keeps down what it needs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from int8run.kernels.int8_linear.tile import HOPPER_PIECE, Tile, choose_block_r, count_hopper_programs

TMA_ALIGNMENT = 16  # bytes, of an operand's first element and of each of its rows
WIDEST_PRODUCT = 128  # columns of one int8 instruction: more is refused by Triton 3.6 and 3.9
# Triton 3.9 has another name for it than 3.6
async_load: Callable[..., Any] = getattr(tma, "async_load", tma.async_copy_global_to_shared)


def find_unsupported(q: Tensor, qdata: Tensor, group: int, up: Tensor | None) -> str | None:
    """Why this kernel cannot take these arguments of `kernel.int8_linear`; None when it can."""
    if group:
        return "it takes scales per row, not per group"
    if q.shape[1] % TMA_ALIGNMENT:
        return f"K is {q.shape[1]}, not a multiple of {TMA_ALIGNMENT}"
    if q.data_ptr() % TMA_ALIGNMENT or qdata.data_ptr() % TMA_ALIGNMENT:
        return f"an operand does not begin at a multiple of {TMA_ALIGNMENT} bytes"
    if up is not None and up.dtype == torch.float32:
        return "it multiplies a low-rank branch in bfloat16 or float16, not in float32"
    return None


def launch_hopper(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    y: Tensor,
    tile: Tile,
) -> None:
    """Compute `kernel.int8_linear` into y. The arguments are checked, and `find_unsupported` is None."""
    (m, k), n = q.shape, qdata.shape[0]
    rank, stride_hm = (0, 0) if h is None else (h.shape[1], h.stride(0))
    programs = count_programs(q.device, m, n, y.element_size(), tile)
    _hopper_kernel[(programs,)](
        describe_operand(q, tile.block_m, tile.block_k),
        describe_operand(qdata, tile.block_n, tile.block_k),
        x_scale,
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
        BLOCK_R=choose_block_r(rank),
        GROUP_M=tile.group_m,
        STAGES=tile.stages,
        PIECE=HOPPER_PIECE,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )


def count_programs(device: torch.device, m: int, n: int, out_bytes: int, tile: Tile) -> int:
    """As many programs as run at once, but not more than there are tiles."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    return min(tiles, count_multiprocessors(device) * count_hopper_programs(tile, out_bytes))


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """How many a GPU has; asked once, because a layer needs it at every call."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def describe_operand(operand: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine has to know: where a matrix lies and which block of it one load brings."""
    return TensorDescriptor.from_tensor(operand, [rows, columns], choose_operand_layout(rows, columns))


@functools.cache
def choose_operand_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory: rows mixed so that reading it meets no bank twice."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8)


@gluon.jit(do_not_specialize=["M"])
def _hopper_kernel(
    q_desc,  # int8 [M, K]
    qdata_desc,  # int8 [N, K]
    x_scale_ptr,  # float32 [M, 1]
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
    BLOCK_R: gl.constexpr,  # columns of h and up at a time, 0: no branch
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PIECE: gl.constexpr,  # columns of a tile that are scaled and stored at a time
):
    """The tiles of y whose number is this program's, or a multiple of the number of programs more."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = qdata_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = q_desc.block_type.shape[1]
    q_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], q_desc.layout)
    qdata_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], qdata_desc.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(STAGES):
        mbarrier.init(barriers.index(buffer), count=1)

    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    blocks_n = (N + BLOCK_N - 1) // BLOCK_N
    steps_per_tile = (K + BLOCK_K - 1) // BLOCK_K
    tiles = _count_own_tiles(blocks_m * blocks_n, gl.program_id(0), gl.num_programs(0))
    # one numbering over the steps of all of its tiles, so that loads run ahead across their borders
    steps = tiles * steps_per_tile
    for first in gl.static_range(STAGES - 1):
        if first < steps:
            _load_step(
                first,
                steps_per_tile,
                blocks_m,
                blocks_n,
                q_desc,
                qdata_desc,
                q_buffers,
                qdata_buffers,
                barriers,
                GROUP_M,
                STAGES,
            )

    # Which thread holds which sum is the instruction's choice: a warp has 16 rows, all of their columns.
    WIDTH: gl.constexpr = min(BLOCK_N, 128)
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, WIDTH, 32]
    )
    step = 0
    for tile in range(tiles):
        sums = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, layout=sums_layout)
        for _ in range(steps_per_tile):
            now = step % STAGES
            # a barrier's phase flips each time its buffer is full: 0, 1, 0, 1, ...
            mbarrier.wait(barriers.index(now), step // STAGES & 1)
            qdata = qdata_buffers.index(now).permute((1, 0))  # [BLOCK_K, BLOCK_N], not moved
            sums = warpgroup_mma(q_buffers.index(now), qdata, sums, is_async=True)
            # at most one is under way: the product before is done, and its buffer is the next to be filled
            sums = warpgroup_mma_wait(1, deps=(sums,))
            if step + STAGES - 1 < steps:
                _load_step(
                    step + STAGES - 1,
                    steps_per_tile,
                    blocks_m,
                    blocks_n,
                    q_desc,
                    qdata_desc,
                    q_buffers,
                    qdata_buffers,
                    barriers,
                    GROUP_M,
                    STAGES,
                )
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))

        number = gl.program_id(0) + tile * gl.num_programs(0)
        block_m, block_n = _find_tile(number, blocks_m, blocks_n, GROUP_M)
        pieces = _split_columns(sums, BLOCK_N // PIECE)
        for i in gl.static_range(BLOCK_N // PIECE):
            _store_piece(
                pieces[i],
                block_m * BLOCK_M,
                block_n * BLOCK_N + i * PIECE,
                x_scale_ptr,
                w_scale_ptr,
                bias_ptr,
                h_ptr,
                up_ptr,
                strengths_ptr,
                y_ptr,
                M,
                N,
                R,
                stride_hm,
                BLOCK_R,
            )


@gluon.jit
def _count_own_tiles(tiles, program, programs):
    """How many of the numbers program, program + programs, ... are below `tiles`."""
    return (tiles - program + programs - 1) // programs


@gluon.jit
def _find_tile(number, blocks_m, blocks_n, GROUP_M: gl.constexpr):
    """Row block and column block of a tile, in the order that `kernel.py` draws."""
    first_m = number // (GROUP_M * blocks_n) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)  # the last group may have fewer row blocks
    in_group = number % (GROUP_M * blocks_n)
    return first_m + in_group % group_m, in_group // group_m


@gluon.jit
def _load_step(
    step,
    steps_per_tile,
    blocks_m,
    blocks_n,
    q_desc,
    qdata_desc,
    q_buffers,
    qdata_buffers,
    barriers,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Order the operands of one of this program's steps into the buffer that is its turn."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = qdata_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = q_desc.block_type.shape[1]
    number = gl.program_id(0) + step // steps_per_tile * gl.num_programs(0)
    block_m, block_n = _find_tile(number, blocks_m, blocks_n, GROUP_M)
    k = step % steps_per_tile * BLOCK_K
    buffer = step % STAGES
    barrier = barriers.index(buffer)
    # whole blocks arrive, zeros outside of the matrix included
    mbarrier.expect(barrier, q_desc.block_type.nbytes + qdata_desc.block_type.nbytes)
    async_load(q_desc, [block_m * BLOCK_M, k], barrier, q_buffers.index(buffer))
    async_load(qdata_desc, [block_n * BLOCK_N, k], barrier, qdata_buffers.index(buffer))


@gluon.jit
def _split_columns(block, PIECES: gl.constexpr):
    """Cut a block into pieces of neighbouring columns, all of them in the registers where they are."""
    pieces = (block,)
    if PIECES > 1:
        halves = block.reshape([block.shape[0], 2, block.shape[1] // 2]).permute(0, 2, 1)
        left, right = halves.split()
        pieces = _split_columns(left, PIECES // 2) + _split_columns(right, PIECES // 2)
    return pieces


@gluon.jit
def _store_piece(
    sums,  # int32 [ROWS, COLUMNS]
    first_row,
    first_column,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    h_ptr,
    up_ptr,
    strengths_ptr,
    y_ptr,
    M,
    N,
    R,
    stride_hm,
    BLOCK_R: gl.constexpr,
):
    """Scale sums, add the bias and the low-rank branch in float32, and store them."""
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    # the sums stay where they are; the name of the layout is that of a float product, which the branch is
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )
    y = gl.convert_layout(sums, layout, assert_trivial=True).to(gl.float32)
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    y *= gl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    y *= gl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    if BLOCK_R:
        for r in range(0, R, BLOCK_R):
            y = _add_branch(
                y,
                r,
                first_row,
                first_column,
                h_ptr,
                up_ptr,
                strengths_ptr,
                M,
                N,
                R,
                stride_hm,
                BLOCK_R,
                layout,
            )

    # stored so that each thread writes 16 bytes and neighbouring threads write neighbouring columns
    VECTOR: gl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
    store_layout: gl.constexpr = gl.BlockedLayout(
        size_per_thread=[1, VECTOR],
        threads_per_warp=[32 * VECTOR // COLUMNS, COLUMNS // VECTOR],
        warps_per_cta=[WARPS, 1],
        order=[1, 0],
    )
    out = gl.convert_layout(y.to(y_ptr.dtype.element_ty), store_layout)
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, store_layout))
    y_ptrs = y_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :]
    gl.store(y_ptrs, out, mask=(rows < M)[:, None] & (columns < N)[None, :])


@gluon.jit
def _add_branch(
    y,  # float32 [ROWS, COLUMNS]
    r,
    first_row,
    first_column,
    h_ptr,
    up_ptr,
    strengths_ptr,
    M,
    N,
    R,
    stride_hm,
    BLOCK_R: gl.constexpr,
    layout: gl.constexpr,
):
    """Add `(h * strengths) . up^T` of BLOCK_R ranks. h goes from registers, up through shared memory."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    h_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, h_layout))
    ranks = r + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, h_layout))
    h_ptrs = h_ptr + rows.to(gl.int64)[:, None] * stride_hm + ranks[None, :]
    h = gl.load(h_ptrs, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
    if strengths_ptr is not None:
        h *= gl.load(strengths_ptr + ranks, mask=ranks < R, other=0.0)[None, :]

    load_layout: gl.constexpr = gl.BlockedLayout(
        size_per_thread=[1, 8],
        threads_per_warp=[256 // BLOCK_R, BLOCK_R // 8],
        warps_per_cta=[gl.num_warps(), 1],
        order=[1, 0],
    )
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, load_layout))
    ranks = r + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, load_layout))
    up_ptrs = up_ptr + columns.to(gl.int64)[:, None] * R + ranks[None, :]
    up = gl.load(up_ptrs, mask=(columns < N)[:, None] & (ranks < R)[None, :], other=0.0)
    up_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, BLOCK_R], up.dtype)
    up_buffer = gl.allocate_shared_memory(up.dtype, [COLUMNS, BLOCK_R], up_layout, up)
    # what threads wrote to shared memory, the tensor cores see after this
    fence_async_shared()
    return warpgroup_mma(h.to(up.dtype), up_buffer.permute((1, 0)), y, is_async=False)
