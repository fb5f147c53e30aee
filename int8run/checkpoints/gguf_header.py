"""The header of a GGUF file: what the file holds, before any tensor is read.

Little-endian: the letters GGUF, a version, the numbers of tensors and of entries of metadata, the entries,
and name, sizes, type and place of each tensor; then the tensors, each at a multiple of the alignment
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file may be made to be slow, to be large in
memory, or to point outside of itself: everything is checked here before anybody reads a tensor. `gguf_files`
makes of it what other readers see.
"""

from collections.abc import Mapping
from io import BufferedReader, FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

from int8run.checkpoints.gguf_cursor import HeaderCursor, Value
from int8run.checkpoints.gguf_types import BLOCK_TYPES, PLAIN_TYPES, READ_NAMES, UNREAD_TYPES, BlockType
from int8run.checkpoints.header import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_METADATA,
    MAX_TENSORS,
    is_possible_shape,
    make_too_many_error,
)
from int8run.errors import FileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had counts of 32 bits; nobody writes it any more
BUFFER_BYTES = 2**20
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
SPLIT_COUNT_KEY = "split.count"
SHAPE_PREFIX = "comfy.gguf.orig_shape."  # what ComfyUI-GGUF's converter says of a tensor that it reshaped


class GgufTensor(NamedTuple):
    """A tensor as the header describes it.

    Args:
        name: in the file.
        dtype: safetensors' name of what its numbers are; F32 for blocks.
        block: how its numbers are packed; None: they are plain.
        shape: sizes in torch's order, rows first.
        start: byte in the file.
        nbytes: how many bytes it takes.
    """

    name: str
    dtype: str
    block: BlockType | None
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufHeader(NamedTuple):
    """What a GGUF file says about itself: its tensors in the order of their bytes, and its metadata.

    Metadata has texts, numbers and short lists of numbers; longer ones are left out.
    """

    tensors: tuple[GgufTensor, ...]
    metadata: Mapping[str, Value]


