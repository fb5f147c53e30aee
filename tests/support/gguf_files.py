"""GGUF files for tests: written by llama.cpp's own library, or byte by byte where they must be wrong.

`stand_for` has ggml's formulas (`ggml-quants.c`) once more, number by number in float64: what blocks mean is
told by three programs.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
TYPES = gguf.GGMLQuantizationType
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
# where a block has its float16 scales
SCALE_PLACES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
Value = str | int | float | bool | Sequence[int]


def write_gguf(
    path: Path,
    tensors: Mapping[str, Array],
    kind: str | Callable[[str, Array], str] = "F32",
    *,
    architecture: str = "flux",
    metadata: Mapping[str, Value] | None = None,
) -> dict[str, Array]:
    """Write a file with the library; what a type cannot hold is F32, as converters have it.

    Args:
        path: of the file.
        tensors: by name.
        kind: type of all tensors, or of each.
        architecture: for `general.architecture`.
        metadata: further entries.

    Returns:
        What the library reads from the bytes of each tensor.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    meant = {}
    for name, tensor in tensors.items():
        chosen = TYPES[kind if isinstance(kind, str) else kind(name, tensor)]
        block_size, _ = gguf.GGML_QUANT_SIZES[chosen]
        if block_size > 1 and (tensor.ndim < 2 or tensor.shape[-1] % block_size):
            chosen = TYPES.F32
        data = gguf.quants.quantize(np.ascontiguousarray(tensor, dtype=np.float32), chosen)
        meant[name] = gguf.quants.dequantize(data, chosen).reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=chosen)
    finish(writer)
    return meant


