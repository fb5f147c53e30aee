"""From codes and scales of a layer to its weight, by the formats' published formulas, for `oracle.py`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from text_encoders.oracle_file import TABLES, Array, Tensor, need, numbers, positive
from text_encoders.oracle_markers import get_group_size

TURNED = "rows of a weight that is stored as [in, out]"
WORDS = ("float8_e5m2", *(f"float8_e4m3fn{x}" for x in ("", "_rowwise", "_blockwise", "_block3d")))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FACTORS = ("pre_quant_scale", "hadanorm_sigma", "quarot_hadamard")
QUIP = ("hadamard_quip", "hadamard_size_out", "hadamard_size_in", "sign_row", "sign_col")
OLD_QUIP = ("quip_s_u", "quip_s_v")


@dataclass(frozen=True)
class Reading:
    """A weight.

    Args:
        weight: float64 [N, K] with the file's padding.
        word: of the format, as settings call it; empty where they have none.
        products: factors of each number that are rounded one after the other in float32; 1: a reader is exact
            to the last bit.
    """

    weight: Array
    word: str
    products: int = 1


def count_blocks(weight: Tensor) -> tuple[int, int]:
    """Rows and blocks of a row, of nvfp4 and mxfp8."""
    need(len(weight.shape) == 2 and math.prod(weight.shape), "a weight with blocks is a matrix")
    rows, columns = weight.shape
    if weight.dtype == "U8":  # two numbers a byte
        return rows, math.ceil(2 * columns / 16)
    return rows, math.ceil(columns / 32)


def read_int8(
    weight: Tensor, scale: Tensor | None, beside: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Reading:
    """Rows, groups, blocks, rotated or not, and what other programs make of them.

    Args:
        weight: I8 [N, K].
        scale: its scale.
        beside: tensors of the layer by suffix.
        fields: of its marker; empty without one.
    """
    is_matrix = len(weight.shape) == 2 and math.prod(weight.shape) > 0
    need(scale is not None and is_matrix, "an int8 weight is a matrix and has a scale")
    need({"weight_scale_2", "weight_scalar"}.isdisjoint(beside), "an int8 weight with a second scale")
    real, word = multiply_scales(numbers(weight), positive(scale, "a scale"), "int8", fields or None)
    if set(beside) & {*QUIP, *OLD_QUIP}:
        need(not get_group_size(fields) and not set(beside) & set(FACTORS), "transformed twice")
        return Reading(undo_quip(real, beside), "", 99)

    group, sylvester = find_rotation(beside, fields)
    if group:
        real = rotate(real, group, sylvester)
        is_convrot = word in ("int8_rowwise", "int8_tensorwise") and not sylvester
        word = "int8_convrot" if is_convrot else ""
    need(not ({"pre_quant_scale"} < {*beside} & {*FACTORS}), "two kinds of factors")
    for part, power in (("pre_quant_scale", 1), ("hadanorm_sigma", -1)):
        if part in beside:
            factor = positive(beside[part], "a factor")
            need(factor.shape == (real.shape[1],), "a factor's width")
            real = real * factor**power
    if word == TURNED:
        word = "int8_rowwise"
    if "hadanorm_sigma" in beside:  # ComfyUI has no name for a centered layer
        word = ""
    products = 99 if group else 1 + len(set(beside) & set(FACTORS))
    return Reading(real, word, products)


def find_rotation(beside: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[int, bool]:
    """Columns that were rotated together, 0 for none; and whether by Sylvester's matrix.

    Args:
        beside: tensors of the layer by suffix; the matrix may be among them.
        fields: of its marker.
    """
    group = get_group_size(fields)
    if "quarot_hadamard" not in beside:
        # a power of 4 is rotated by the regular matrix
        is_power_of_4 = group.bit_length() % 2 == 1
        return group, group > 0 and not is_power_of_4
    need(not group, "rotated twice")
    matrix = numbers(beside["quarot_hadamard"])
    size = len(matrix) if matrix.ndim == 2 else 0
    need(matrix.shape == (size, size) and size & (size - 1) == 0 and size > 1, "a matrix")
    tolerance = 0.02 / size**0.5
    if np.allclose(matrix, hadamard(size, sylvester=True), atol=tolerance):
        return size, True
    has_regular = size.bit_length() % 2 == 1
    need(
        has_regular and np.allclose(matrix, hadamard(size, sylvester=False), atol=tolerance),
        "a Hadamard matrix",
    )
    return size, False


def rotate(real: Array, group: int, sylvester: bool) -> Array:
    """Groups of columns, each times the matrix, which is its own inverse."""
    need(real.shape[1] % group == 0, f"groups of {group}")
    matrix = hadamard(group, sylvester)
    starts = range(0, real.shape[1], group)
    return np.concatenate([real[:, start : start + group] @ matrix for start in starts], axis=1)


def hadamard(size: int, sylvester: bool) -> Array:
    """Orthonormal; regular of a power of 4, or Sylvester's."""
    regular_base = 1 - 2 * np.eye(4)[::-1]
    sylvester_base = np.array([[1, 1], [1, -1]])
    base = sylvester_base if sylvester else regular_base
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, base)
    need(len(matrix) == size, f"a Hadamard matrix of {size}")
    return matrix / size**0.5