def begins_like_gguf(path: Path) -> bool:
    """Whether the first bytes of a file are those of GGUF; False where it cannot be read."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GgufHeader:
    """Read tensors and metadata of a GGUF file; no tensor is read.

    Raises:
        FileError: another file, another version or byte order, one part of several, a type that is not read,
            or a header that does not describe its file.
    """
    try:
        size = path.stat().st_size
        with BufferedReader(FileIO(path), BUFFER_BYTES) as file:
            return parse_header(HeaderCursor(path, file, size))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_header(cursor: HeaderCursor) -> GgufHeader:
    """Parse a header from its first byte on. Raises FileError as `read_gguf_header`."""
    check_beginning(cursor)
    num_tensors, num_entries = cursor.read_size(), cursor.read_size()
    if num_tensors > MAX_TENSORS:
        raise make_too_many_error(cursor.path, num_tensors, "tensors", MAX_TENSORS)
    if num_entries > MAX_METADATA:
        raise make_too_many_error(cursor.path, num_entries, "entries of metadata", MAX_METADATA)
    metadata = read_metadata(cursor, num_entries)
    check_is_whole(cursor.path, metadata)
    alignment = find_alignment(cursor.path, metadata)
    tensors = [read_tensor(cursor, metadata, alignment) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    placed = [tensor._replace(start=data_start + tensor.start) for tensor in tensors]
    placed.sort(key=lambda tensor: tensor.start)
    check_places(cursor.path, placed, cursor.size)
    return GgufHeader(tuple(placed), metadata)


def check_beginning(cursor: HeaderCursor) -> None:
    """Raise FileError for another file, and for a version or a byte order that is not read."""
    magic = cursor.read(len(MAGIC)) if cursor.size >= len(MAGIC) else b""
    if magic != MAGIC:
        raise FileError(f"{cursor.path} is not a GGUF file: it does not begin with the letters GGUF")
    version = cursor.read_kind()
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        raise FileError(
            f"{cursor.path} is a big-endian GGUF file, and int8run reads little-endian ones; take the file "
            "for other machines than IBM's, or convert it with llama.cpp's gguf_convert_endian.py"
        )
    raise FileError(
        f"{cursor.path} is GGUF of version {version}, and int8run reads {' and '.join(map(str, VERSIONS))}; "
        "make it again with a newer program"
    )


def read_metadata(cursor: HeaderCursor, count: int) -> dict[str, Value]:
    """Read the entries of the metadata, but those that are passed over.

    Raises:
        FileError: for an entry that is there twice, of which a reader would silently take one.
    """
    metadata: dict[str, Value] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.read_name("an entry of the metadata")
        if key in seen:
            raise FileError(f"{cursor.path} is damaged: its metadata has {key} twice")
        seen.add(key)
        value = cursor.read_value(key)
        if value is not None:
            metadata[key] = value
    return metadata


def check_is_whole(path: Path, metadata: Mapping[str, Value]) -> None:
    """Raise FileError for one file of several that belong together."""
    count = metadata.get(SPLIT_COUNT_KEY, 0)
    if isinstance(count, int) and count > 1:
        raise FileError(
            f"{path} is one of {count} files of a split GGUF; join them with llama.cpp's "
            "`llama-gguf-split --merge FIRST NEW` and name the new file"
        )


def find_alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    """The number of bytes at whose multiples tensors begin.

    Raises:
        FileError: for one that is no power of two.
    """
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    is_whole_number = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_whole_number or alignment < 1 or alignment & (alignment - 1):  # type: ignore[operator]
        raise FileError(
            f"{path} is damaged: {ALIGNMENT_KEY} in its metadata is {str(alignment)[:40]}, and alignments "
            "are powers of two"
        )
    assert isinstance(alignment, int)
    return alignment


def read_tensor(cursor: HeaderCursor, metadata: Mapping[str, Value], alignment: int) -> GgufTensor:
    """Read what the header says of one tensor; `start` counts from the beginning of the data.

    Args:
        cursor: at the tensor's name.
        metadata: of the file.
        alignment: of the file.

    Raises:
        FileError: for sizes that are too many or do not go with the type, a type that is not read, or a
            place that is not aligned.
    """
    name = cursor.read_name("a tensor")
    num_dimensions = cursor.read_kind()
    if num_dimensions > MAX_DIMENSIONS:
        raise FileError(
            f"{cursor.path} cannot be read: {name} has {num_dimensions} dimensions, {MAX_DIMENSIONS} are "
            "allowed; ask who made the file"
        )
    sizes = [cursor.read_size() for _ in range(num_dimensions)]
    shape = tuple(reversed(sizes))  # GGUF has the size that changes fastest first
    kind, start = cursor.read_kind(), cursor.read_size()
    if not is_possible_shape(shape) or start >= 2**63:
        raise FileError(
            f"{cursor.path} is damaged: {name} has the shape {str(list(shape))[:80]}, which no file can hold"
        )
    if start % alignment:
        raise FileError(
            f"{cursor.path} is damaged: {name} begins at byte {start} of the data, which is no multiple of "
            f"the alignment {alignment}"
        )
    block = find_block_type(cursor.path, name, kind)
    if block is None:
        dtype = PLAIN_TYPES[kind]
        nbytes = prod(shape) * DTYPES[dtype].bits // 8
    else:
        dtype = "F32"
        check_blocks(cursor.path, name, shape, block)
        nbytes = prod(shape) // block.numbers * block.nbytes
    original_shape = find_original_shape(cursor.path, name, shape, metadata)
    return GgufTensor(name, dtype, block, original_shape, start, nbytes)


def find_block_type(path: Path, name: str, kind: int) -> BlockType | None:
    """The type of a tensor's blocks; None for plain numbers.

    Args:
        path: of the file.
        name: of the tensor.
        kind: number of its type.

    Raises:
        FileError: for a type that is not read, or that there is not.
    """
    if kind in PLAIN_TYPES:
        return None
    if kind in BLOCK_TYPES:
        return BLOCK_TYPES[kind]
    if kind in UNREAD_TYPES:
        raise FileError(
            f"{path} cannot be read: {name} is {UNREAD_TYPES[kind]}, which ComfyUI-GGUF or llama.cpp can "
            f"read; of GGUF int8run reads {', '.join(READ_NAMES)}; take a file with these"
        )
    raise FileError(f"{path} is damaged: {name} has type {kind}, which GGUF has not")


def check_blocks(path: Path, name: str, shape: tuple[int, ...], block: BlockType) -> None:
    """Raise FileError for a row that is not made of whole blocks."""
    row = shape[-1] if shape else 1
    if row % block.numbers:
        raise FileError(
            f"{path} is damaged: {name} has rows of {row} numbers, and {block.name} has blocks of "
            f"{block.numbers}"
        )


def find_original_shape(
    path: Path, name: str, shape: tuple[int, ...], metadata: Mapping[str, Value]
) -> tuple[int, ...]:
    """The shape that a tensor had before ComfyUI-GGUF's converter reshaped it, as far as the metadata says.

    Args:
        path: of the file.
        name: of the tensor.
        shape: that it has in the file.
        metadata: of the file.

    Raises:
        FileError: for one with another number of numbers.
    """
    original = metadata.get(SHAPE_PREFIX + name)
    if original is None:
        return shape
    is_shape = isinstance(original, tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in original
    )
    if not is_shape or prod(original) != prod(shape) or not is_possible_shape(original):  # type: ignore[arg-type]
        raise FileError(
            f"{path} is damaged: {SHAPE_PREFIX}{name} is {str(original)[:80]}, and the tensor has the shape "
            f"{list(shape)}"
        )
    assert isinstance(original, tuple)
    return tuple(int(size) for size in original)


def check_places(path: Path, tensors: list[GgufTensor], size: int) -> None:
    """Raise FileError for names that are there twice, and for tensors that overlap or end beyond the file.

    Args:
        path: of the file.
        tensors: in the order of their bytes.
        size: of the file in bytes.
    """
    seen: set[str] = set()
    previous, end = "the header", 0
    for tensor in tensors:
        if tensor.name in seen:
            raise FileError(f"{path} is damaged: it holds {tensor.name} twice")
        seen.add(tensor.name)
        if tensor.nbytes and tensor.start < end:
            raise FileError(
                f"{path} is damaged: {tensor.name} begins at byte {tensor.start}, inside of {previous}, "
                f"which ends at {end}"
            )
        if tensor.start + tensor.nbytes > size:
            raise FileError(
                f"{path} is cut off or damaged: {tensor.name} ends at byte {tensor.start + tensor.nbytes}, "
                f"the file has {size}; download it again"
            )
        if tensor.nbytes:
            previous, end = tensor.name, tensor.start + tensor.nbytes
