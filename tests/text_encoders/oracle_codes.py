"""Weights of 4 and 6 bits (`asym_w4a8_int8`) by the format's definition, for `oracle.py`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from text_encoders.oracle_file import FLOATS, Array, Tensor, need, numbers, positive
from text_encoders.oracle_markers import get_group_size
from text_encoders.oracle_numbers import FACTORS, OLD_QUIP, QUIP, Reading, rotate

CODE_PARTS = ("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction")


def read_codes(weight: Tensor, beside: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Reading:
    """Codes of 4 or 6 bits, as many as the scales of groups say.

    Args:
        weight: I8 [N, bytes of a row].
        beside: tensors of the layer by suffix.
        fields: of its marker.
    """
    of_other_kinds = {*QUIP, *OLD_QUIP, *FACTORS[1:], "smooth_factors", "weight_scale_2", "weight_scalar"}
    need(of_other_kinds.isdisjoint(beside), "codes with another kind's tensors")
    need(fields.get("convrot", True), "codes that are not rotated")
    need({"weight_s_rel", "weight_s_channel"} <= set(beside), "codes without scales")
    scale, group = beside["weight_s_rel"], fields.get("group_size", 16)
    group = 16 if group is None else group
    need(type(group) is int and group >= 4, "a group's size")
    need(len(weight.shape) == len(scale.shape) == 2 and math.prod(weight.shape), "codes are a matrix")
    rows, groups = scale.shape
    columns = groups * group
    need(rows == weight.shape[0] and columns, "scales of other rows")
    bits = {columns * 4: 4, columns * 6: 6}.get(weight.shape[1] * 8, 0)
    need(bits, "rows that are cut off")
    check_sizes(columns, group, bits)
    codes = unpack_codes(
        np.frombuffer(weight.data, "u1").reshape(weight.shape).astype(np.int64), columns, bits
    )
    levels = read_levels(beside, bits)
    need(scale.dtype in ("F8_E4M3", "F32"), "scales of groups in another dtype")
    of_groups = numbers(scale)
    need(np.isfinite(of_groups).all() and (of_groups >= 0).all(), "a scale of a group")
    of_rows = positive(beside["weight_s_channel"], "a scale of a row")
    need(of_rows.shape == (rows,), "scales of rows")
    with np.errstate(over="ignore"):
        products = levels.astype("<f4")[codes] * np.repeat(of_groups.astype("<f4"), group, axis=1)
    real = np.clip(np.round(products), -127, 127).astype(np.float64) * of_rows[:, None]
    if "weight_correction" in beside:
        added = beside["weight_correction"]
        need(bits == 4 and added.dtype in FLOATS and added.shape == (groups, rows), "a correction")
        shifts = numbers(added)
        need(np.isfinite(shifts).all(), "a correction that is no number")
        real = real + np.repeat(shifts.T, group, axis=1)
    size = get_group_size(fields)
    need(size.bit_length() % 2 == 1, "a matrix that is not regular")
    real = rotate(real, size, sylvester=False)
    if "pre_quant_scale" in beside:
        factor = positive(beside["pre_quant_scale"], "a factor")
        need(factor.shape == (columns,), "a factor's width")
        real = real * factor
    return Reading(real, f"w{bits}a8", 99)


def check_sizes(columns: int, group: int, bits: int) -> None:
    """Sizes that the kernels of the format's makers take."""
    if bits == 6:
        need(columns % 32 == 0 and group % 16 == 0, "sizes of codes of 6 bits")
    need(columns % 16 == 0 and (16 % group == 0 or group % 16 == 0), "sizes of codes")


def unpack_codes(packed: NDArray[np.int64], columns: int, bits: int) -> NDArray[np.int64]:
    """The code of each column, one after the other."""
    codes = []
    for column in range(columns):
        code = packed[:, column // 2] >> 4 * (column % 2) & 15
        if bits == 6:
            code = code | (packed[:, columns // 2 + column // 4] >> 2 * (column % 4) & 3) << 4
        codes.append(code)
    return np.stack(codes, axis=1)


def read_levels(beside: Mapping[str, Tensor], bits: int) -> Array:
    """The table of the file, or integers about zero."""
    if "weight_codebook" not in beside:
        return np.arange(2.0**bits) - 2 ** (bits - 1)
    stored = beside["weight_codebook"]
    need(bits == 4 and stored.shape == (16,) and stored.dtype in FLOATS, "a codebook")
    levels = numbers(stored)
    need(np.isfinite(levels).all() and (np.diff(levels) >= 0).all(), "a codebook that does not rise")
    return levels
