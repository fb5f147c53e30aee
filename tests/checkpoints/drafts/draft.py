"""A checkpoint of one layer that is to be written, byte for byte, and what is true of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from checkpoints.drafts.numbers import FP8, LAST_CAST_BYTE, LAST_FINITE_BYTE, Array, decode_fp8, expand_blocks

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}
LAYER = "blocks.0.q"
# rows and columns of the usual weight
N, K = 12, 64


@dataclass
class CheckpointDraft:
    """A file to be, and what is true of it.

    Args:
        tensors: key -> dtype, shape, bytes.
        real: layer -> its weight.
        expected: attributes of the layer that a reader must tell.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    real: dict[str, Array] = field(default_factory=dict)
    expected: dict[str, object] = field(default_factory=dict)
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def put(self, key: str, dtype: str, values: object) -> Array:
        """Add a tensor. Returns the numbers as the file holds them."""
        array = np.array(values, dtype=np.float64)
        if dtype == "BF16":
            bits = (array.astype("<f4").view("<u4") >> 16).astype("<u2")
            data, array = bits.tobytes(), (bits.astype("<u4") << 16).view("<f4").astype(np.float64)
        else:
            stored = array.astype(NUMPY[dtype])
            data, array = stored.tobytes(), stored.astype(np.float64)
        self.tensors[key] = dtype, array.shape, data
        return array

    def put_marker(self, key: str, content: object, padding: bytes = b"") -> None:
        """Add a marker."""
        text = content if isinstance(content, str) else json.dumps(content)
        data = text.encode() + padding
        self.tensors[key] = "U8", (len(data),), data

    def put_int8(self, key: str, *shape: int) -> Array:
        """Add int8 codes, all of -128..127."""
        codes = self.generator.integers(-128, 128, shape)
        codes.flat[0] = -128
        return self.put(key, "I8", codes)

    def put_fp8(self, key: str, dtype: str, *shape: int, is_cast: bool = False) -> Array:
        """Add finite fp8 numbers: of a cast small ones, else all up to the largest, as scaled ones are."""
        last_byte = LAST_CAST_BYTE if is_cast else LAST_FINITE_BYTE[dtype]
        magnitudes = self.generator.integers(0, last_byte + 1, shape)
        signs = self.generator.integers(0, 2, shape)
        codes = magnitudes | signs << 7
        if not is_cast and codes.size:
            codes.flat[0] = last_byte
        self.tensors[key] = dtype, tuple(shape), codes.astype("u1").tobytes()
        return decode_fp8(codes, FP8[dtype])

    def put_scale(self, key: str, *shape: int, dtype: str = "F32") -> Array:
        """Add scales."""
        return self.put(key, dtype, self.generator.uniform(0.001, 0.02, shape))

    def put_header(self, layers: dict[str, object]) -> None:
        """Describe layers in the header."""
        self.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})

    def add_prefix(self, prefix: str) -> "CheckpointDraft":
        """The same tensors with something before their names."""
        tensors = {prefix + key: tensor for key, tensor in self.tensors.items()}
        real = {prefix + name: weight for name, weight in self.real.items()}
        return CheckpointDraft(tensors, self.metadata, real, self.expected)

    def write(self, path: Path) -> Path:
        """Write the file."""
        header: dict[str, object] = {}
        if self.metadata:
            header["__metadata__"] = self.metadata

        body = b""
        for key, (dtype, shape, data) in self.tensors.items():
            start = len(body)
            body += data
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(body)]}

        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        return path


def set_expected(
    draft: CheckpointDraft, real: Array, kind: str, granularity: str, label: str, **others: object
) -> CheckpointDraft:
    draft.real[LAYER] = real
    draft.expected = {
        "storage_dtype": kind,
        "granularity": granularity,
        "label": label,
        "rows": real.shape[0],
        "columns": real.shape[1],
        **others,
    }
    return draft


def spread_scales(scale: Array, granularity: str, block: tuple[int, int]) -> Array:
    """The scales in a shape that multiplies the codes: one, one of each row, or one of each number."""
    if granularity == "tensor":
        return scale.reshape(1, 1)
    if granularity == "row":
        return scale.reshape(-1, 1)
    return expand_blocks(scale.reshape(scale.shape[:2]), *block)


def describe_granularity(granularity: str, block: tuple[int, int]) -> str:
    """As a layer's label has it: that of blocks with their width."""
    if granularity in ("tensor", "row"):
        return granularity
    return f"{granularity} {block[1]}"


Draft = Callable[[], CheckpointDraft]  # makes a file
Mistake = tuple[
    Draft, str
]  # a file with one thing wrong, and what its refusal must say (a regular expression)
