"""The CPU kernels as torch operators, `int8run::cpu_quantize` and `int8run::cpu_linear`.

`backends/cpu.py` calls them. The operators are registered with `torch.library` by hand: `custom_op` adds 12
microseconds to a call, this 3, and a small layer takes 50.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import check_status, load_linear_library
from int8run.kernels.quantize_rowwise.reference import check_factor

PANEL = 64  # output columns of a panel, as in common.h
FLOAT32, INT8, UINT8 = torch.float32, torch.int8, torch.uint8  # looked up at every call
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "cpu_quantize(Tensor x, Tensor? factor, int rotation, bool sylvester, int gelu_from, "
    "str instructions) -> (Tensor, Tensor)"
)
ops.define(
    "cpu_linear(Tensor q, Tensor x_scale, Tensor packed, Tensor w_scale, Tensor? bias, "
    "Tensor? down, Tensor? down_scale, Tensor? up, Tensor? up_scale, ScalarType dtype, "
    "str instructions) -> Tensor"
)


def pack_weight(qdata: Tensor) -> Tensor:
    """Lay a weight out in panels of 64 output columns, four weights of a column side by side.

    linear.h draws the layout, and says why the first row of each panel is a compensation.

    Args:
        qdata: int8 [N, K].

    Returns:
        int8 [ceil(N / 64), 1 + ceil(K / 4), 256], one tensor, fit to be saved.
    """
    n, k = qdata.shape
    panels, steps = -(-n // PANEL), -(-k // 4)
    padded = F.pad(qdata, (0, 4 * steps - k, 0, PANEL * panels - n))  # [64 panels, 4 steps]
    compensation = 128 * padded.sum(1, dtype=torch.int32)  # [64 panels]
    compensation = compensation.view(panels, 1, PANEL).view(torch.int8)  # [panels, 1, 256]
    # [panels, 64, steps, 4] -> [panels, steps, 64, 4]: the columns of a step stand beside each other
    weights = padded.view(panels, PANEL, steps, 4).transpose(1, 2).reshape(panels, steps, 4 * PANEL)
    return torch.cat([compensation, weights], dim=1)


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `pack_weight`: int8 [n, k]."""
    panels, rows = packed.shape[:2]
    weights = packed[:, 1:].view(panels, rows - 1, PANEL, 4).transpose(1, 2)  # [panels, 64, steps, 4]
    return weights.reshape(panels * PANEL, -1)[:n, :k].contiguous()


