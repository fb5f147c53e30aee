"""Small files of text encoders of every kind, written from the published formats in numpy, without int8run.

`encoder(name, word)` is a file as its maker would write it: real random weights, rounded to a format. What
the codes stand for is worked out beside them, with other formulas than the oracle's.
"""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
}


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class File:
    """A file to be.

    Args:
        tensors: by key, in the order of their bytes.
        real: layer -> the weight that its codes and scales stand for.
        words: layer -> format, of quantized ones.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    real: dict[str, Array] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, dtype: str, values: object) -> Array:
        """Add numbers, or of 8-bit floats their bytes. Returns what the file holds."""
        array = np.array(values, dtype=np.float64)
        if dtype == "BF16":
            bits = array.astype("<f4").view("<u4")
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            self.tensors[key] = Stored(dtype, array.shape, bits.astype("<u2").tobytes())
            return (bits << 16).view("<f4").astype(np.float64)
        stored = array.astype(NUMPY[dtype])
        self.tensors[key] = Stored(dtype, array.shape, stored.tobytes())
        return stored.astype(np.float64)

    def text(self, key: str, content: object) -> None:
        """Add a marker: JSON, text or bytes as they are."""
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        self.tensors[key] = Stored("U8", (len(data),), data)

    def drop(self, *ends: str) -> "File":
        """Take out tensors whose keys end so."""
        for key in [key for key in self.tensors if key.endswith(ends)]:
            del self.tensors[key]
        return self

    def rename(self, change: Callable[[str], str]) -> "File":
        """Other names for all keys."""
        self.tensors = {change(key): stored for key, stored in self.tensors.items()}
        self.real = {
            change(f"{name}.weight").removesuffix(".weight"): weight for name, weight in self.real.items()
        }
        return self

    def prefixed(self, prefix: str) -> "File":
        """The same below a prefix."""
        return self.rename(lambda key: prefix + key)

    def copy(self) -> "File":
        """One that can be changed."""
        return File(dict(self.tensors), dict(self.metadata), dict(self.real), dict(self.words))

    def header(self) -> dict[str, Any]:
        """What the header says."""
        entries: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for key, (dtype, shape, data) in self.tensors.items():
            entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
            at += len(data)
        return entries

    def bytes(self, header: dict[str, Any] | bytes | None = None) -> bytes:
        """The file, with its own header or another."""
        text = (
            header
            if isinstance(header, bytes)
            else json.dumps(self.header() if header is None else header).encode()
        )
        return (
            len(text).to_bytes(8, "little") + text + b"".join(stored.data for stored in self.tensors.values())
        )

    def write(self, path: Path) -> Path:
        """Write it."""
        path.write_bytes(self.bytes())
        return path


# codes


def fp8_value(byte: int, exponent_bits: int) -> float:
    """The number of a finite byte."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (byte & 127) >> mantissa_bits, byte & (1 << mantissa_bits) - 1
    size = (mantissa + (1 << mantissa_bits) * (exponent > 0)) / (1 << mantissa_bits)
    return (-1) ** (byte >> 7) * size * 2.0 ** (max(exponent, 1) - (1 << exponent_bits - 1) + 1)


# bytes of the finite numbers from 0 up, and the numbers
FP8_BITS, LAST = {"F8_E4M3": 4, "F8_E5M2": 5}, {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
POSITIVE = {
    dtype: np.array([fp8_value(byte, bits) for byte in range(LAST[dtype] + 1)])
    for dtype, bits in FP8_BITS.items()
}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def find_nearest(values: Array, grid: Array) -> NDArray[np.int64]:
    """The place in a rising grid of the number that is nearest, the even one of two."""
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = values - grid[above - 1], grid[above] - values
    return np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)


def to_fp8(values: Array, dtype: str) -> tuple[NDArray[np.int64], Array]:
    """Bytes, and the numbers that they are."""
    place = find_nearest(abs(values), POSITIVE[dtype])
    return place | (values < 0).astype(np.int64) << 7, np.copysign(POSITIVE[dtype][place], values)


def make_regular_hadamard(size: int) -> Array:
    """Digits of row and column in base 4 that add to 3 give a minus each."""
    i, j = np.indices((size, size))
    minus = sum((i >> place & 3) + (j >> place & 3) == 3 for place in range(0, size.bit_length() - 1, 2))
    return (-1.0) ** minus / size**0.5


