"""The header of a safetensors file: what the file holds, before any tensor is read.

A file is 8 bytes with the length of the header, the header as JSON, and the bytes of the tensors without gaps
(https://huggingface.co/docs/safetensors). `reader.py` reads checkpoints by it, `lora` and
`tasks/inspect_file.py` ask it for metadata. Nothing here knows what a tensor is for.
"""

import logging
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from int8run.errors import FileError
from int8run.utils.plurals import count_noun
from int8run.utils.untrusted_json import RepeatedNameError, parse_untrusted_json

log = logging.getLogger(__name__)
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Four times what the largest known checkpoints have. A file may be made to be slow: with these limits, every
# reader is done with the names of a file in two seconds.
MAX_TENSORS = 20_000
MAX_METADATA = 20_000  # entries
MAX_NAME_CHARS = 500  # of a tensor, or an entry of the metadata; the longest known ones have 200
MAX_DIMENSIONS = 16
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class StoredDtype(NamedTuple):
    """A dtype of the format."""

    bits: int  # of one number
    torch_name: str  # empty: torch has no such dtype


# safetensors' name of a dtype -> what it is
DTYPES = {
    "F64": StoredDtype(64, "float64"),
    "F32": StoredDtype(32, "float32"),
    "F16": StoredDtype(16, "float16"),
    "BF16": StoredDtype(16, "bfloat16"),
    "I64": StoredDtype(64, "int64"),
    "I32": StoredDtype(32, "int32"),
    "I16": StoredDtype(16, "int16"),
    "I8": StoredDtype(8, "int8"),
    "U64": StoredDtype(64, "uint64"),
    "U32": StoredDtype(32, "uint32"),
    "U16": StoredDtype(16, "uint16"),
    "U8": StoredDtype(8, "uint8"),
    "BOOL": StoredDtype(8, "bool"),
    "C64": StoredDtype(64, "complex64"),
    "F8_E4M3": StoredDtype(8, "float8_e4m3fn"),
    "F8_E5M2": StoredDtype(8, "float8_e5m2"),
    "F8_E8M0": StoredDtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": StoredDtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": StoredDtype(8, "float8_e5m2fnuz"),
    "F6_E2M3": StoredDtype(6, ""),
    "F6_E3M2": StoredDtype(6, ""),
    "F4": StoredDtype(4, ""),
}
# names of those that a model may compute in, of its fp8 weights, and of integers
FLOATS = ("F32", "F16", "BF16", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")


class Header(NamedTuple):
    """What a safetensors file says about itself."""

    entries: dict[str, dict[str, Any]]  # key -> dtype, shape, data_offsets
    metadata: dict[str, str]
    data_start: int  # where the tensors begin, in bytes from the beginning of the file


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read tensor entries and metadata of a safetensors file; no tensor is read.

    Raises:
        FileError: missing, pickled, truncated, not a safetensors file, or one whose entries do not describe
            its bytes.
    """
    header = read_full_header(path)
    return header.entries, header.metadata


def read_full_header(path: Path) -> Header:
    """Read the same, and where the data begins. Raises the same."""
    size, text = read_header_text(path)
    found = parse_header(path, text)
    metadata = read_metadata(path, found) if isinstance(found, dict) else {}
    if not is_header(found):
        raise FileError(
            f"{path} is not a safetensors file: its header is not a JSON object of tensors with dtype, "
            "shape and offsets"
        )
    check_limits(path, found, metadata)

    data_start = 8 + len(text)
    data_end = data_start + max((entry["data_offsets"][1] for entry in found.values()), default=0)
    if size != data_end:
        raise FileError(f"{path} is damaged: the header describes {data_end} bytes, the file has {size}")
    check_entries(path, found)
    return Header(found, metadata, data_start)


def read_header_text(path: Path) -> tuple[int, bytes]:
    """Read the header's JSON text from the beginning of a file.

    Returns:
        The size of the whole file in bytes, and the text.

    Raises:
        FileError: the file cannot be read, or its first bytes are not those of a safetensors file.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise FileError(
            f"{path} is a pickled file, which can run code when opened; convert it to .safetensors first"
        )
    if not path.is_file():
        raise FileError(f"{path}: no such file (looked for {path.absolute()})")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first_bytes = file.read(8)
            length = int.from_bytes(first_bytes, "little")
            is_possible = 2 <= length <= min(MAX_HEADER_BYTES, size - 8)
            text = file.read(length) if is_possible else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error

    if first_bytes.startswith(b"GGUF"):
        raise FileError(
            f"{path} is not a safetensors file but a GGUF file, which int8run reads as model.location=, "
            "clip.path= and task.base=, and in task=inspect; here it takes a .safetensors file"
        )
    if MAX_HEADER_BYTES < length <= size - 8:
        raise FileError(
            f"{path} is not a safetensors file: its header would have {length} bytes, {MAX_HEADER_BYTES} "
            "are allowed"
        )
    if not text:
        raise FileError(
            f"{path} is not a safetensors file, or it is cut off: its first 8 bytes give no possible header "
            "length"
        )
    return size, text


def parse_header(path: Path, text: bytes) -> Any:
    """Parse the header's JSON.

    Raises:
        FileError: other text, a repeated key, of which a reader would silently take one, or more than any
            checkpoint has.
    """
    num_tensors = text.count(b'"data_offsets"')  # with fewer, parsing is quick
    if num_tensors > MAX_TENSORS:
        raise make_too_many_error(path, num_tensors, "tensors", MAX_TENSORS)
    try:
        return parse_untrusted_json(text)
    except RepeatedNameError as error:
        raise FileError(f"{path} is damaged: its header {error}") from error
    except ValueError as error:
        raise FileError(f"{path} is not a safetensors file: its header {error}") from error


def check_limits(path: Path, entries: dict[str, dict[str, Any]], metadata: dict[str, str]) -> None:
    """Raise FileError for a header that is valid and beyond what any checkpoint has."""
    if len(entries) > MAX_TENSORS:
        raise make_too_many_error(path, len(entries), "tensors", MAX_TENSORS)
    if len(metadata) > MAX_METADATA:
        raise make_too_many_error(path, len(metadata), "entries of metadata", MAX_METADATA)
    for name in (*entries, *metadata):
        if len(name) > MAX_NAME_CHARS:
            raise FileError(
                f"{path} cannot be read: its header has a name of {len(name)} characters ({name[:40]!r}...), "
                f"{MAX_NAME_CHARS} are allowed; ask who made the file"
            )
    for key, entry in entries.items():
        if len(entry["shape"]) > MAX_DIMENSIONS:
            raise FileError(
                f"{path} cannot be read: {key} has {len(entry['shape'])} dimensions, {MAX_DIMENSIONS} are "
                "allowed; ask who made the file"
            )


def make_too_many_error(path: Path, count: int, what: str, limit: int) -> FileError:
    """The error for more parts than any checkpoint has."""
    return FileError(
        f"{path} cannot be read: it has {count} {what}, {limit} are allowed; ask who made the file"
    )


def check_entries(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Raise FileError for entries that leave gaps in the data, or whose size is not that of their shape."""
    previous, end = "the header", 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start > stop:
            raise FileError(
                f"{path} is damaged: {key} ends at byte {stop} of the data, before its beginning at {start}"
            )
        if start < end:
            raise FileError(
                f"{path} is damaged: {key} begins at byte {start} of the data, inside of {previous}, which "
                f"ends at {end}"
            )
        if start > end:
            raise FileError(
                f"{path} is damaged: bytes {end} to {start} of the data, between {previous} and {key}, "
                "belong to no tensor"
            )
        check_size(path, key, entry)
        previous, end = key, stop


def check_size(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Raise FileError for an unknown dtype, an impossible shape, or a size that does not fit both."""
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in DTYPES:
        raise FileError(
            f"{path} is damaged: {key} has the dtype {dtype!r}; the format has {', '.join(DTYPES)}"
        )
    if not all(is_size(size) for size in shape):
        raise FileError(
            f"{path} is damaged: {key} has the shape {str(shape)[:80]}; a shape is of whole numbers from 0"
        )
    if not is_possible_shape(shape):
        raise FileError(f"{path} is damaged: {key} has the shape {str(shape)[:80]}, which no file can hold")
    start, stop = entry["data_offsets"]
    bits = DTYPES[dtype].bits * prod(shape)
    if bits != 8 * (stop - start):
        raise FileError(
            f"{path} is damaged: {key} has {stop - start} bytes, {dtype} {shape} takes {bits / 8:g}"
        )


def read_metadata(path: Path, found: dict[str, Any]) -> dict[str, str]:
    """Take the metadata out of a parsed header. The format allows text alone, and some writers put null.

    Numbers, truth values and nulls in it are ignored with a warning: they cannot say how tensors are stored.

    Raises:
        FileError: for anything else that is not text.
    """
    metadata = found.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise FileError(
            f"{path} is not a safetensors file: __metadata__ in its header is {str(metadata)[:40]!r}, "
            "not an object of texts"
        )
    texts, ignored = {}, []
    for key, value in metadata.items():
        if isinstance(value, str):
            texts[key] = value
        elif isinstance(value, dict | list):
            raise FileError(
                f"{path}: {key[:80]} in __metadata__ of its header is an object or a list, where the format "
                "has texts; it may say how the tensors are stored, so the file cannot be read"
            )
        else:
            ignored.append(key)
    if ignored:
        log.warning(
            "%s: ignoring %s of __metadata__ in its header, where only text is allowed (first: %s)",
            path,
            count_noun(len(ignored), "entry"),
            ignored[0][:80],
        )
    return texts


def is_header(found: object) -> bool:
    """Whether parsed JSON is a header without its metadata: an entry for each tensor."""
    return isinstance(found, dict) and all(map(is_entry, found.values()))


def is_entry(entry: object) -> bool:
    """Whether a header entry has what the format asks for."""
    if not isinstance(entry, dict):
        return False
    if not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("shape"), list):
        return False
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(is_size(offset) for offset in offsets)


def is_size(number: object) -> bool:
    """Whether this is a whole number that the format can hold; `True`, an int in Python, is not."""
    return type(number) is int and 0 <= number < 2**63


def is_possible_shape(shape: Iterable[int]) -> bool:
    """Whether a tensor can have this shape: torch multiplies its sizes in 64 bits, also of an empty one."""
    return prod(max(size, 1) for size in shape) < 2**63