def quantize_rows(
    x: Tensor,
    factor: Tensor | None = None,
    rotation: int = 0,
    *,
    sylvester: bool = False,
    gelu_from: int = -1,
    instructions: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Quantize rows to unsigned bytes: `scale = absmax / 127`, `q = round(x / scale) + 128`.

    Args:
        x: float [M, K].
        factor: float32 [K], multiplied first.
        rotation: columns of a rotated group, a divisor of K; 0: none.
        sylvester: by Sylvester's matrix (a power of 2), else by the regular Hadamard matrix (a power of 4).
        gelu_from: columns from here on go through GELU (tanh) before all else; -1: none.
        instructions: name of an instruction set, or `auto`.

    Returns:
        q: uint8 [M, K rounded up to 4], scale: float32 [M].

    Raises:
        ValueError: for a rotation or a factor that does not fit.
        MemoryError: no memory for rows that are changed first.
    """
    op = torch.ops.int8run.cpu_quantize.default
    outputs: tuple[Tensor, Tensor] = op(x, factor, rotation, sylvester, gelu_from, instructions)
    return outputs


def int8_linear(
    q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    instructions: str = AUTO,
) -> Tensor:
    """`y = (q - 128) · w * w_scale * x_scale + bias`, with a low-rank branch on top of it where one is given.

    The branch is int8 as well: `t = q · down * down_scale * x_scale` is quantized per row and multiplied by
    `up`.

    Args:
        q: uint8 [M, K rounded up to 4], from `quantize_rows`.
        x_scale: float32 [M], from `quantize_rows`.
        packed: from `pack_weight`.
        w_scale: float32 [N].
        bias: [N] or None.
        dtype: of the result; float32, bfloat16 or float16.
        down: first factor of the branch [R, K], quantized per row and packed.
        down_scale: float32 [R].
        up: second factor of the branch [N, R], quantized per row and packed.
        up_scale: float32 [N].
        instructions: name of an instruction set, or `auto`.

    Returns:
        [M, N].

    Raises:
        ValueError: for operands that do not fit each other.
        MemoryError: no memory for copies of operands.
    """
    op = torch.ops.int8run.cpu_linear.default
    y: Tensor = op(q, x_scale, packed, w_scale, bias, down, down_scale, up, up_scale, dtype, instructions)
    return y


# -- what the operators do -------------------------------------------------------------------------


def _quantize_rows_impl(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, instructions: str
) -> tuple[Tensor, Tensor]:
    if x.dtype not in DTYPES:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    check_rotation(rotation, k, sylvester=sylvester)
    check_factor(factor, k)
    q = x.new_empty((m, -(-k // 4) * 4), dtype=torch.uint8)
    scale = x.new_empty(m, dtype=torch.float32)
    status = load_linear_library(instructions).functions.int8run_quantize(
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        k,
        x.stride(0),
        pointer_or_null(factor),
        rotation,
        sylvester,
        gelu_from,
        q.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return q, scale


def check_rotation(rotation: int, columns: int, *, sylvester: bool) -> None:
    """Raise ValueError unless a kernel can rotate groups of so many columns; 0: none."""
    if rotation == 0:
        return
    base = 2 if sylvester else 4
    if not is_power(rotation, base) or columns % rotation:
        raise ValueError(
            f"rotation must be 0 or a power of {base} that divides {columns} columns, not {rotation}"
        )


def is_power(number: int, base: int) -> bool:
    """Whether a number is `base`, or its square, cube, and so on."""
    power = base
    while power < number:
        power *= base
    return power == number


def _int8_linear_impl(
    q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    down_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    dtype: torch.dtype,
    instructions: str,
) -> Tensor:
    (m, k), n = q.shape, w_scale.shape[0]
    check_rows(q, x_scale)
    _check_weight(packed, w_scale, n, k)
    rank = check_branch(down, down_scale, up, up_scale, n, k)
    bias = to_bias(bias, n)
    if n == 0 or k == 0:
        return _compute_empty_product(m, n, bias, dtype)
    y = w_scale.new_empty((m, n), dtype=dtype)
    status = load_linear_library(instructions).functions.int8run_linear(
        q.data_ptr(),
        x_scale.data_ptr(),
        m,
        k,
        n,
        packed.data_ptr(),
        w_scale.data_ptr(),
        pointer_or_null(bias),
        rank,
        pointer_or_null(down),
        pointer_or_null(down_scale),
        pointer_or_null(up),
        pointer_or_null(up_scale),
        y.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    check_status(status)
    return y


def check_rows(q: Tensor, x_scale: Tensor) -> None:
    """Raise ValueError for rows that are not as from `quantize_rows`: they would be read past their end."""
    m, k = q.shape
    if q.dtype is not UINT8 or k % 4 or not q.is_contiguous() or not is_vector(x_scale, m):
        raise ValueError(
            "q must be contiguous uint8 [M, K rounded up to 4] with contiguous float32 scales [M], "
            f"not {q.dtype} {list(q.shape)} with {x_scale.dtype} {list(x_scale.shape)}"
        )


def _check_weight(packed: Tensor, scale: Tensor, n: int, k: int) -> None:
    if (
        packed.shape != ((n + 63) // PANEL, 1 + k // 4, 4 * PANEL)
        or packed.dtype is not INT8
        or not packed.is_contiguous()
        or not is_vector(scale, n)
    ):
        raise ValueError(
            f"a weight of {n} outputs and {k} inputs must be as from pack_weight, contiguous int8 "
            f"[{-(-n // PANEL)}, {1 + k // 4}, {4 * PANEL}] with contiguous float32 scales [{n}], "
            f"not {packed.dtype} {list(packed.shape)} with {scale.dtype} {list(scale.shape)}"
        )


def check_branch(
    down: Tensor | None, down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, n: int, k: int
) -> int:
    """The rank of a branch, 0 without one; ValueError where its parts do not fit [n, k]."""
    if down is None and down_scale is None and up is None and up_scale is None:
        return 0
    if down is None or down_scale is None or up is None or up_scale is None:
        raise ValueError("a branch has all of down, down_scale, up and up_scale, or none")
    rank = down_scale.shape[0]
    _check_weight(down, down_scale, rank, k)
    _check_weight(up, up_scale, n, (rank + 3) // 4 * 4)
    return rank


def is_vector(tensor: Tensor, n: int) -> bool:
    """Whether a tensor is n contiguous float32 numbers, in any number of dimensions."""
    # asking for the shape takes longer
    return tensor.dtype is FLOAT32 and tensor.numel() == n and tensor.is_contiguous()


def to_bias(bias: Tensor | None, n: int) -> Tensor | None:
    """A bias as the kernels take it; ValueError unless it has n numbers."""
    if bias is None or is_vector(bias, n):
        return bias
    if bias.shape != (n,):
        raise ValueError(f"bias must have {n} numbers, not {list(bias.shape)}")
    return bias.to(torch.float32).contiguous()


def _compute_empty_product(m: int, n: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # without outputs or inputs, which the kernels do not take: nothing but the bias
    y = torch.zeros((m, n), dtype=dtype)
    return y if bias is None else y + bias.to(dtype)


def pointer_or_null(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are, for C."""
    return None if tensor is None else tensor.data_ptr()


# -- what torch.compile must know: shapes and dtypes of the results --------------------------------


def _quantize_rows_fake(
    x: Tensor, factor: Tensor | None, rotation: int, sylvester: bool, gelu_from: int, instructions: str
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    return x.new_empty((m, (k + 3) // 4 * 4), dtype=torch.uint8), x.new_empty((m,), dtype=torch.float32)


def _int8_linear_fake(
    q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    down_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    dtype: torch.dtype,
    instructions: str,
) -> Tensor:
    return w_scale.new_empty((q.shape[0], w_scale.shape[0]), dtype=dtype)


ops.impl("cpu_quantize", _quantize_rows_impl, "CPU")
ops.impl("cpu_linear", _int8_linear_impl, "CPU")
torch.library.register_fake("int8run::cpu_quantize", _quantize_rows_fake, lib=ops)
torch.library.register_fake("int8run::cpu_linear", _int8_linear_fake, lib=ops)
