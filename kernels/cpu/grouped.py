"""Products with weights of 4 and 6 bits on the CPU, as the torch operator `int8run::cpu_grouped_linear`.

`grouped.h` decodes them inside the product of `linear.h`; `backends/cpu.py` calls this. The definition is
kernels/grouped_weight/reference.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.cpu import linear
from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import check_status, load_linear_library
from int8run.kernels.cpu.linear import DTYPES, PANEL
from int8run.kernels.grouped_weight.reference import BITS, compute_levels, decode_grouped_weight

SCALE_DTYPES = (torch.float8_e4m3fn, torch.float32)
STEP = 4  # inputs of a step
CODEBOOK_BITS, CODEBOOK_LEVELS = 4, 16
# decoded at a time for the compensations
DECODED_ELEMENTS = 2**21
# without a codebook, the levels of the 16 lowest codes; at 6 bits the upper two bits of a code add 16 each
EVEN_LEVELS = {bits: compute_levels(bits)[:16].contiguous() for bits in BITS}

linear.ops.define(
    "cpu_grouped_linear(Tensor q, Tensor x_scale, Tensor codes, Tensor group_scale, Tensor? codebook, "
    "int bits, Tensor w_scale, Tensor? bias, Tensor? down, Tensor? down_scale, Tensor? up, Tensor? up_scale, "
    "ScalarType dtype, str instructions) -> Tensor"
)


def list_unsupported_reasons(group_scale: Tensor, levels: Tensor, bits: int, columns: int) -> list[str]:
    """Every reason why the kernel cannot decode a weight; empty when it can.

    Args:
        group_scale: [N, K / g].
        levels: float32 [2**bits].
        bits: of a code.
        columns: K.
    """
    reasons = []
    group_size = columns // group_scale.shape[1]
    if bits not in BITS:
        reasons.append(f"codes have {' or '.join(map(str, BITS))} bits, not {bits}")
    if group_size % STEP:
        reasons.append(f"groups of {group_size} columns are no multiple of {STEP}")
    if columns % (2 * STEP):
        reasons.append(f"{columns} columns are no multiple of {2 * STEP}")
    if group_scale.dtype not in SCALE_DTYPES:
        reasons.append(f"group scales are {group_scale.dtype}; it takes float8_e4m3fn and float32")
    largest = group_scale.float().abs().max() * levels.abs().max()
    # NaN is not below
    if not largest < 2.0**31:
        reasons.append("a level times its scale is beyond 32-bit integers, or not a number")
    return reasons


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The bytes of a file in the order of panels; `grouped.h` draws it.

    Args:
        codes: int8 [N, K * bits / 8], from `grouped_weight.reference.pack_codes`.
        bits: 4 or 6.

    Returns:
        int8 [ceil(N / 64), K * bits * 8], without the compensations.
    """
    rows, row_bytes = codes.shape
    columns = row_bytes * 8 // bits
    panels = -(-rows // PANEL)
    padded = F.pad(codes, (0, 0, 0, panels * PANEL - rows)).view(panels, PANEL, row_bytes)
    low = interleave_columns(padded[..., : columns // 2])
    if bits == 4:
        return low
    return torch.cat([low, interleave_columns(padded[..., columns // 2 :])], dim=1)


def interleave_columns(rows: Tensor) -> Tensor:
    """Two bytes of each column in turn. rows: [panels, 64, bytes] -> [panels, 64 bytes]."""
    panels = rows.shape[0]
    return rows.reshape(panels, PANEL, -1, 2).transpose(1, 2).reshape(panels, -1)


def unpack_codes(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_codes`: int8 [rows, K * bits / 8]. packed: without the compensations."""
    panels, panel_bytes = packed.shape
    low_bytes = panel_bytes * 4 // bits
    planes = [separate_columns(packed[:, :low_bytes])]
    if low_bytes < panel_bytes:
        planes.append(separate_columns(packed[:, low_bytes:]))
    return torch.cat(planes, dim=-1).reshape(panels * PANEL, -1)[:rows].contiguous()


def separate_columns(plane: Tensor) -> Tensor:
    """The inverse of `interleave_columns`: [panels, 64 bytes] -> [panels, 64, bytes]."""
    panels = plane.shape[0]
    return plane.reshape(panels, -1, PANEL, 2).transpose(1, 2).reshape(panels, PANEL, -1)


def pack_group_scale(group_scale: Tensor) -> Tensor:
    """Scales of a group beside each other. [N, groups] -> [ceil(N / 64), groups, 64]."""
    rows, groups = group_scale.shape
    panels = -(-rows // PANEL)
    # by integers of its size: not every torch can move 8-bit floats
    numbers = group_scale.contiguous().view(_get_integer_dtype(group_scale))
    padded = F.pad(numbers, (0, 0, 0, panels * PANEL - rows)).view(panels, PANEL, groups)
    return padded.transpose(1, 2).contiguous().view(group_scale.dtype)


def unpack_group_scale(packed: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_group_scale`: [rows, groups]."""
    numbers = packed.view(_get_integer_dtype(packed)).transpose(1, 2)
    panels, _, groups = numbers.shape
    return numbers.reshape(panels * PANEL, groups)[:rows].contiguous().view(packed.dtype)


def _get_integer_dtype(tensor: Tensor) -> torch.dtype:
    return torch.uint8 if tensor.dtype.itemsize == 1 else torch.int32


def compute_compensation(codes: Tensor, group_scale: Tensor, bits: int, codebook: Tensor | None) -> Tensor:
    """128 times the sum of each output column, some columns at a time.

    Args:
        codes: int8 [N, K * bits / 8].
        group_scale: [N, K / g].
        bits: 4 or 6.
        codebook: float32 [16], or None.

    Returns:
        int32 [N].
    """
    rows, row_bytes = codes.shape
    count = max(1, DECODED_ELEMENTS // (row_bytes * 8 // bits))
    sums = []
    for start in range(0, rows, count):
        part = slice(start, start + count)
        qdata = decode_grouped_weight(codes[part], group_scale[part], bits=bits, codebook=codebook)
        sums.append(128 * qdata.sum(1, dtype=torch.int32))
    return torch.cat(sums)


def pack_weight(codes: Tensor, group_scale: Tensor, bits: int, codebook: Tensor | None) -> Tensor:
    """Codes with the compensations of each panel before them, as the kernel takes them.

    Args:
        codes: int8 [N, K * bits / 8].
        group_scale: [N, K / g].
        bits: 4 or 6.
        codebook: float32 [16], or None.

    Returns:
        int8 [ceil(N / 64), 256 + K * bits * 8].
    """
    rows = codes.shape[0]
    panels = -(-rows // PANEL)
    compensation = compute_compensation(codes, group_scale, bits, codebook)
    padded = F.pad(compensation, (0, panels * PANEL - rows)).view(panels, PANEL)
    return torch.cat([padded.view(torch.int8), pack_codes(codes, bits)], dim=1)


def remove_compensation(packed: Tensor) -> Tensor:
    """What `pack_codes` gave."""
    return packed[:, 4 * PANEL :]


def grouped_linear(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    codebook: Tensor | None,
    bits: int,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    instructions: str = AUTO,
) -> Tensor:
    """`linear.int8_linear` with a weight of 4 or 6 bits: the numbers are those of its int8.

    Args:
        q: uint8 [M, K], from `linear.quantize_rows`.
        x_scale: float32 [M].
        codes: from `pack_weight`.
        group_scale: from `pack_group_scale`.
        codebook: float32 [16], of 4 bits; None: levels are evenly spaced.
        bits: 4 or 6.
        w_scale: float32 [N].
        bias: [N] or None.
        dtype: of the result; float32, bfloat16 or float16.
        down: the branch, as for `linear.int8_linear`; so are the following.
        down_scale: float32 [R].
        up: [N, R], packed.
        up_scale: float32 [N].
        instructions: name of an instruction set, or `auto`.

    Returns:
        [M, N].

    Raises:
        ValueError: for operands that do not fit each other.
        MemoryError: no memory for copies of operands, or for decoded weights.
    """
    op = torch.ops.int8run.cpu_grouped_linear.default
    y: Tensor = op(
        q,
        x_scale,
        codes,
        group_scale,
        codebook,
        bits,
        w_scale,
        bias,
        down,
        down_scale,
        up,
        up_scale,
        dtype,
        instructions,
    )
    return y


def _grouped_linear_impl(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    codebook: Tensor | None,
    bits: int,
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
    linear.check_rows(q, x_scale)
    group = _check_groups(codes, group_scale, codebook, bits=bits, n=n, k=k)
    levels = EVEN_LEVELS[bits] if codebook is None else codebook
    if not linear.is_vector(w_scale, n):
        raise ValueError(f"w_scale must be contiguous float32 [{n}], not {w_scale.dtype}")
    rank = linear.check_branch(down, down_scale, up, up_scale, n, k)
    bias = linear.to_bias(bias, n)
    y = w_scale.new_empty((m, n), dtype=dtype)
    status = load_linear_library(instructions).functions.int8run_grouped_linear(
        q.data_ptr(),
        x_scale.data_ptr(),
        m,
        k,
        n,
        codes.data_ptr(),
        group_scale.data_ptr(),
        group_scale.dtype.itemsize == 1,
        levels.data_ptr(),
        bits,
        group,
        w_scale.data_ptr(),
        linear.pointer_or_null(bias),
        rank,
        linear.pointer_or_null(down),
        linear.pointer_or_null(down_scale),
        linear.pointer_or_null(up),
        linear.pointer_or_null(up_scale),
        y.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    check_status(status)
    return y


def _check_groups(
    codes: Tensor, group_scale: Tensor, codebook: Tensor | None, *, bits: int, n: int, k: int
) -> int:
    # what does not fit would be read past its end; returns the group size
    panels, groups = -(-n // PANEL), group_scale.shape[1]
    has_levels = codebook is None or (bits == CODEBOOK_BITS and linear.is_vector(codebook, CODEBOOK_LEVELS))
    fits = (
        min(n, k, groups) > 0
        and bits in BITS
        and k % (2 * STEP) == 0
        and k % (groups * STEP) == 0
        and codes.dtype == torch.int8
        and codes.shape == (panels, 4 * PANEL + k * bits * PANEL // 8)
        and group_scale.dtype in SCALE_DTYPES
        and group_scale.shape == (panels, groups, PANEL)
    )
    if not fits or not has_levels or not (codes.is_contiguous() and group_scale.is_contiguous()):
        levels = "none" if codebook is None else f"{codebook.dtype} {list(codebook.shape)}"
        raise ValueError(
            f"a weight of {n} outputs and {k} inputs in {bits} bits must be as from pack_weight and "
            f"pack_group_scale, with a float32 codebook of {CODEBOOK_LEVELS} levels at {CODEBOOK_BITS} bits "
            f"alone, not {codes.dtype} {list(codes.shape)} with {group_scale.dtype} "
            f"{list(group_scale.shape)} and codebook {levels}"
        )
    return k // groups


def _grouped_linear_fake(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    codebook: Tensor | None,
    bits: int,
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


linear.ops.impl("cpu_grouped_linear", _grouped_linear_impl, "CPU")
torch.library.register_fake("int8run::cpu_grouped_linear", _grouped_linear_fake, lib=linear.ops)
