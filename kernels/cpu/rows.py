"""Rows of a weight to int8 as a file is read, with the sums that tell how good they are.

`rows.cpp` does it where it can be built, and torch where not. Both give the same integers and scales, bit for
bit. Without a rotation these are those of `quantize_rowwise/reference.py`; with one, a sum may be rounded
otherwise than in a product with the whole matrix, so that a number half way between two integers may go to
the other one. Called by `export`, which quantizes checkpoints larger than the memory.
"""

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from int8run.kernels.cpu.library import BuildError, check_status, load_rows_library
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, quantize_rowwise

log = logging.getLogger(__name__)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANES = 16  # numbers that are rotated in one step, as in rows.cpp
CHUNK_ELEMENTS = 2**20  # weights that the version in torch works on at a time


class RowSums(NamedTuple):
    """What is known of quantized rows besides their integers and scales."""

    finite: bool  # false: some number is NaN or infinity, and the integers mean nothing
    signal: float  # sum of the squares of the transformed weight
    noise: float  # the same of what rounding changed
    saturated: int  # integers that are -127 or 127


def quantize_weight_rows(
    weight: Tensor, q: Tensor, scale: Tensor, factor: Tensor | None = None, rotation: Rotation | None = None
) -> RowSums:
    """Divide the columns of a weight, rotate them, and quantize rows: `scale = absmax / 127`, ties to even.

    Args:
        weight: [N, K], contiguous, float32, bfloat16 or float16; any other float dtype is read as float32.
        q: int8 [N, K], contiguous; written.
        scale: float32 [N, 1], contiguous; written.
        factor: float32 [K]; each column is divided by its own.
        rotation: of groups that divide K.

    Raises:
        ValueError: for tensors that do not fit each other.
        MemoryError: no memory for a row per thread.
    """
    if weight.dtype not in DTYPES:
        weight = weight.float()
    check_arguments(weight, q, scale, factor, rotation)
    if not has_compiled_library():
        return quantize_rows_in_torch(weight, q, scale, factor, rotation)
    rows, columns = weight.shape
    signs = None if rotation is None else build_lane_signs(rotation)
    sums = torch.empty(rows, 3, dtype=torch.float64)  # signal, noise, saturated of each row
    n_not_finite = load_rows_library().int8run_quantize_weight_rows(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        rows,
        columns,
        None if factor is None else factor.data_ptr(),
        0 if rotation is None else rotation.group,
        None if signs is None else signs.data_ptr(),
        get_radix(rotation),
        get_norm(rotation),
        q.data_ptr(),
        scale.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(n_not_finite)
    signal, noise, saturated = sums.sum(0).tolist()  # the same for any number of threads
    return RowSums(n_not_finite == 0, signal, noise, int(saturated))


@functools.lru_cache(maxsize=1)
def has_compiled_library() -> bool:
    """Whether `rows.cpp` does the work here; the answer is logged once."""
    try:
        load_rows_library()
    except BuildError as error:
        log.warning("weights are quantized by torch, at a fraction of the speed: %s", error)
        return False
    log.debug("weights are quantized by rows.cpp")
    return True


def quantize_rows_in_torch(
    weight: Tensor, q: Tensor, scale: Tensor, factor: Tensor | None = None, rotation: Rotation | None = None
) -> RowSums:
    """The same in torch, a few rows at a time. Arguments as of `quantize_weight_rows`."""
    finite, signal, noise, saturated = True, 0.0, 0.0, 0
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        x = weight[rows].float()
        finite &= bool(x.isfinite().all())
        x = transform_rows(x, factor, rotation)
        finite &= bool(x.isfinite().all())
        q[rows], scale[rows] = quantize_rowwise(x)
        signal += x.double().square().sum().item()
        noise += (x - q[rows] * scale[rows]).double().square().sum().item()
        saturated += int((q[rows].abs() == INT8_MAX).sum())
    return RowSums(finite, signal, noise, saturated)


def transform_rows(x: Tensor, factor: Tensor | None, rotation: Rotation | None) -> Tensor:
    """Divide columns by their factors, then rotate them, with the sums of `rows.cpp`. x: float32 [N, K]."""
    if factor is not None:
        x = x / factor
    if rotation is None:
        return x
    # groups of 16 by a matrix of signs, one row of the matrix after another
    lanes = min(rotation.group, LANES)
    signs = build_lane_signs(rotation)[:lanes, :lanes]
    groups = x.unflatten(1, (-1, lanes))  # [N, K / lanes, lanes]
    total = torch.zeros_like(groups)
    for i in range(lanes):
        total += groups[..., i : i + 1] * signs[i]
    x = total.flatten(1)
    # then parts that are rotated already are joined, until they are as large as the group
    span = lanes
    radix, join_parts = get_radix(rotation), join_two if rotation.sylvester else join_four
    while span < rotation.group:
        parts = x.unflatten(1, (-1, radix, span))  # [N, K / (radix span), radix, span]
        x = torch.stack(join_parts(*parts.unbind(2)), 2).flatten(1)
        span *= radix
    return x * get_norm(rotation)


def join_two(a: Tensor, b: Tensor) -> list[Tensor]:
    """Join two rotated parts by Sylvester's matrix of 2."""
    return [a + b, a - b]


def join_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """Join four rotated parts by the regular matrix of 4."""
    total, difference, total2, difference2 = a + b, a - b, c + d, c - d
    return [total + difference2, total - difference2, total2 + difference, total2 - difference]


def build_lane_signs(rotation: Rotation) -> Tensor:
    """The signs that 16 neighboring columns are multiplied by.

    Returns:
        float32 [16, 16]; for a smaller group its matrix stands several times along the diagonal.
    """
    lanes = min(rotation.group, LANES)
    # both kinds are Kronecker powers whose first entry is positive: the matrix of `lanes` stands in the
    # corner of the larger one
    block = rotation.matrix[:lanes, :lanes].sign()
    num_blocks = LANES // lanes
    signs: Tensor = torch.block_diag(*[block] * num_blocks)
    return signs.contiguous()


def get_radix(rotation: Rotation | None) -> int:
    """How many rotated parts are joined at a time."""
    return 2 if rotation is not None and rotation.sylvester else 4


def get_norm(rotation: Rotation | None) -> float:
    """What the sums of a rotation are multiplied by."""
    return 1.0 if rotation is None else rotation.group**-0.5


def check_arguments(
    weight: Tensor, q: Tensor, scale: Tensor, factor: Tensor | None, rotation: Rotation | None
) -> None:
    """Check what would otherwise be read or written past its end.

    Raises:
        ValueError: naming the argument.
    """
    rows, columns = weight.shape
    expected = {
        "weight": (weight, weight.dtype, (rows, columns)),
        "q": (q, torch.int8, (rows, columns)),
        "scale": (scale, torch.float32, (rows, 1)),
        "factor": (factor, torch.float32, (columns,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        fits = tensor.dtype == dtype and tuple(tensor.shape) == shape
        if not fits or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)} on the CPU, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if rotation is not None and columns % rotation.group:
        raise ValueError(f"groups of {rotation.group} do not divide {columns} columns")
