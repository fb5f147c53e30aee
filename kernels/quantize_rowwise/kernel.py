"""Per-row int8 quantization on the GPU, fused with what comes before it.

That is GELU, a factor for each column, a rotation of groups, and LoRA's first half. `reference.py` is the
definition, `backends/triton.py` calls this. Three Triton kernels compute it (`row_programs.py`): two take a
row for each program, plain or as a matrix that tensor cores rotate; the third takes 16, for the low-rank
product.
"""

import functools
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import triton
from torch import Tensor

from int8run.kernels.quantize_rowwise.row_programs import (
    BLOCK_M,
    PART,
    quantize_row_block_kernel,
    quantize_row_kernel,
    quantize_row_matrix_kernel,
)
from int8run.kernels.triton_calls import (
    FLOATS,
    MAX_RANK,
    Layout,
    choose_dot_precision,
    describe_layout,
    needs_operator,
)

MAX_K_IN_REGISTERS = 16384  # the longest row that stays in registers
MAX_MATRIX = 8192  # the longest row that is one matrix; more spill
ROTATIONS = (0, 4, 16, 64, 256, 1024)
SYLVESTER_ROTATIONS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def quantize_rowwise(
    x: Tensor,
    factor: Tensor | None = None,
    rotation: int = 0,
    *,
    sylvester: bool = False,
    gelu_from: int = -1,
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
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
        q: int8 [M, K]; scale: float32 [M, 1]; h = x' downᵀ: float32 [M, R], None without `down`.

    Raises:
        ValueError: for a shape, stride, dtype, rotation or rank that the kernels do not take.
    """
    if needs_operator(x):
        op = torch.ops.int8run.triton_quantize_rowwise.default
        q, scale, h = op(x, factor, rotation, sylvester, gelu_from, down)
        return q, scale, None if down is None else h
    return _launch_quantize_rowwise(x, factor, rotation, sylvester, gelu_from, down)


def _run_operator(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator of torch, which must return tensors: h is [M, 0] without `down`."""
    q, scale, h = _launch_quantize_rowwise(x, factor, rotation, sylvester, gelu_from, down)
    return q, scale, x.new_empty((x.shape[0], 0), dtype=torch.float32) if h is None else h


def _launch_quantize_rowwise(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    plan = _plan_launch(
        describe_layout(x),
        None if factor is None else describe_layout(factor),
        None if down is None else describe_layout(down),
        rotation,
        sylvester,
        gelu_from >= 0,
    )
    rows, columns = x.shape
    device = x.device
    q = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    # Triton launches on the current device, which need not be x's
    with torch.accelerator.device_index(device.index):
        if down is not None:
            return q, scale, _launch_row_block(plan, x, factor, down, q, scale, gelu_from)
        kernel = quantize_row_matrix_kernel if plan.kind is Kind.ROW_MATRIX else quantize_row_kernel
        kernel[plan.grid](x, factor, q, scale, columns, x.stride(0), gelu_from, **plan.options)
    return q, scale, None


def _launch_row_block(
    plan: "LaunchPlan",
    x: Tensor,
    factor: Tensor | None,
    down: Tensor,
    q: Tensor,
    scale: Tensor,
    gelu_from: int,
) -> Tensor:
    """Launch the kernel for 16 rows. Returns h."""
    rows, columns = x.shape
    rank = down.shape[0]
    h = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    quantize_row_block_kernel[plan.grid](
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
        **plan.options,
    )
    return h


# -- what is launched, worked out once for each kind of call ---------------------------------------


class Kind(Enum):
    """The kernels of `row_programs.py`."""

    ROW = auto()
    ROW_MATRIX = auto()
    ROW_BLOCK = auto()


@dataclass(frozen=True)
class LaunchPlan:
    """What a call launches.

    Args:
        kind: which kernel.
        grid: how many programs of it.
        options: the kernel's constants and how many warps it has.
    """

    kind: Kind
    grid: tuple[int]
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan_launch(
    x: Layout,
    factor: Layout | None,
    down: Layout | None,
    rotation: int,
    sylvester: bool,
    gelu: bool,
) -> LaunchPlan:
    """Check the arguments and choose the kernel, once for every layout of them.

    Raises:
        ValueError: for a layout that the kernels do not take.
    """
    _check_arguments(x, factor, down, rotation=rotation, sylvester=sylvester)
    rows, columns = x.shape
    options: dict[str, Any] = {
        "HAS_FACTOR": factor is not None,
        "GELU": gelu,
        "enable_fp_fusion": True,
    }
    if down is None and not rotation and columns <= MAX_K_IN_REGISTERS:
        block_k = triton.next_power_of_2(columns)
        options |= {"BLOCK_K": block_k, "num_warps": choose_row_warps(block_k)}
        return LaunchPlan(Kind.ROW, (rows,), options)

    precision = choose_dot_precision(x.dtype)
    options |= {"ROTATION": rotation, "SYLVESTER": sylvester, "PRECISION": precision, "num_stages": 1}
    if down is None:
        parts = choose_row_parts(rotation)
        block_g = choose_block_g(columns, parts)
        size = block_g * parts * PART.value
        options |= {"PARTS": parts, "BLOCK_G": block_g, "num_warps": choose_row_warps(size)}
        options |= {"EVEN_K": columns % size == 0, "IN_REGISTERS": columns <= size}
        return LaunchPlan(Kind.ROW_MATRIX, (rows,), options)

    parts = choose_block_parts(rotation)
    block_r = choose_block_r(down.shape[0])
    options |= {"PARTS": parts, "BLOCK_R": block_r, "EVEN_K": columns % (parts * PART.value) == 0}
    options["num_warps"] = choose_row_block_warps(block_r)
    return LaunchPlan(Kind.ROW_BLOCK, (triton.cdiv(rows, BLOCK_M.value),), options)


def choose_row_warps(columns: int) -> int:
    """Warps of a program that holds a row: 32 values for each thread."""
    return min(max(columns // 1024, 1), 16)


def choose_row_parts(rotation: int) -> int:
    """Parts in a row of the matrix as which a rotated row is seen: a whole group."""
    parts: int = max(rotation // PART.value, 1)
    return parts


def choose_block_g(columns: int, parts: int) -> int:
    """Rows of that matrix: the whole row of x; of a long one as few as a tensor-core product takes."""
    width = parts * PART.value
    smallest: int = BLOCK_M.value
    if columns > MAX_MATRIX:
        return smallest
    whole: int = triton.next_power_of_2(triton.cdiv(columns, width))
    return max(whole, smallest)


def choose_block_parts(rotation: int) -> int:
    """Parts in one step of the walk: at least a whole group, and at least four, so that loads are long."""
    parts: int = max(rotation // PART.value, 4)
    return parts


def choose_block_r(rank: int) -> int:
    """Rank as the row-block kernel computes it.

    At least twice BLOCK_M: Triton spreads both of two chained products over the warps along the rows where
    the second is not wider than high, and 16 rows do not divide; every warp would then compute the whole
    rotation, with spilled registers.
    """
    block_r: int = max(2 * BLOCK_M.value, triton.next_power_of_2(rank))
    return block_r


def choose_row_block_warps(block_r: int) -> int:
    """As few warps as hold the sums in registers (tests/support/static_gate.py).

    float32 spills beyond rank 32 or group 256.
    """
    return 16 if block_r == 256 else 8


def _quantize_rowwise_fake(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, down: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    rank = 0 if down is None else down.shape[0]
    q = x.new_empty((rows, columns), dtype=torch.int8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    return q, scale, x.new_empty((rows, rank), dtype=torch.float32)


def _check_arguments(
    x: Layout, factor: Layout | None, down: Layout | None, *, rotation: int, sylvester: bool
) -> None:
    if len(x.shape) != 2 or 0 in x.shape or (x.shape[1] > 1 and x.stride[1] != 1):
        raise ValueError(
            f"x must be [M, K] with neighbouring columns, not {list(x.shape)} with strides {x.stride}"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    columns = x.shape[1]
    if factor is not None and not factor.is_contiguous((columns,), torch.float32):
        raise ValueError(
            f"factor must be contiguous float32 [{columns}], not {factor.dtype} {list(factor.shape)}"
        )
    rotations = SYLVESTER_ROTATIONS if sylvester else ROTATIONS
    if rotation not in rotations or (rotation and columns % rotation):
        raise ValueError(f"rotation must be one of {rotations} and divide {columns} columns, not {rotation}")
    if down is not None:
        _check_down(down, x)


def _check_down(down: Layout, x: Layout) -> None:
    columns = x.shape[1]
    rank = down.shape[0] if down.shape else 0
    if not down.is_contiguous((rank, columns), x.dtype):
        raise ValueError(
            f"down must be contiguous {x.dtype} [R, {columns}], not {down.dtype} {list(down.shape)}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"down may have 1 to {MAX_RANK} rows, not {rank}; merge a larger LoRA into the weight"
        )


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_quantize_rowwise(Tensor x, Tensor? factor, int rotation, bool sylvester, int gelu_from, Tensor? "
    "down) "
    "-> (Tensor, Tensor, Tensor)"
)
ops.impl("triton_quantize_rowwise", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_quantize_rowwise", _quantize_rowwise_fake, lib=ops)