def in_tiles(scales: NDArray[np.int64]) -> NDArray[np.int64]:
    """Block scales in cuBLAS's order, by the formula for each.

    scales: [R, C] -> [R padded to 128, C padded to 4]
    """
    rows, columns = scales.shape
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    flat = np.zeros(high * wide, dtype=np.int64)
    for r in range(rows):
        for c in range(columns):
            flat[
                ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            ] = scales[r, c]
    return flat.reshape(high, wide)


def pad_weight(weight: Array, multiple: int) -> Array:
    """With rows and columns of zeros."""
    return np.pad(weight, [(0, -size % multiple) for size in weight.shape])


# formats

TENSOR = {"format": "int8_tensorwise"}
BLOCK, FP8_BLOCK, GROUP = 32, 16, 16
Made = tuple[Array, dict[str, Any] | None]  # the real weight, and the marker


def write_scaled(
    file: File, name: str, weight: Array, dtype: str, blocks: tuple[int, int], shape: Sequence[int] | None
) -> Array:
    """Codes and a scale for each block of rows and columns; shape: of the scales in the file."""
    top = 127 if dtype == "I8" else POSITIVE[dtype][-1]
    high, wide = blocks
    tiled = weight.reshape(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
    most = np.maximum(abs(tiled).max(axis=(1, 3)) / top, 1e-12)
    scale = file.put(
        f"{name}.weight_scale", "F32", most.reshape(shape if shape is not None else most.shape)
    ).reshape(most.shape)
    spread = np.kron(scale, np.ones(blocks))
    if dtype == "I8":
        codes = np.clip(np.round(weight / spread), -127, 127)
        stored: Array | NDArray[np.int64] = codes
    else:
        stored, codes = to_fp8(weight / spread, dtype)
    file.put(f"{name}.weight", dtype, stored)
    return codes * spread


def write_int8_convrot(file: File, name: str, weight: Array, group: int = GROUP) -> Made:
    """Groups of columns rotated, then rows."""
    matrix = np.kron(np.eye(weight.shape[1] // group), make_regular_hadamard(group))
    real = write_scaled(file, name, weight @ matrix, "I8", (1, weight.shape[1]), None) @ matrix
    return real, {**TENSOR, "convrot": True, "convrot_groupsize": group, "per_row": True}


def write_cast(file: File, name: str, weight: Array, dtype: str) -> Made:
    """fp8 without a scale."""
    codes, real = to_fp8(weight, dtype)
    file.put(f"{name}.weight", dtype, codes)
    return real, None


def write_mxfp8(file: File, name: str, weight: Array, tiles: bool = True, dtype: str = "U8") -> Made:
    """A power of 2 for 32 numbers of a row."""
    wide = pad_weight(weight, 32)
    most = abs(wide).reshape(wide.shape[0], -1, 32).max(axis=2)
    exponent = np.where(
        most == 0, 0, np.clip(np.ceil(np.log2(np.maximum(most / 448, 2.0**-127))) + 127, 0, 254)
    ).astype(np.int64)
    spread = np.kron(2.0 ** (exponent - 127.0), np.ones((1, 32)))
    codes, values = to_fp8(wide / spread, "F8_E4M3")
    file.put(f"{name}.weight", "F8_E4M3", codes)
    file.put(f"{name}.weight_scale", dtype, in_tiles(exponent) if tiles else exponent)
    return values * spread, {"format": "mxfp8"}


def write_nvfp4(file: File, name: str, weight: Array, tiles: bool = True, dtype: str = "F8_E4M3") -> Made:
    """Codes of 4 bits, two levels of scales; tiles: ComfyUI's flavour, else ModelOpt's."""
    wide = pad_weight(weight, 16)
    total = file.put(f"{name}.weight_scale_2", "F32", max(abs(wide).max() / (448 * 6), 1e-12)).item()
    most = abs(wide).reshape(wide.shape[0], -1, 16).max(axis=2)
    scale_codes, scale = to_fp8(np.minimum(most / 6 / total, 448), "F8_E4M3")
    spread = np.kron(scale * total, np.ones((1, 16)))
    ratio = np.divide(wide, spread, out=np.zeros_like(wide), where=spread > 0)
    place = find_nearest(abs(ratio), FP4)
    codes = place + 8 * (wide < 0)
    even, odd = codes[:, ::2], codes[:, 1::2]
    file.put(f"{name}.weight", "U8", even * 16 + odd if tiles else odd * 16 + even)
    file.put(f"{name}.weight_scale", dtype, in_tiles(scale_codes) if tiles else scale_codes)
    return np.copysign(FP4[place], wide) * spread, {"format": "nvfp4"} if tiles else None


CODEBOOK = (-1, -0.8, -0.64, -0.5, -0.38, -0.26, -0.16, -0.05, 0.05, 0.16, 0.27, 0.38, 0.5, 0.64, 0.8, 1)


def write_codes(file: File, name: str, weight: Array, bits: int) -> Made:
    """Groups of columns rotated; codes of few bits, a scale for each group and one for each row."""
    matrix = np.kron(np.eye(weight.shape[1] // GROUP), make_regular_hadamard(GROUP))
    rotated = weight @ matrix
    levels: Array = np.arange(64) - 32.0
    if bits == 4:
        levels = file.put(f"{name}.weight_codebook", "F32", CODEBOOK)
    rows = file.put(f"{name}.weight_s_channel", "F32", np.maximum(abs(rotated).max(axis=1) / 127, 1e-12))
    groups = rotated.reshape(len(rotated), -1, GROUP) / rows[:, None, None]
    scale_codes, scale = to_fp8(abs(groups).max(axis=2) / (1 if bits == 4 else 31), "F8_E4M3")
    file.put(f"{name}.weight_s_rel", "F8_E4M3", scale_codes)
    # products as a reader has them, so that both round the same number
    products = scale.astype("<f4")[:, :, None] * levels.astype("<f4")
    table = np.clip(np.round(products), -127, 127).astype(np.float64)  # [N, groups, levels]
    codes = abs(groups[:, :, :, None] - table[:, :, None]).argmin(axis=3)
    if bits == 6:
        codes = np.maximum(codes, 1)  # which the format leaves out
    found = np.take_along_axis(table, codes, axis=2).reshape(rotated.shape)
    file.put(f"{name}.weight", "I8", to_signed(pack_codes(codes.reshape(rotated.shape), bits)))
    marker = {"format": "asym_w4a8_int8", "group_size": GROUP, "convrot_groupsize": GROUP}
    return found * rows[:, None] @ matrix, marker


def pack_codes(codes: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Bytes of rows: code 2 i is the lower half of byte i; of 6 bits the rest of code c is in byte c / 4."""
    n, k = codes.shape
    packed = np.zeros((n, k * bits // 8), dtype=np.int64)
    for column in range(k):
        packed[:, column // 2] |= (codes[:, column] % 16) << 4 * (column % 2)
        if bits == 6:
            packed[:, k // 2 + column // 4] |= (codes[:, column] // 16) << 2 * (column % 4)
    return packed


def to_signed(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes as int8."""
    return values.astype("u1").view("i1").astype(np.int64)


def make_row_writer(
    shape: str, marker: dict[str, Any], dtype: str = "I8"
) -> Callable[[File, str, Array], Made]:
    """A scale for each row."""

    def make(file: File, name: str, weight: Array) -> Made:
        n, k = weight.shape
        return write_scaled(file, name, weight, dtype, (1, k), (n,) if shape == "[N]" else (n, 1)), marker

    return make


def make_tensor_writer(marker: dict[str, Any], dtype: str = "I8") -> Callable[[File, str, Array], Made]:
    """One scale."""
    return lambda file, name, weight: (write_scaled(file, name, weight, dtype, weight.shape, ()), marker)  # type: ignore[arg-type]


def make_grid_writer(
    size: int, marker: dict[str, Any], dtype: str = "I8"
) -> Callable[[File, str, Array], Made]:
    """A scale for each square block."""
    return lambda file, name, weight: (
        write_scaled(file, name, weight, dtype, (size, size), None),
        {**marker, "group_size": size},
    )


def make_block3d_writer(
    size: int, marker: dict[str, Any], dtype: str = "I8"
) -> Callable[[File, str, Array], Made]:
    """A scale for each block of a row, in three dimensions."""

    def make(file: File, name: str, weight: Array) -> Made:
        n, k = weight.shape
        return write_scaled(file, name, weight, dtype, (1, size), (n, k // size, 1)), {
            **marker,
            "group_size": size,
        }

    return make


E4M3, E5M2 = "F8_E4M3", "F8_E5M2"
FORMATS: dict[str, Callable[[File, str, Array], Made]] = {
    "int8_tensorwise": make_tensor_writer(TENSOR),
    "int8_rowwise": make_row_writer("[N, 1]", {**TENSOR, "per_row": True}),
    "int8_convrot": write_int8_convrot,
    "int8_blockwise": make_grid_writer(BLOCK, {"format": "int8_blockwise"}),
    "int8_block3d": make_block3d_writer(BLOCK, {"format": "int8_blockwise"}),
    "float8_e4m3fn": make_tensor_writer({"format": "float8_e4m3fn"}, E4M3),
    "float8_e5m2": make_tensor_writer({"format": "float8_e5m2"}, E5M2),
    "float8_e4m3fn_cast": lambda file, name, weight: write_cast(file, name, weight, E4M3),
    "float8_e5m2_cast": lambda file, name, weight: write_cast(file, name, weight, E5M2),
    "float8_e4m3fn_rowwise": make_row_writer("[N]", {"format": "float8_e4m3fn_rowwise"}, E4M3),
    "float8_e4m3fn_blockwise": make_grid_writer(FP8_BLOCK, {"format": "float8_e4m3fn_blockwise"}, E4M3),
    "float8_e4m3fn_block3d": make_block3d_writer(FP8_BLOCK, {"format": "float8_e4m3fn_block3d"}, E4M3),
    "mxfp8": write_mxfp8,
    "nvfp4": write_nvfp4,
    "nvfp4_modelopt": lambda file, name, weight: write_nvfp4(file, name, weight, tiles=False),
    "w4a8": lambda file, name, weight: write_codes(file, name, weight, 4),
    "w6a8": lambda file, name, weight: write_codes(file, name, weight, 6),
}
# how far the rounded weight may be from the real one, as a part of its size
ERRORS = {
    "int8": 0.06,
    "float8_e4m3fn": 0.04,
    "float8_e5m2": 0.08,
    "mxfp8": 0.04,
    "nvfp4": 0.16,
    "w4": 0.16,
    "w6": 0.05,
}


def allowed_error(word: str) -> float:
    """Of a format; int8 with few scales is coarser where the weight has outliers."""
    return next(error for start, error in ERRORS.items() if word.startswith(start))


# encoders

WIDE, INNER, VOCAB = 64, 128, 40


def stack_layers(
    shapes: dict[str, tuple[int, ...]], layers: int, start: str, inner: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Layers with a number in their name."""
    return {**shapes, **{f"{start}{i}.{key}": shape for i in range(layers) for key, shape in inner.items()}}


def make_clip_shapes(projection: bool, inner_size: int) -> dict[str, tuple[int, ...]]:
    norms = {f"layer_norm{i}.{x}": (WIDE,) for i in (1, 2) for x in ("weight", "bias")}
    linears = {f"self_attn.{x}_proj": (WIDE, WIDE) for x in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner_size, WIDE), "mlp.fc2": (WIDE, inner_size)}
    inner = {f"{key}.weight": shape for key, shape in linears.items()} | {
        f"{key}.bias": shape[:1] for key, shape in linears.items()
    }
    outer = {
        "text_model.embeddings.token_embedding.weight": (VOCAB, WIDE),
        "text_model.embeddings.position_embedding.weight": (77, WIDE),
        "text_model.final_layer_norm.weight": (WIDE,),
        "text_model.final_layer_norm.bias": (WIDE,),
        **({"text_projection.weight": (WIDE, WIDE)} if projection else {}),
    }
    return stack_layers(outer, 1, "text_model.encoder.layers.", {**norms, **inner})


def make_t5_shapes(layers: int, bias_everywhere: bool, inner_size: int) -> dict[str, tuple[int, ...]]:
    inner = {
        **{f"layer.0.SelfAttention.{x}.weight": (WIDE, WIDE) for x in "qkvo"},
        "layer.0.layer_norm.weight": (WIDE,),
        **{f"layer.1.DenseReluDense.wi_{x}.weight": (inner_size, WIDE) for x in (0, 1)},
        "layer.1.DenseReluDense.wo.weight": (WIDE, inner_size),
        "layer.1.layer_norm.weight": (WIDE,),
    }
    outer = {"shared.weight": (VOCAB, WIDE), "encoder.final_layer_norm.weight": (WIDE,)}
    biased = range(layers) if bias_everywhere else range(1)
    outer |= {
        f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 1) for i in biased
    }
    return stack_layers(outer, layers, "encoder.block.", inner)


def make_llm_shapes(
    inner_size: int, head: int, norms: Sequence[str], per_head: bool = False, biases: bool = False
) -> dict[str, tuple[int, ...]]:
    """One layer with one head."""
    attention = {"q": (head, WIDE), "k": (head, WIDE), "v": (head, WIDE), "o": (WIDE, head)}
    inner: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{x}_proj.weight": shape for x, shape in attention.items()},
        **{f"mlp.{x}_proj.weight": (inner_size, WIDE) for x in ("gate", "up")},
        "mlp.down_proj.weight": (WIDE, inner_size),
        **{f"{x}.weight": (WIDE,) for x in norms},
        **({f"self_attn.{x}_norm.weight": (head,) for x in "qk"} if per_head else {}),
        **({f"self_attn.{x}_proj.bias": (head,) for x in "qkv"} if biases else {}),
    }
    return stack_layers(
        {"model.embed_tokens.weight": (VOCAB, WIDE), "model.norm.weight": (WIDE,)}, 1, "model.layers.", inner
    )


BEFORE_AND_AFTER = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*BEFORE_AND_AFTER, "pre_feedforward_layernorm", "post_feedforward_layernorm")
ENCODERS: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {
    "clip_l": lambda inner: make_clip_shapes(False, inner),
    "clip_g": lambda inner: make_clip_shapes(True, inner),
    "t5": lambda inner: make_t5_shapes(1, False, inner),
    "umt5": lambda inner: make_t5_shapes(2, True, inner),
    "qwen3": lambda inner: make_llm_shapes(inner, 128, BEFORE_AND_AFTER, per_head=True),
    "qwen2_5": lambda inner: make_llm_shapes(inner, 128, BEFORE_AND_AFTER, biases=True),
    "llama": lambda inner: make_llm_shapes(inner, 128, BEFORE_AND_AFTER),
    "gemma2": lambda inner: make_llm_shapes(inner, 256, FOUR_NORMS),
}
FLOAT = (
    "embedding.weight",
    "relative_attention_bias.weight",
    "shared.weight",
    "embed_tokens.weight",
    "text_projection.weight",
)


def make_encoder_file(
    name: str,
    word: str = "",
    *,
    carrier: str = "tensor",
    only: Sequence[str] = (),
    seed: int = 0,
    dtype: str = "BF16",
    words: Sequence[str] = (),
    inner: int = INNER,
    quantized: Sequence[str] = (),
) -> File:
    """One encoder.

    Args:
        word: the format of its matrices; empty: floats.
        carrier: where the markers are: tensor, header, both or none.
        only: parts of names of what is kept; empty: all.
        dtype: of what is not quantized.
        words: several formats, for its matrices in turn.
        inner: width of the layers' inside.
        quantized: keys that are quantized too; embeddings are not otherwise.
    """
    chance, file, told = np.random.default_rng(seed), File(metadata={"format": "pt"}), {}
    turn = 0
    for key, shape in ENCODERS[name](inner).items():
        if only and not any(part in key for part in only):
            continue
        layer = key.removesuffix(".weight")
        values = chance.normal(size=shape) * (0.1 if len(shape) == 2 else 0.02) + (
            1.0 if key.endswith("norm.weight") else 0.0
        )
        chosen = words[turn % len(words)] if words else word
        if len(shape) == 2 and chosen and (key in quantized or not key.endswith(FLOAT)):
            turn += 1
            values[::7, 3] *= 8  # outliers
            real, marker = FORMATS[chosen](file, layer, values)
            file.real[layer], file.words[layer] = real, chosen
            if marker is not None:
                told[layer] = marker
        else:
            real = file.put(key, dtype, values)
            if len(shape) == 2:
                file.real[layer] = real
    for layer, marker in told.items() if carrier in ("tensor", "both") else ():
        file.text(f"{layer}.comfy_quant", marker)
    if told and carrier in ("header", "both"):
        file.metadata["_quantization_metadata"] = json.dumps(
            {"format_version": "1.0", "layers": deepcopy(told)}
        )
    return file


def to_legacy(file: File, elements: int = 0, dtype: str = "F8_E4M3") -> File:
    """The names of 2024: `scale_weight`, `scale_input`, and one marker for the file."""
    old = file.drop(".comfy_quant").rename(lambda key: key.replace("weight_scale", "scale_weight"))
    old.tensors["scaled_fp8"] = Stored(dtype, (elements,), bytes(elements * (4 if dtype == "F32" else 1)))
    for layer in old.words:
        old.put(f"{layer}.scale_input", "F32", 1.0)
    return old