def undo_quip(real: Array, beside: Mapping[str, Tensor]) -> Array:
    """QuIP undone: by signs and Sylvester's matrices, or in the older form by vectors or matrices."""
    new, old = set(beside) & set(QUIP), set(beside) & set(OLD_QUIP)
    need((len(new) == len(QUIP) and not old) or (len(old) == 2 and not new), "a part of QuIP is missing")
    if new:
        real = undo_signs(real, beside)
    else:
        real = undo_matrices(real, *(numbers(beside[part]) for part in OLD_QUIP))
    if "smooth_factors" in beside:
        factors = positive(beside["smooth_factors"], "a factor")
        need(factors.ndim == 1 and len(factors) <= real.shape[1], "a factor's width")
        real = real[:, : len(factors)] / factors
    return real


def undo_signs(real: Array, beside: Mapping[str, Tensor]) -> Array:
    """QuIP by signs and Sylvester's matrices of both sides."""
    n, k = real.shape
    sizes = [numbers(beside[part]).tolist() for part in QUIP[1:3]]
    need(sizes == [n, k], "QuIP's sizes")
    row_signs, column_signs = (numbers(beside[part]) for part in QUIP[3:])
    has_shapes = row_signs.shape == (n,) and column_signs.shape == (k,)
    need(has_shapes and (abs(row_signs) == 1).all() and (abs(column_signs) == 1).all(), "QuIP's signs")
    rotated = hadamard(n, sylvester=True) @ real @ hadamard(k, sylvester=True)
    return row_signs[:, None] * rotated * column_signs


def undo_matrices(real: Array, u: Array, v: Array) -> Array:
    """QuIP in its older form: by a vector or a matrix on each side."""
    n, k = real.shape
    has_shapes = u.shape in ((n,), (n, n)) and v.shape in ((k,), (k, k))
    need(has_shapes and np.isfinite(u).all() and np.isfinite(v).all(), "QuIP's u and v")
    real = u[:, None] * real if u.ndim == 1 else u @ real
    return real * v if v.ndim == 1 else real @ v.T


def find_block_size(axes: list[tuple[int, int]], named: int | None) -> int:
    """The one size of blocks that fills these numbers of blocks, the last ones perhaps in part."""

    def fits(size: int) -> bool:
        return all(math.ceil(length / size) == count for length, count in axes)

    if named and named == named and fits(named):  # not NaN
        return named
    usual = [2**power for power in range(4, 10) if fits(2**power)]
    exact = {length / count for length, count in axes}
    if len(exact) == 1 and min(exact).is_integer():
        size = int(exact.pop())
        need(size.bit_count() == 1 or not usual, "blocks of two possible sizes")
        return size
    need(len(usual) == 1, "a scale's shape")
    return usual[0]


def multiply_scales(
    codes: Array, scale: Array, kind: str, fields: Mapping[str, Any] | None = None
) -> tuple[Array, str]:
    """Codes times scales, told apart by the shapes of the two, and the format's word."""
    n, k = codes.shape
    named = (fields or {}).get("group_size")
    need(named is None or isinstance(named, int | float), "a size of groups that is no number")
    if scale.size == 1:
        return codes * scale.item(), f"{kind}_tensorwise" if kind == "int8" else kind
    if scale.shape in ((n,), (n, 1)):
        return codes * scale.reshape(n, 1), f"{kind}_rowwise"
    need(0 not in scale.shape, "a scale of no numbers")
    if scale.ndim == 3 and scale.shape[::2] == (n, 1):
        size = find_block_size([(k, scale.shape[1])], named)
        return codes * np.repeat(scale[:, :, 0], size, axis=1)[:, :k], f"{kind}_block3d"
    need(scale.ndim == 2, "a scale's shape")
    a, b = scale.shape
    if kind == "int8" and (a, b) == (1, k):  # stored as [in, out]
        need(n == 1 or (n != k and fields is None), "a scale of rows or of columns")
        return (codes * scale).T, TURNED
    if a == n and b < k:
        return codes * np.repeat(scale, find_block_size([(k, b)], named), axis=1)[:, :k], ""
    size = find_block_size([(n, a), (k, b)], named)
    need(size > 1, "a scale's shape")
    spread = np.repeat(np.repeat(scale, size, axis=0), size, axis=1)
    return codes * spread[:n, :k], f"{kind}_blockwise"


