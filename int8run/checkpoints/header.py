"""The header of a safetensors file: what is in it, before any tensor is read."""

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from int8run.errors import FileError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# the format's word -> bits of a number, and torch's word for it
DTYPES = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, ""),
}


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    entries: dict[str, dict[str, Any]]  # key -> dtype, shape, data_offsets
    metadata: dict[str, str]
    start: int  # of the data, in bytes from the beginning of the file


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file; no tensor is read.

    Raises:
        FileError: missing, pickled, truncated, not a safetensors file, or one whose entries do not describe its bytes.
    """
    entries, metadata, _ = read_full_header(path)
    return entries, metadata


def read_full_header(path: Path) -> Header:
    """The same with the place where the data begins."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise FileError(
            f"{path} is a pickled file, which can run code when opened; convert it to .safetensors first"
        )
    if not path.is_file():
        raise FileError(f"{path}: no such file (looked for {path.absolute()})")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            text = file.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if first.startswith(b"GGUF"):
        raise FileError(
            f"{path} is not a safetensors file but a GGUF file, which ComfyUI-GGUF, or diffusers with gguf can read and int8run cannot; "
            "take the .safetensors checkpoint"
        )
    if MAX_HEADER_BYTES < length <= size - 8:
        raise FileError(
            f"{path} is not a safetensors file: its header would have {length} bytes, {MAX_HEADER_BYTES} are allowed"
        )
    if not text:
        raise FileError(
            f"{path} is not a safetensors file, or it is cut off: its first 8 bytes give no possible header length"
        )
    header = parse_json(path, text)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if (
        not isinstance(header, dict)
        or not is_text_mapping(metadata)
        or not all(is_entry(entry) for entry in header.values())
    ):
        raise FileError(
            f"{path} is not a safetensors file: its header is no JSON object of tensors with dtype, shape and offsets"
        )
    start = 8 + length
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != start + end:
        raise FileError(f"{path} is damaged: the header describes {start + end} bytes, the file has {size}")
    check_entries(path, header)
    return Header(header, metadata, start)


def parse_json(path: Path, text: bytes) -> Any:
    """The header's JSON, without a key that stands twice: a reader would silently take one of the two."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(
                key for number, (key, _) in enumerate(pairs) if key in (k for k, _ in pairs[:number])
            )
            raise FileError(f"{path} is damaged: its header has {twice!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not a safetensors file: its header is no JSON ({error})") from error


def check_entries(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Refuse entries that do not cover the data one after the other, or whose size is not that of their shape."""
    before, end = "the header", 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start > stop:
            raise FileError(
                f"{path} is damaged: {key} ends at byte {stop} of the data, before its beginning at {start}"
            )
        if start < end:
            raise FileError(
                f"{path} is damaged: {key} begins at byte {start} of the data, inside of {before}, which ends at {end}"
            )
        if start > end:
            raise FileError(
                f"{path} is damaged: bytes {end} to {start} of the data, between {before} and {key}, belong to no tensor"
            )
        before, end = key, stop
        if entry["dtype"] not in DTYPES:
            raise FileError(
                f"{path} is damaged: {key} has the dtype {entry['dtype']!r}; the format has {', '.join(DTYPES)}"
            )
        if not all(is_size(n) for n in entry["shape"]):
            raise FileError(
                f"{path} is damaged: {key} has the shape {str(entry['shape'])[:80]}; a shape is of whole numbers from 0"
            )
        bits = DTYPES[entry["dtype"]][0] * prod(entry["shape"])
        if bits != 8 * (stop - start):
            raise FileError(
                f"{path} is damaged: {key} has {stop - start} bytes, {entry['dtype']} {entry['shape']} takes {bits / 8:g}"
            )


def is_text_mapping(metadata: object) -> bool:
    """Whether metadata is a mapping of text to text, as the format asks for."""
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def is_entry(entry: object) -> bool:
    """Whether a header entry has what the format asks for."""
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("dtype"), str)
        or not isinstance(entry.get("shape"), list)
    ):
        return False
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(is_size(offset) for offset in offsets)


def is_size(number: object) -> bool:
    """Whether it is a whole number that the format can hold (`true` is none)."""
    return type(number) is int and 0 <= number < 2**63