def write_blocks(
    path: Path, blocks: Mapping[str, tuple[str, Bytes]], metadata: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Write tensors whose bytes are given.

    Args:
        path: of the file.
        blocks: type and bytes [rows, bytes of a row] of each tensor.
        metadata: lists of numbers.
    """
    writer = gguf.GGUFWriter(path, "flux")
    for key, numbers in (metadata or {}).items():
        writer.add_array(key, list(numbers))
    for name, (kind, data) in blocks.items():
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def draw_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """Random blocks with finite scales: every byte is possible where integers are.

    Returns:
        uint8 [rows, bytes of a row].
    """
    chance = np.random.default_rng(seed)
    numbers, nbytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = chance.integers(0, 256, (rows * columns // numbers, nbytes), dtype=np.uint8)
    for place in SCALE_PLACES[kind]:
        scales = chance.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def stand_for(kind: str, data: Bytes) -> NDArray[np.float64]:
    """The numbers of blocks, one after the other. data: uint8 [rows, bytes] -> float64 [rows, numbers]."""
    _, nbytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    rows = []
    for row in data:
        blocks = [row[start : start + nbytes] for start in range(0, len(row), nbytes)]
        rows.append(np.concatenate([FORMULAS[kind](bytes(block)) for block in blocks]))
    return np.stack(rows)


def half(block: bytes, place: int) -> float:
    return float(struct.unpack_from("<e", block, place)[0])


def get_nibble(block: bytes, place: int, i: int) -> int:
    """Number i of 32, whose first 16 are the low halves of bytes."""
    byte = block[place + i % 16]
    return byte & 15 if i < 16 else byte >> 4


def get_bit(block: bytes, place: int, i: int) -> int:
    return block[place + i // 8] >> i % 8 & 1


def read_q4_0(block: bytes) -> NDArray[np.float64]:
    return np.array([half(block, 0) * (get_nibble(block, 2, i) - 8) for i in range(32)])


def read_q4_1(block: bytes) -> NDArray[np.float64]:
    return np.array([half(block, 0) * get_nibble(block, 4, i) + half(block, 2) for i in range(32)])


def read_q5_0(block: bytes) -> NDArray[np.float64]:
    codes = [get_nibble(block, 6, i) + 16 * get_bit(block, 2, i) for i in range(32)]
    return np.array([half(block, 0) * (code - 16) for code in codes])


def read_q5_1(block: bytes) -> NDArray[np.float64]:
    codes = [get_nibble(block, 8, i) + 16 * get_bit(block, 4, i) for i in range(32)]
    return np.array([half(block, 0) * code + half(block, 2) for code in codes])


def read_q8_0(block: bytes) -> NDArray[np.float64]:
    return np.array([half(block, 0) * code for code in struct.unpack_from("<32b", block, 2)])


def get_scale_and_min(packed: bytes, group: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of one of 8 groups, packed into 12 bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    scale = packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4
    least = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
    return scale, least


def read_k(block: bytes, codes_at: int, high_bits_at: int | None) -> NDArray[np.float64]:
    """Q4_K and Q5_K: 8 groups of 32 with a scale and a minimum each."""
    numbers = []
    for i in range(256):
        group = i // 32
        byte = block[codes_at + 32 * (group // 2) + i % 32]
        code = byte >> 4 if group % 2 else byte & 15
        if high_bits_at is not None:
            code += 16 * (block[high_bits_at + i % 32] >> group & 1)
        scale, least = get_scale_and_min(block[4:16], group)
        numbers.append(half(block, 0) * scale * code - half(block, 2) * least)
    return np.array(numbers)


def read_q6_k(block: bytes) -> NDArray[np.float64]:
    """16 groups of 16 with a signed scale of 8 bits each."""
    numbers = []
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        low = block[64 * part + column + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        high = block[128 + 32 * part + column] >> 2 * quarter & 3
        (scale,) = struct.unpack_from("<b", block, 192 + i // 16)
        numbers.append(half(block, 208) * scale * (low + 16 * high - 32))
    return np.array(numbers)


FORMULAS: dict[str, Callable[[bytes], NDArray[np.float64]]] = {
    "Q4_0": read_q4_0,
    "Q4_1": read_q4_1,
    "Q5_0": read_q5_0,
    "Q5_1": read_q5_1,
    "Q8_0": read_q8_0,
    "Q4_K": lambda block: read_k(block, 16, None),
    "Q5_K": lambda block: read_k(block, 48, 16),
    "Q6_K": read_q6_k,
}

# -- byte by byte ----------------------------------------------------------------------------------


def pack_text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


@dataclass
class DraftTensor:
    """A tensor as a header describes it, and its bytes.

    Args:
        name: text or bytes.
        sizes: as GGUF has them, the one that changes fastest first.
        kind: number of the type.
        data: its bytes.
        offset: in the data; None: the next place.
        num_sizes: that the header claims; None: as many as there are.
    """

    name: str | bytes
    sizes: Sequence[int]
    kind: int
    data: bytes
    offset: int | None = None
    num_sizes: int | None = None


@dataclass
class GgufDraft:
    """A file to be, of which anything may be wrong.

    Args:
        metadata: key, type and packed value of each entry.
        tensors: in the order of their bytes.
        magic: first letters.
        version: packed.
        alignment: by which places are chosen.
        num_tensors, num_entries: that the header claims; None: as many as there are.
        tail: after everything.
    """

    metadata: list[tuple[str | bytes, int, bytes]] = field(default_factory=list)
    tensors: list[DraftTensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    alignment: int = 32
    num_tensors: int | None = None
    num_entries: int | None = None
    tail: bytes = b""

    def add_text(self, key: str | bytes, text: str | bytes) -> "GgufDraft":
        self.metadata.append((key, 8, pack_text(text)))
        return self

    def add_uint32(self, key: str | bytes, number: int) -> "GgufDraft":
        self.metadata.append((key, 4, struct.pack("<I", number)))
        return self

    def to_bytes(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_entries = len(self.metadata) if self.num_entries is None else self.num_entries
        header = self.magic + self.version + struct.pack("<QQ", num_tensors, num_entries)
        for key, kind, value in self.metadata:
            header += pack_text(key) + struct.pack("<I", kind) + value
        data = b""
        for tensor in self.tensors:
            data += b"\0" * (-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            num_sizes = len(tensor.sizes) if tensor.num_sizes is None else tensor.num_sizes
            header += pack_text(tensor.name) + struct.pack("<I", num_sizes)
            header += struct.pack(f"<{len(tensor.sizes)}Q", *tensor.sizes)
            header += struct.pack("<IQ", tensor.kind, offset)
            data += tensor.data
        return header + b"\0" * (-len(header) % self.alignment) + data + self.tail

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path