def read_fp8(
    weight: Tensor, scale: Tensor | None, word: str, fields: Mapping[str, Any] | None
) -> Reading | None:
    """A plain cast, or times a scale. Weights of convolutions and norms are read as matrices by rows."""
    if not weight.shape:
        return None
    kind = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[weight.dtype]
    codes = numbers(weight)
    if scale is None:
        need(not word, "a scale was lost")
        return Reading(codes, f"{kind}_cast")
    if codes.ndim == 2:
        real, found = multiply_scales(codes, positive(scale, "a scale"), kind, fields)
    else:
        real, found = multiply_row_scales(codes, positive(scale, "a scale"), kind)
    return Reading(real, found if found in WORDS else "")


def multiply_row_scales(codes: Array, scale: Array, kind: str) -> tuple[Array, str]:
    """Codes of a convolution or a norm times one scale, or one of each row; and the format's word."""
    if scale.size == 1:
        return codes * scale.item(), kind
    rows, ones = len(codes), (1,) * (codes.ndim - 1)
    need(scale.shape in ((rows,), (rows, *ones)), "a scale of no matrix")
    return codes * scale.reshape(-1, *ones), f"{kind}_rowwise"


def read_mxfp8(weight: Tensor, scale: Tensor, layouts: set[bool]) -> Reading:
    """A power of 2 for 32 numbers of a row."""
    rows, columns = count_blocks(weight)
    need(weight.dtype == "F8_E4M3" and len(layouts) == 1, "mxfp8 of an unknown layout")
    exponents = np.frombuffer(scale.data, "u1")
    tiles = True in layouts
    exponents = untile_scales(exponents, rows, columns) if tiles else exponents.reshape(rows, columns)
    need((exponents != 255).all(), "an exponent that is NaN")
    spread = np.repeat(2.0 ** (exponents - 127.0), 32, axis=1)[:, : weight.shape[1]]
    return Reading(numbers(weight) * spread, "mxfp8" if tiles else "mxfp8_rows")


def read_nvfp4(
    weight: Tensor, scale: Tensor | None, beside: Mapping[str, Tensor], layouts: set[bool]
) -> Reading:
    """Codes of 4 bits, a scale of 8 bits for 16 numbers of a row, and one for all."""
    has_second = "weight_scale_2" in beside and beside["weight_scale_2"].one
    need(scale is not None and has_second, "nvfp4 has two scales")
    need("weight_scalar" not in beside and scale.dtype in ("U8", "F8_E4M3"), "nvfp4 has other scales")
    rows, columns = count_blocks(weight)
    need(len(layouts) == 1, "nvfp4 of an unknown flavour")
    tiles = True in layouts
    stored = np.frombuffer(scale.data, "u1")
    stored = untile_scales(stored, rows, columns) if tiles else stored.reshape(rows, columns)
    blocks = TABLES["F8_E4M3"][stored]
    need(np.isfinite(blocks).all() and (blocks >= 0).all(), "a block's scale")
    packed = np.frombuffer(weight.data, "u1").reshape(weight.shape)
    halves = (packed >> 4, packed & 15) if tiles else (packed & 15, packed >> 4)
    codes = np.stack(halves, axis=-1).reshape(rows, -1)
    spread = np.repeat(blocks, 16, axis=1)[:, : codes.shape[1]]
    total = positive(beside["weight_scale_2"], "the second scale").item()
    return Reading(E2M1[codes] * spread * total, "nvfp4" if tiles else "nvfp4_modelopt")


def untile_scales(buffer: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """Block scales out of cuBLAS's tiles of 128 x 4, in which four rows of 32 lie beside each other."""
    high, wide = math.ceil(rows / 128), math.ceil(columns / 4)
    tiles = buffer.reshape(high, wide, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(128 * high, 4 * wide)[:rows, :columns]
