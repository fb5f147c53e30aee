"""How codes become numbers, and Hadamard matrices, by their definitions and in float64."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FP8 = {"F8_E4M3": 4, "F8_E5M2": 5}
LAST_FINITE_BYTE = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
LAST_CAST_BYTE = 0x40  # 2, as large as weights are that nothing was divided by
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decode_fp8_byte(byte: int, exponent_bits: int) -> float:
    """The number of a byte: sign, exponent, mantissa; e4m3fn has no infinity."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte & 127) >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def decode_fp8(codes: NDArray[Any], exponent_bits: int) -> Array:
    numbers = [decode_fp8_byte(byte, exponent_bits) for byte in range(256)]
    return np.array(numbers)[codes]


def make_sylvester(size: int) -> Array:
    """The sign of an entry is that of the number of bits that its row and column share."""
    row, column = np.indices((size, size))
    common = row & column

    shared = np.zeros((size, size), dtype=np.int64)
    for bit in range(size.bit_length()):
        shared += common >> bit & 1
    return (-1.0) ** shared / size**0.5


def make_regular(size: int) -> Array:
    """A digit of the row and one of the column, base 4, give a minus where they add to 3."""
    row, column = np.indices((size, size))
    digits = (size.bit_length() - 1) // 2

    minus = np.zeros((size, size), dtype=np.int64)
    for place in range(digits):
        row_digit = row >> 2 * place & 3
        column_digit = column >> 2 * place & 3
        minus += row_digit + column_digit == 3
    return (-1.0) ** minus / size**0.5


def rotate_groups(weight: Array, matrix: Array) -> Array:
    """Each group of columns times the matrix."""
    size = len(matrix)
    rotated = []
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size]  # [rows, size]
        rotated.append(group @ matrix)
    return np.concatenate(rotated, axis=1)


def expand_blocks(scale: Array, height: int, width: int) -> Array:
    """The scale of each number where blocks share one."""
    return np.kron(scale, np.ones((height, width)))


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
