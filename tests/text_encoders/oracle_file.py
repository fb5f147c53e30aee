"""The container of the oracle: tensors of a safetensors file as float64, read by numpy alone.

`oracle.py` and `fuzzing/lora_oracle.py` read their files with it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# dtype of a file -> bits, numpy's word for the bytes
DTYPES = {
    "F64": (64, "<f8"),
    "F32": (32, "<f4"),
    "F16": (16, "<f2"),
    "BF16": (16, "<u2"),
    "I64": (64, "<i8"),
    "I32": (32, "<i4"),
    "I16": (16, "<i2"),
    "I8": (8, "i1"),
    "U64": (64, "<u8"),
    "U32": (32, "<u4"),
    "U16": (16, "<u2"),
    "U8": (8, "u1"),
    "BOOL": (8, "u1"),
    "C64": (64, "<u8"),
    "F8_E4M3": (8, "u1"),
    "F8_E5M2": (8, "u1"),
    "F8_E8M0": (8, "u1"),
    "F8_E4M3FNUZ": (8, "u1"),
    "F8_E5M2FNUZ": (8, "u1"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, ""),
}
FLOATS, FP8 = ("F64", "F32", "F16", "BF16"), ("F8_E4M3", "F8_E5M2")


class Unreadable(Exception):  # noqa: N818
    """No reading of the file follows from the formats."""


class Tensor(NamedTuple):
    """As it lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def one(self) -> bool:
        """Whether it is one number."""
        return math.prod(self.shape) == 1


def need(true: object, what: str) -> None:
    """Raise Unreadable unless it is true."""
    if not true:
        raise Unreadable(what)


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that keeps the container's rules."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    need(len(raw) >= 8 and 2 <= length <= len(raw) - 8, "the header's length")
    try:
        header = json.loads(raw[8 : 8 + length], object_pairs_hook=reject_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise Unreadable("the header is no JSON") from error
    need(isinstance(header, dict), "the header is no object")
    metadata = read_metadata(header.pop("__metadata__", None))
    for entry in header.values():
        check_entry(entry)
    return cut_tensors(header, raw[8 + length :]), metadata


def read_metadata(metadata: object) -> dict[str, str]:
    """The texts of the metadata; nothing in it may be nested."""
    if metadata is None:
        return {}
    need(isinstance(metadata, dict), "metadata")
    need(not any(isinstance(value, dict | list) for value in metadata.values()), "metadata")
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def check_entry(entry: object) -> None:
    """The header's entry of a tensor must have a known dtype, a shape and two offsets."""
    need(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry), "an entry")
    need(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES, "a dtype")
    need(are_sizes(entry["shape"]) and are_sizes(entry["data_offsets"]), "a shape or offsets")
    need(len(entry["data_offsets"]) == 2, "a shape or offsets")


def cut_tensors(entries: Mapping[str, Any], data: bytes) -> dict[str, Tensor]:
    """The tensors, which must lie one after the other without a gap and fill the data."""
    tensors = {}
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        need(start == end and stop >= start, f"offsets of {key}")
        bits, _ = DTYPES[entry["dtype"]]
        need(bits * math.prod(entry["shape"]) == 8 * (stop - start), f"bytes of {key}")
        tensors[key] = Tensor(entry["dtype"], tuple(entry["shape"]), data[start:stop])
        end = stop
    need(end == len(data), "bytes at the end")
    return tensors


def reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    need(len(dict(pairs)) == len(pairs), "a key twice")
    return dict(pairs)


def are_sizes(numbers: object) -> bool:
    """Whether these are sizes."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def fp8_table(exponent_bits: int, finite: bool) -> Array:
    """The values of all bytes: sign, exponent, mantissa.

    finite: e4m3fn, whose only NaN is all ones; else with infinities.
    """
    mantissa_bits = 7 - exponent_bits
    bias, top = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    values = np.zeros(256)
    for byte in range(128):
        exponent, mantissa = divmod(byte, 2**mantissa_bits)
        if exponent == 0:
            values[byte] = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            values[byte] = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        if exponent == top and not finite:
            values[byte] = np.nan if mantissa else np.inf
    if finite:
        values[127] = np.nan
    values[128:] = -values[:128]
    return values


TABLES = {
    "F8_E4M3": fp8_table(4, True),
    "F8_E5M2": fp8_table(5, False),
    "F8_E8M0": np.append(2.0 ** (np.arange(255) - 127.0), np.nan),
}


def numbers(tensor: Tensor) -> Array:
    """A tensor as float64."""
    need(DTYPES[tensor.dtype][1], f"numbers of {tensor.dtype}")
    stored = np.frombuffer(tensor.data, DTYPES[tensor.dtype][1])
    if tensor.dtype in TABLES:
        return TABLES[tensor.dtype][stored].reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype("<u4") << 16).view("<f4")
    with np.errstate(invalid="ignore"):
        return stored.astype(np.float64).reshape(tensor.shape)


def positive(tensor: Tensor, what: str) -> Array:
    """Scales: floats, finite and above 0, also as float32, in which everybody multiplies."""
    need(tensor.dtype in FLOATS, f"{what} is {tensor.dtype}")
    values = numbers(tensor)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    need(np.isfinite(single).all() and (single > 0).all(), f"{what} is not finite and above 0")
    return single.astype(np.float64)
