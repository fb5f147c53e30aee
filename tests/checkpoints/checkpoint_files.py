"""Small checkpoints of every kind that is read, written byte for byte by the formats' published formulas.

Nothing of int8run is used here. Codes and scales are random, so that nothing is rounded; the real weight is
computed in float64. `MISTAKES` are files with one thing wrong, each with the words that the refusal must
contain.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LAYER = "blocks.0.q"
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


# -- numbers ---------------------------------------------------------------------------------------


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


FP8 = {"F8_E4M3": 4, "F8_E5M2": 5}
LAST_FINITE_BYTE = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
LAST_CAST_BYTE = 0x40  # 2, as large as weights are that nothing was divided by


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


# -- files -----------------------------------------------------------------------------------------


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


# -- kinds -----------------------------------------------------------------------------------------

N, K = 12, 64
TENSOR, ROW = {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "per_row": True}


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


def draft_int8(
    shape: tuple[int, ...],
    granularity: str,
    marker: object = None,
    *,
    weight: tuple[int, int] = (N, K),
    name: str = "weight_scale",
    dtype: str = "F32",
    block: tuple[int, int] = (1, 1),
    label: str = "int8_tensorwise",
    header: object = None,
    padding: bytes = b"",
    exact: bool = True,
) -> CheckpointDraft:
    """Codes, scales of a shape and perhaps a marker or an entry in the header; not rotated."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", *weight)
    s = draft.put_scale(f"{LAYER}.{name}", *shape, dtype=dtype)
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker, padding)
    if header is not None:
        draft.put_header({LAYER: header})
    draft.put(f"{LAYER}.bias", "BF16", draft.generator.normal(size=weight[0]))

    full = spread_scales(s, granularity, block)
    full = full[: weight[0], : weight[1]]  # the last blocks may be cut off
    words = f"{label}, {describe_granularity(granularity, block)}"
    return set_expected(draft, q * full, "int8", granularity, words, is_exact=exact, outlier_method="none")


def draft_rotated(draft: CheckpointDraft, matrix: Array, method: str) -> CheckpointDraft:
    """The same file, known to be rotated: a marker must say so."""
    draft.real[LAYER] = rotate_groups(draft.real[LAYER], matrix)
    label = f"{draft.expected['label']}, {method} {len(matrix)}"
    draft.expected |= {
        "outlier_method": method,
        "rotation_group_size": len(matrix),
        "outlier_settings": {"group_size": len(matrix)},
        "label": label,
    }
    return draft


def draft_convrot(group: int, k: int = K, **marker: object) -> CheckpointDraft:
    said = {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": group,
        "per_row": True,
        **marker,
    }
    return draft_rotated(draft_int8((N, 1), "row", said, weight=(N, k)), make_regular(group), "convrot")


def draft_rotation_lost_in_header(header: dict[str, object]) -> CheckpointDraft:
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "per_row": True}
    return draft_rotated(draft_int8((N, 1), "row", said, header=header), make_regular(16), "convrot")


def draft_smoothed(rotation: bool) -> CheckpointDraft:
    said: dict[str, object] = {"format": "int8_tensorwise"}
    if rotation:
        said |= {"convrot": True, "convrot_groupsize": 16}

    draft = draft_int8((N, 1), "row", said)
    if rotation:
        draft_rotated(draft, make_regular(16), "convrot")
    else:
        draft.expected |= {"outlier_method": "smoothquant", "label": "int8_tensorwise, row, smoothquant"}

    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, K))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


def draft_toolkit(
    sigma: bool, matrix: bool = True, scale: tuple[int, ...] = (N, 1), dtype: str = "F32"
) -> CheckpointDraft:
    """QuaRot's codes, divided by HadaNorm's sigma too.

    Args:
        sigma: whether the file has HadaNorm's factors.
        matrix: whether the file has the rotation.
        scale: shape of the scales: one of each row, or one.
        dtype: of the rotation.
    """
    draft = CheckpointDraft()
    k, group_size = 256, 128
    q = draft.put_int8(f"{LAYER}.weight", N, k)
    s = draft.put_scale(f"{LAYER}.weight_scale", *scale)
    draft.put(f"{LAYER}.weight_packed", "I8", q.T)

    granularity = "row" if s.size > 1 else "tensor"
    method = "hadanorm" if sigma else "quarot"
    label = f"int8, {granularity}, {method}"
    real = q * s.reshape(-1, 1)
    if matrix:
        rotation = make_sylvester(group_size)
        draft.put(f"{LAYER}.quarot_hadamard", dtype, rotation)
        real = rotate_groups(real, rotation)
        label += f" {group_size}"
    if sigma:
        real = real / draft.put(f"{LAYER}.hadanorm_sigma", "F32", draft.generator.uniform(0.5, 2, k))

    return set_expected(
        draft,
        real,
        kind="int8",
        granularity=granularity,
        label=label,
        is_exact=True,
        outlier_method=method,
        is_centered=sigma,
    )


def draft_quip(n: int, k: int, smooth: bool = False) -> CheckpointDraft:
    """Padded to powers of 2; only n and k rows and columns are the weight."""
    draft = CheckpointDraft()
    rows = 1 << (n - 1).bit_length()
    columns = 1 << (k - 1).bit_length()
    q = draft.put_int8(f"{LAYER}.weight", rows, columns)
    s = draft.put_scale(f"{LAYER}.weight_scale", rows, 1)
    draft.put_marker(f"{LAYER}.comfy_quant", TENSOR)
    draft.put(f"{LAYER}.hadamard_quip", "I8", 1)
    draft.put(f"{LAYER}.hadamard_size_out", "I32", rows)
    draft.put(f"{LAYER}.hadamard_size_in", "I32", columns)
    row_sign = draft.put(f"{LAYER}.sign_row", "F32", draft.generator.choice([-1.0, 1.0], rows))
    column_sign = draft.put(f"{LAYER}.sign_col", "F32", draft.generator.choice([-1.0, 1.0], columns))

    rotated = make_sylvester(rows) @ (q * s) @ make_sylvester(columns)
    padded = row_sign[:, None] * rotated * column_sign
    real = padded[:n, :k]
    if smooth:
        real = real / draft.put(f"{LAYER}.smooth_factors", "F32", draft.generator.uniform(0.5, 2, k))
    draft.put(f"{LAYER}.bias", "F32", np.zeros(n))

    set_expected(
        draft,
        real,
        kind="int8",
        granularity="row",
        label="int8_tensorwise, row, quip",
        is_exact=False,
        outlier_method="quip",
        is_padded=True,
    )
    draft.expected |= {"rows": rows, "columns": columns}
    return draft


def draft_older_quip(dense: bool) -> CheckpointDraft:
    """Before padding: factors of rows and columns, or whole matrices where dense."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", N, K)
    s = draft.put_scale(f"{LAYER}.weight_scale", N, 1)
    u_shape = (N, N) if dense else (N,)
    v_shape = (K, K) if dense else (K,)
    u = draft.put(f"{LAYER}.quip_s_u", "F32", draft.generator.normal(size=u_shape))
    v = draft.put(f"{LAYER}.quip_s_v", "F32", draft.generator.normal(size=v_shape))

    real = u @ (q * s) @ v.T if dense else u[:, None] * (q * s) * v
    return set_expected(
        draft,
        real,
        kind="int8",
        granularity="row",
        label="int8, row, quip",
        is_exact=False,
        outlier_method="quip",
        is_padded=False,
    )


def draft_transposed() -> CheckpointDraft:
    """[K, N] in the file."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", K, N)
    s = draft.put_scale(f"{LAYER}.weight_scale", 1, N)
    return set_expected(
        draft,
        (q * s).T,
        kind="int8",
        granularity="transposed",
        label="int8, transposed",
        is_exact=False,
        outlier_method="none",
    )


def draft_fp8(
    shape: tuple[int, ...] | None,
    granularity: str,
    *,
    dtype: str = "F8_E4M3",
    name: str = "weight_scale",
    marker: object = None,
    block: tuple[int, int] = (1, 1),
    legacy: int | None = None,
    header: object = None,
) -> CheckpointDraft:
    """fp8 numbers; legacy: elements of the `scaled_fp8` marker of the file."""
    draft = CheckpointDraft()
    real = draft.put_fp8(f"{LAYER}.weight", dtype, N, K, is_cast=shape is None)
    word = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    label = f"{word} cast"
    if shape is not None:
        s = draft.put_scale(f"{LAYER}.{name}", *shape)
        full = spread_scales(s, granularity, block)[:N, :K]
        real = real * full
        label = f"{word} scaled, {describe_granularity(granularity, block)}"
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.put_header({LAYER: header})
    if legacy is not None:
        draft.tensors["scaled_fp8"] = dtype, (legacy,), bytes(legacy)
        if shape is not None:
            draft.put(f"{LAYER}.scale_input", "F32", 1.0)
    return set_expected(draft, real, "fp8", granularity, label, is_exact=False, outlier_method="none")


def draft_smoothed_fp8() -> CheckpointDraft:
    draft = draft_fp8((), "tensor", marker={"format": "float8_e4m3fn"})
    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, K))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def swizzle(scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same scales where cuBLAS wants them, and rubbish where it wants none."""
    rows, columns = scale.shape
    shape = round_up(rows, 128), round_up(columns, 4)
    flat = np.full(shape, 0xFF, np.uint8).reshape(-1)

    r, c = np.indices(scale.shape)
    tiles_in_a_row = shape[1] // 4
    tile = r // 128 * tiles_in_a_row + c // 4  # of 128 rows and 4 columns
    place = r % 32 * 16 + r % 128 // 32 * 4 + c % 4  # in the tile
    flat[tile * 512 + place] = scale
    return flat.reshape(shape)


def put_block_scales(draft: CheckpointDraft, scale: NDArray[np.uint8], tiles: bool, dtype: str) -> None:
    found = swizzle(scale) if tiles else scale
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, found.shape, found.tobytes()


def put_nvfp4(draft: CheckpointDraft, rows: int, columns: int, *, tiles: bool, dtype: str) -> Array:
    """Add two numbers of 4 bits a byte, a scale in e4m3 for each 16, and one for all. Returns the weight."""
    codes = draft.generator.integers(0, 256, (rows, columns // 2)).astype("u1")
    draft.tensors[f"{LAYER}.weight"] = "U8", codes.shape, codes.tobytes()
    high, low = codes >> 4, codes & 15
    pairs = (high, low) if tiles else (low, high)  # ComfyUI has the first number on top, ModelOpt below
    numbers = E2M1[np.stack(pairs, -1)]  # [rows, columns / 2, 2]

    scale = draft.generator.integers(0, 0x7F, (rows, columns // 16)).astype("u1")
    scale_of_all = draft.put_scale(f"{LAYER}.weight_scale_2")
    put_block_scales(draft, scale, tiles, dtype or "F8_E4M3")
    return numbers.reshape(rows, columns) * expand_blocks(decode_fp8(scale, 4), 1, 16) * scale_of_all


def put_mxfp8(draft: CheckpointDraft, rows: int, columns: int, *, tiles: bool, dtype: str) -> Array:
    """Add numbers in e4m3 and for each 32 of them a power of 2. Returns the weight."""
    numbers = draft.put_fp8(f"{LAYER}.weight", "F8_E4M3", rows, columns)
    scale = draft.generator.integers(100, 140, (rows, columns // 32)).astype("u1")
    put_block_scales(draft, scale, tiles, dtype or "U8")
    return numbers * expand_blocks(2.0 ** (scale - 127.0), 1, 32)


def draft_blocks(
    kind: str,
    n: int = N,
    k: int = 40,
    *,
    marker: object = None,
    tiles: bool = True,
    dtype: str = "",
    rows: int | None = None,
    header: object = None,
    bias: bool = True,
    word: str = "",
    told: tuple[bool, bool] | None = None,
    scalar: bool = False,
) -> CheckpointDraft:
    """mxfp8 or nvfp4 with random numbers, also in the padding.

    Args:
        n, k: of the weight.
        rows: in the file; None: padded as ComfyUI pads.
        told: which of them the file tells.
    """
    draft = CheckpointDraft()
    block_size, put_weight = (16, put_nvfp4) if kind == "nvfp4" else (32, put_mxfp8)
    padded_rows = rows or round_up(n, block_size)
    padded_columns = round_up(k, block_size)
    padded = put_weight(draft, padded_rows, padded_columns, tiles=tiles, dtype=dtype)

    if scalar:
        draft.put_scale(f"{LAYER}.weight_scalar")
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.put_header({LAYER: header})
    if bias:
        draft.put(f"{LAYER}.bias", "F32", np.zeros(n))

    name = word or kind
    tells_rows, tells_columns = told or (bias, False)
    set_expected(draft, padded[:n, :k], kind, "block", name, is_exact=False, outlier_method="none")
    draft.expected |= {
        "format_name": name,
        "is_packable": True,
        "declared": (tells_rows, tells_columns),
        "is_padded": not (tells_rows and tells_columns),
        "block_size": block_size,
        "rows": n if tells_rows else padded_rows,
        "columns": k if tells_columns else padded_columns,
    }
    return draft


def draft_smoothed_blocks(kind: str) -> CheckpointDraft:
    """The factors tell K."""
    draft = draft_blocks(kind, marker={"format": kind}, told=(True, True))
    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, 40))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


def draft_ambiguous_blocks(kind: str, n: int = 128, k: int = 128) -> CheckpointDraft:
    """Scales of a shape that they have in tiles and in rows."""
    return draft_blocks(kind, n, k, bias=False)


def draft_lightx2v_comfy() -> CheckpointDraft:
    """int8 with the marker of fp8 files."""
    draft = draft_int8((), "tensor", name="scale_weight", label="int8")
    draft.tensors["scaled_fp8"] = "F8_E4M3", (2,), bytes(2)
    return draft


def draft_wan_int8(name: str) -> CheckpointDraft:
    """Blocks of 16 of a row, their scales by a name of their own."""
    return draft_int8((N, 4, 1), "block3d", name=name, block=(1, 16), label="int8", exact=False)


def draft_float(dtype: str, word: str) -> CheckpointDraft:
    draft = CheckpointDraft()
    real = draft.put(f"{LAYER}.weight", dtype, draft.generator.normal(size=(N, K)))
    return set_expected(draft, real, "float", "", word, is_exact=False, outlier_method="none")


DRAFTS: dict[str, Callable[[], CheckpointDraft]] = {
    # ComfyUI's own, and the shapes of one scale
    "tensor []": lambda: draft_int8((), "tensor", TENSOR),
    "tensor [1]": lambda: draft_int8((1,), "tensor", TENSOR),
    "tensor [1, 1]": lambda: draft_int8((1, 1), "tensor", TENSOR),
    "row [N, 1]": lambda: draft_int8((N, 1), "row", ROW),
    "row [N]": lambda: draft_int8((N,), "row", TENSOR),
    "row [N] of a square": lambda: draft_int8((K,), "row", TENSOR, weight=(K, K)),
    "row [N, 1] of a square": lambda: draft_int8((K, 1), "row", ROW, weight=(K, K)),
    "one row": lambda: draft_int8((1, 1), "tensor", TENSOR, weight=(1, K)),
    "one column": lambda: draft_int8((N, 1), "row", TENSOR, weight=(N, 1)),
    "row in the header": lambda: draft_int8((N, 1), "row", header=ROW),
    "axiswise": lambda: draft_int8((N,), "row", {"format": "int8_axiswise"}, label="int8_axiswise"),
    "bf16 scale with a marker": lambda: draft_int8((N, 1), "row", ROW, dtype="BF16"),
    "embedding's padding": lambda: draft_int8((N, 1), "row", ROW, padding=b"\0\0\0"),
    "doubled braces": lambda: draft_int8((N, 1), "row", '{{"format": "int8_tensorwise"}}'),
    "orig_dtype": lambda: draft_int8(
        (N, 1), "row", {"format": "int8_tensorwise", "orig_dtype": "torch.bfloat16", "per_row": True}
    ),
    # rotations
    "convrot 16": lambda: draft_convrot(16),
    "convrot 4": lambda: draft_convrot(4),
    "convrot 64": lambda: draft_convrot(64),
    "convrot 256 by default": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"format": "int8_tensorwise", "convrot": True}, weight=(N, 512)),
        make_regular(256),
        "convrot",
    ),
    "convrot 1024": lambda: draft_convrot(1024, 1024),
    "convrot 32 is Sylvester's": lambda: draft_rotated(
        draft_int8((N, 1), "row", {**ROW, "convrot": True, "convrot_groupsize": 32}),
        make_sylvester(32),
        "quarot",
    ),
    "convrot of a tensor scale": lambda: draft_rotated(
        draft_int8((), "tensor", {**TENSOR, "convrot": True, "convrot_groupsize": 16}),
        make_regular(16),
        "convrot",
    ),
    "convrot in params": lambda: draft_rotated(
        draft_int8((N, 1), "row", {**TENSOR, "params": {"convrot": True, "convrot_groupsize": 16}}),
        make_regular(16),
        "convrot",
    ),
    "convrot in the header": lambda: draft_rotated(
        draft_int8((N, 1), "row", header={**ROW, "convrot": True, "convrot_groupsize": 16}),
        make_regular(16),
        "convrot",
    ),
    "convrot lost in the header": lambda: draft_rotation_lost_in_header(
        {"format": "int8_tensorwise", "group_size": 128}
    ),
    "convrot's size lost in the header": lambda: draft_rotation_lost_in_header(
        {"format": "int8_tensorwise", "convrot": True}
    ),
    "quarot, pre-native": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 16}, label="int8"),
        make_regular(16),
        "convrot",
    ),
    "quarot of 128": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 128}, weight=(N, 128), label="int8"),
        make_sylvester(128),
        "quarot",
    ),
    "convrot, pre-native": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"convrot": True, "convrot_groupsize": 64, "per_row": True}, label="int8"),
        make_regular(64),
        "convrot",
    ),
    "quarot false": lambda: draft_int8((N, 1), "row", {"quarot": False}, label="int8"),
    "convrot false": lambda: draft_int8((N, 1), "row", {"convrot": False, "per_row": True}, label="int8"),
    "smoothed": lambda: draft_smoothed(False),
    "smoothed and rotated": lambda: draft_smoothed(True),
    # blocks
    "grid": lambda: draft_int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "group_size": 4},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid in params": lambda: draft_int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "params": {"group_size": 4}},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without its size": lambda: draft_int8(
        (3, 16), "grid", {"format": "int8_blockwise"}, block=(4, 4), label="int8_blockwise", exact=False
    ),
    "grid of one column": lambda: draft_int8(
        (3, 1),
        "grid",
        {"format": "int8_blockwise"},
        weight=(12, 4),
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without a marker": lambda: draft_int8(
        (3, 16), "grid", name="scale_weight", block=(4, 4), label="int8", exact=False
    ),
    "block3d": lambda: draft_int8(
        (N, 4, 1),
        "block3d",
        {"format": "int8_blockwise", "group_size": 16},
        block=(1, 16),
        label="int8_blockwise",
        exact=False,
    ),
    "block3d of one block": lambda: draft_int8(
        (N, 1, 1), "block3d", {"format": "int8_blockwise"}, block=(1, K), label="int8_blockwise", exact=False
    ),
    "block3d, rotated": lambda: draft_rotated(
        draft_int8(
            (N, 4, 1),
            "block3d",
            {"format": "int8_blockwise", "convrot": True, "convrot_groupsize": 64},
            block=(1, 16),
            label="int8_blockwise",
            exact=False,
        ),
        make_regular(64),
        "convrot",
    ),
    "grid, the last blocks cut off": lambda: draft_int8(
        (3, 2), "grid", weight=(300, 250), block=(128, 128), label="int8", exact=False
    ),
    "grid, the last blocks cut off, marked": lambda: draft_int8(
        (3, 13),
        "grid",
        {"format": "int8_blockwise", "group_size": 5},
        block=(5, 5),
        label="int8_blockwise",
        exact=False,
    ),
    "grid of cut blocks that other blocks would fill": lambda: draft_int8(
        (2, 2),
        "grid",
        {"format": "int8_blockwise", "group_size": 128},
        weight=(192, 192),
        block=(128, 128),
        label="int8_blockwise",
        exact=False,
    ),
    "block3d, the last block cut off": lambda: draft_int8(
        (N, 2, 1),
        "block3d",
        {"format": "int8_blockwise", "group_size": 48},
        block=(1, 48),
        label="int8_blockwise",
        exact=False,
    ),
    "group, the last one cut off": lambda: draft_int8(
        (N, 3), "group", weight=(N, 130), block=(1, 64), label="int8", exact=False
    ),
    "fp8 grid, the last blocks cut off": lambda: draft_fp8(
        (2, 7),
        "grid",
        marker={"format": "float8_e4m3fn_blockwise", "group_size": 10},
        block=(10, 10),
    ),
    "group": lambda: draft_int8((N, 8), "group", block=(1, 8), label="int8", exact=False),
    # Wan-INT8's names
    "named scale": lambda: draft_wan_int8("scale"),
    "named weight.scale": lambda: draft_wan_int8("weight.scale"),
    "named weight.weight_scale": lambda: draft_wan_int8("weight.weight_scale"),
    "named scale_weight": lambda: draft_wan_int8("scale_weight"),
    "named weight_scale_inv": lambda: draft_wan_int8("weight_scale_inv"),
    # others
    "lightx2v bf16": lambda: draft_int8((N, 1), "row", dtype="BF16", label="int8"),
    "lightx2v f16": lambda: draft_int8((N, 1), "row", dtype="F16", label="int8"),
    "lightx2v comfy mode": draft_lightx2v_comfy,
    "toolkit quarot": lambda: draft_toolkit(False),
    "toolkit quarot, one scale": lambda: draft_toolkit(False, scale=(1,)),
    "toolkit quarot in half precision": lambda: draft_toolkit(False, dtype="BF16"),
    "toolkit hadanorm": lambda: draft_toolkit(True),
    "toolkit sigma alone": lambda: draft_toolkit(True, matrix=False),
    "quip": lambda: draft_quip(8, 32),
    "quip, padded": lambda: draft_quip(12, 24),
    "quip, smoothed": lambda: draft_quip(12, 24, smooth=True),
    "older quip": lambda: draft_older_quip(False),
    "older quip, dense": lambda: draft_older_quip(True),
    "transposed": draft_transposed,
    # fp8
    "fp8": lambda: draft_fp8(
        (), "tensor", marker={"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    ),
    "fp8 in the header": lambda: draft_fp8((), "tensor", header={"format": "float8_e4m3fn"}),
    "fp8 e5m2": lambda: draft_fp8((1,), "tensor", dtype="F8_E5M2", marker={"format": "float8_e5m2"}),
    "fp8 e5m2 with the label of e4m3": lambda: draft_fp8(
        (), "tensor", dtype="F8_E5M2", marker={"format": "float8_e4m3fn"}
    ),
    "fp8 legacy": lambda: draft_fp8((), "tensor", name="scale_weight", legacy=2),
    "fp8 legacy, empty marker": lambda: draft_fp8((1,), "tensor", name="scale_weight", legacy=0),
    "fp8 row": lambda: draft_fp8((N,), "row", marker={"format": "float8_e4m3fn_rowwise"}),
    "fp8 row [N, 1]": lambda: draft_fp8((N, 1), "row"),
    "fp8 grid": lambda: draft_fp8(
        (3, 16), "grid", marker={"format": "float8_e4m3fn_blockwise", "group_size": 4}, block=(4, 4)
    ),
    "fp8 grid of transformers": lambda: draft_fp8((3, 16), "grid", name="weight_scale_inv", block=(4, 4)),
    "fp8 block3d": lambda: draft_fp8((N, 4, 1), "block3d", marker={"format": "float8_e4m3fn"}, block=(1, 16)),
    "fp8 block3d by its name": lambda: draft_fp8(
        (N, 4, 1), "block3d", marker={"format": "float8_e4m3fn_block3d"}, block=(1, 16)
    ),
    "fp8 smoothed": draft_smoothed_fp8,
    "fp8 cast": lambda: draft_fp8(None, ""),
    "fp8 cast e5m2": lambda: draft_fp8(None, "", dtype="F8_E5M2"),
    # blocks with small scales
    "nvfp4": lambda: draft_blocks("nvfp4", marker={"format": "nvfp4"}),
    "nvfp4 in the header": lambda: draft_blocks("nvfp4", header={"format": "nvfp4"}, dtype="U8"),
    "nvfp4 with its shape": lambda: draft_blocks(
        "nvfp4", marker={"format": "nvfp4", "orig_shape": [N, 40]}, bias=False, told=(True, True)
    ),
    "nvfp4 without a marker": lambda: draft_blocks("nvfp4", 16, 64, bias=False),
    ("nvfp4 of many tiles"): lambda: draft_blocks(
        "nvfp4", 272, 160, marker={"format": "nvfp4", "group_size": 16}
    ),
    "nvfp4 smoothed": lambda: draft_smoothed_blocks("nvfp4"),
    "nvfp4 by ModelOpt": lambda: draft_blocks("nvfp4", 16, 64, tiles=False, word="nvfp4_modelopt"),
    "nvfp4 by ModelOpt, wide": lambda: draft_blocks(
        "nvfp4", 130, 48, tiles=False, word="nvfp4_modelopt", rows=130, bias=False
    ),
    "mxfp8": lambda: draft_blocks(
        "mxfp8", marker={"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.bfloat16"}
    ),
    "mxfp8 in the header": lambda: draft_blocks(
        "mxfp8", header={"format": "mxfp8", "orig_shape": [N, 40]}, told=(True, True)
    ),
    "mxfp8 in e8m0": lambda: draft_blocks("mxfp8", dtype="F8_E8M0"),
    "mxfp8 with all its rows": lambda: draft_blocks("mxfp8", N, 64, marker={"format": "mxfp8"}, rows=N),
    "mxfp8 of many tiles": lambda: draft_blocks("mxfp8", 272, 320, bias=False),
    "mxfp8 smoothed": lambda: draft_smoothed_blocks("mxfp8"),
    "mxfp8 in rows": lambda: draft_blocks("mxfp8", 32, 320, tiles=False, word="mxfp8_rows"),
    "hybrid mxfp8": lambda: draft_blocks("mxfp8", marker={"format": "hybrid_mxfp8"}, scalar=True),
    # floats
    "bf16": lambda: draft_float("BF16", "bfloat16"),
    "f16": lambda: draft_float("F16", "float16"),
    "f32": lambda: draft_float("F32", "float32"),
    "f64": lambda: draft_float("F64", "float64"),
}


# -- mistakes --------------------------------------------------------------------------------------

Mistake = tuple[Callable[[], CheckpointDraft], str]  # the file, and words that its refusal must have


def draft_rowwise() -> CheckpointDraft:
    return draft_int8((N, 1), "row", ROW)


def draft_plain_float(dtype: str = "F32") -> CheckpointDraft:
    """A file with one float weight."""
    return draft_float(dtype, "")


def apply_change(draft: CheckpointDraft, change: Callable[[CheckpointDraft], object]) -> CheckpointDraft:
    change(draft)
    return draft


def drop_tensors(draft: CheckpointDraft, *suffixes: str) -> CheckpointDraft:
    for suffix in suffixes:
        del draft.tensors[f"{LAYER}.{suffix}"]
    return draft


def put_ones(draft: CheckpointDraft, key: str, *shape: int) -> CheckpointDraft:
    draft.put(key, "F32", np.ones(shape))
    return draft


def draft_with_scales(*values: float) -> CheckpointDraft:
    draft = draft_rowwise()
    draft.put(f"{LAYER}.weight_scale", "F32", np.resize(values, (N, 1)))
    return draft


def draft_with_marker(marker: object, draft: CheckpointDraft | None = None) -> CheckpointDraft:
    draft = draft or draft_rowwise()
    draft.put_marker(f"{LAYER}.comfy_quant", marker)
    return draft


def put_zeros(draft: CheckpointDraft, key: str, dtype: str, *shape: int) -> CheckpointDraft:
    """A tensor of zeros with any dtype of a byte."""
    draft.tensors[key] = dtype, shape, bytes(int(np.prod(shape)))
    return draft


def draft_with_tensor(
    suffix: str, dtype: str = "F32", draft: CheckpointDraft | None = None
) -> CheckpointDraft:
    """A file with one more tensor beside the weight."""
    draft = draft or draft_rowwise()
    draft.put(f"{LAYER}.{suffix}", dtype, np.ones(K))
    return draft


def draft_with_tensors(*suffixes: str) -> CheckpointDraft:
    """A layer of floats alone, by names that another program gives them."""
    draft = CheckpointDraft()
    for suffix in suffixes:
        draft.put(f"{LAYER}.{suffix}", "F32", np.ones((2, 2)))
    return draft


def draft_with_header(layers: object, draft: CheckpointDraft | None = None) -> CheckpointDraft:
    draft = draft or draft_rowwise()
    text = layers if isinstance(layers, str) else json.dumps({"layers": layers})
    draft.metadata["_quantization_metadata"] = text
    return draft


def draft_with_block_scale(kind: str, byte: int, tiles: bool = True) -> CheckpointDraft:
    """One scale of many is another; nvfp4 of [16, 48], mxfp8 of [32, 64]."""
    draft = draft_blocks(kind, tiles=tiles)
    dtype, shape, data = draft.tensors[f"{LAYER}.weight_scale"]
    changed = bytearray(data)
    changed[16 if tiles else 3] = byte  # that of row 1, block 0
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, shape, bytes(changed)
    return draft


def merge_layers(first: CheckpointDraft, second: CheckpointDraft) -> CheckpointDraft:
    """Both in one file: the second as blocks.1."""
    for key, tensor in second.tensors.items():
        first.tensors[key.replace("blocks.0", "blocks.1")] = tensor
    return first


def list_lost_scales() -> dict[str, Mistake]:
    """fp8 of both kinds and of all granularities, its scales gone."""
    mistakes: dict[str, Mistake] = {}
    for dtype, word, largest in (("F8_E4M3", "float8_e4m3fn", 448), ("F8_E5M2", "float8_e5m2", 57344)):
        words = (
            rf"1 fp8 weight has no scale and numbers that no plain cast has \(first: blocks.0.q.weight, "
            rf"which reaches {largest}; .*their scales were lost.*model.quant_format={word}_cast"
        )
        for granularity, shape, block in (
            ("tensor", (), (1, 1)),
            ("row", (N,), (1, 1)),
            ("grid", (3, 16), (4, 4)),
            ("block3d", (N, 4, 1), (1, 16)),
        ):
            make = partial(draft_lost_scale, shape, granularity, dtype=dtype, block=block)
            mistakes[f"scale of unmarked {dtype} lost, {granularity}"] = make, words
    return mistakes


def draft_lost_scale(
    shape: tuple[int, ...], granularity: str, *, dtype: str, block: tuple[int, int]
) -> CheckpointDraft:
    return drop_tensors(draft_fp8(shape, granularity, dtype=dtype, block=block), "weight_scale")


def make_int8run_marker(**change: object) -> dict[str, object]:
    return {
        "format": "int8run_transformed",
        "outlier": "quarot",
        "settings": {},
        "rotation": "sylvester",
        "group_size": 16,
        "centered": False,
        "factor": False,
        **change,
    }


def draft_int8run_without_group_size() -> CheckpointDraft:
    marker = make_int8run_marker()
    del marker["group_size"]
    return draft_with_marker(marker)


def draft_broken_quip() -> CheckpointDraft:
    """QuIP by Hadamard matrices of a size that has none."""
    draft = draft_quip(8, 32)
    draft.put_int8(f"{LAYER}.weight", 12, 32)
    draft.put_scale(f"{LAYER}.weight_scale", 12, 1)
    draft.put(f"{LAYER}.hadamard_size_out", "I32", 12)
    draft.put(f"{LAYER}.sign_row", "F32", np.ones(12))
    return draft


GROUP = {"format": "int8_tensorwise", "convrot": True}
MISTAKES: dict[str, Mistake] = {
    # scales
    "no scale": (
        lambda: drop_tensors(draft_rowwise(), "weight_scale"),
        r"blocks.0.q is INT8 and has no weight_scale, so its numbers mean nothing",
    ),
    "scale alone": (
        lambda: drop_tensors(draft_rowwise(), "weight"),
        r"blocks.0.q.weight_scale belongs to no weight, blocks.0.q.weight is missing",
    ),
    "marker alone": (
        lambda: drop_tensors(draft_rowwise(), "weight", "weight_scale"),
        r"blocks.0.q.comfy_quant belongs to no weight",
    ),
    "scale of a legacy name alone": (
        lambda: drop_tensors(draft_fp8((), "tensor", name="scale_weight", legacy=2), "weight"),
        "scale_.* belongs to no weight",
    ),
    "one scale too few": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", N - 1, 1)),
        (
            r"weight_scale has the shape \[11, 1\], which does not "
            r"fit a weight \[12, 64\]; scales are one number, \[N\]"
        ),
    ),
    "a scale for each column": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", K)),
        r"has the shape \[64\], which does not fit a weight \[12, 64\]",
    ),
    "a scale for each number": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", N, K)),
        r"has the shape \[12, 64\], which does not fit a weight",
    ),
    "blocks that do not divide": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", N, 7)),
        r"has the shape \[12, 7\], which does not fit a weight",
    ),
    "blocks that are not square": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", 3, 8)),
        r"has the shape \[3, 8\], which does not fit a weight",
    ),
    "3-D blocks that do not divide": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", N, 5, 1)),
        r"has the shape \[12, 5, 1\], which does not fit",
    ),
    "3-D blocks of two": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", N, 4, 2)),
        r"has the shape \[12, 4, 2\], which does not fit",
    ),
    "blocks of two possible sizes": (
        lambda: draft_int8((2, 2), "grid", weight=(192, 192), block=(96, 96)),
        r"has the shape \[2, 2\], which does not fit a weight .* with blocks of one known size",
    ),
    "transposed and square": (
        lambda: apply_change(
            draft_int8((K, 1), "row", weight=(K, K)), lambda d: d.put_scale(f"{LAYER}.weight_scale", 1, K)
        ),
        r"has the shape \[1, 64\], and blocks.0.q.weight is square: it may belong to the rows of a weight",
    ),
    "transposed and square, marked": (
        lambda: apply_change(
            draft_int8((K, 1), "row", ROW, weight=(K, K)),
            lambda d: d.put_scale(f"{LAYER}.weight_scale", 1, K),
        ),
        r"blocks.0.q.weight is square: it may belong to the rows",
    ),
    "transposed and marked": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", 1, K)),
        r"is ComfyUI's, whose weights are \[out, in\], and blocks.0.q.weight_scale has the shape \[1, 64\]",
    ),
    "transposed fp8": (
        lambda: apply_change(draft_fp8((), "tensor"), lambda d: d.put_scale(f"{LAYER}.weight_scale", 1, K)),
        r"has the shape \[1, 64\], which does not fit a weight \[12, 64\]",
    ),
    "no scales at all": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.weight_scale", 0)),
        r"has the shape \[0\], which does not fit a weight",
    ),
    "fp8 scale": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight_scale", "F8_E4M3", N, 1),
        r"weight_scale is F8_E4M3, and blocks.0.q.weight is I8; its scales are F32",
    ),
    "whole scales": (
        lambda: apply_change(
            draft_rowwise(), lambda d: d.put(f"{LAYER}.weight_scale", "I32", np.ones((N, 1)))
        ),
        "weight_scale is I32, and",
    ),
    "a scale of zero": (
        lambda: draft_with_scales(1, 0, 1),
        "4 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a negative scale": (
        lambda: draft_with_scales(1, -1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a scale that is nan": (
        lambda: draft_with_scales(float("nan"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "an infinite scale": (
        lambda: draft_with_scales(float("inf"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "two scales": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.scale_weight", N, 1)),
        "has two scales, blocks.0.q.weight_scale and blocks.0.q.scale_weight",
    ),
    "a scale for a float": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put_scale(f"{LAYER}.weight_scale", 1)),
        "weight is F32 and has blocks.0.q.weight_scale, which is not 1; it is unclear whether",
    ),
    "an infinite scale for a float": (
        lambda: apply_change(
            draft_plain_float(), lambda d: d.put(f"{LAYER}.weight_scale", "F32", float("inf"))
        ),
        "1 of 1 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "fp8 scales lost": (
        lambda: put_zeros(draft_fp8(None, ""), "scaled_fp8", "F8_E4M3", 2),
        r"scaled_fp8 says that fp8 weights have scales, and none has one \(blocks.0.q\)",
    ),
    "row scales of fp8 lost": (
        lambda: draft_fp8(None, "", marker={"format": "float8_e4m3fn_rowwise"}),
        (
            "names the format 'float8_e4m3fn_rowwise', and blocks.0.q has no weight_scale, "
            "without which its numbers mean nothing; the file is incomplete, download it again"
        ),
    ),
    "scale of marked fp8 lost": (
        lambda: drop_tensors(draft_fp8((), "tensor", marker={"format": "float8_e4m3fn"}), "weight_scale"),
        "names the format 'float8_e4m3fn', and blocks.0.q has no weight_scale",
    ),
    "scale of marked fp8 lost, small numbers": (
        lambda: draft_fp8(None, "", marker={"format": "float8_e4m3fn"}),
        "names the format 'float8_e4m3fn', and blocks.0.q has no weight_scale",
    ),
    "scale of marked e5m2 lost": (
        lambda: draft_fp8(None, "", dtype="F8_E5M2", header={"format": "float8_e5m2"}),
        "names the format 'float8_e5m2', and blocks.0.q has no weight_scale",
    ),
    **list_lost_scales(),
    "scales of fp8 lost, 1 in their place": (
        lambda: put_ones(draft_fp8((N,), "row"), f"{LAYER}.weight_scale", N),
        "1 fp8 weight has a scale of 1 and numbers that no plain cast has",
    ),
    "scales of mxfp8 lost": (
        lambda: drop_tensors(draft_blocks("mxfp8", N, 64), "weight_scale"),
        "1 fp8 weight has no scale and numbers that no plain cast has",
    ),
    "block scales of fp8 lost": (
        lambda: draft_fp8(None, "", header={"format": "float8_e4m3fn_block3d"}),
        "names the format 'float8_e4m3fn_block3d', and blocks.0.q has no weight_scale",
    ),
    # weights
    "int8 of 3 dimensions": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", 2, N, K),
        r"weight is I8 \[2, 12, 64\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 vector": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", N),
        r"weight is I8 \[12\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 of no rows": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", 0, K),
        (r"weight is I8 " r"\[0, 64\]"),
    ),
    "int8 that is no weight": (
        lambda: put_zeros(draft_plain_float(), "table", "I8", 3, 4),
        "table is I8 and not the weight of a layer",
    ),
    "whole weight": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put(f"{LAYER}.weight", "I64", np.ones((2, 2)))),
        "blocks.0.q.weight is I64; int8run reads weights of F64, F32",
    ),
    "fp8 of AMD": (
        lambda: put_zeros(draft_plain_float(), f"{LAYER}.weight", "F8_E4M3FNUZ", 2, 2),
        "blocks.0.q.weight is F8_E4M3FNUZ; int8run reads weights",
    ),
    # markers
    "marker of floats": (
        lambda: draft_with_tensor("comfy_quant"),
        r"comfy_quant is F32 \[64\]; a marker is a short row of bytes, U8",
    ),
    "marker of two axes": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.comfy_quant", "U8", 2, 8),
        r"comfy_quant is U8 \[2, 8\]; a marker is",
    ),
    "long marker": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.comfy_quant", "U8", 70000),
        r"comfy_quant is U8 \[70000\]; a marker is a short row",
    ),
    "empty marker": (
        lambda: draft_with_marker(""),
        r"the marker blocks.0.q.comfy_quant is not JSON \(.*\): b''",
    ),
    "no json": (
        lambda: draft_with_marker("{format"),
        r"the marker blocks.0.q.comfy_quant is not JSON \(.*\): b'\{format'",
    ),
    "a list": (lambda: draft_with_marker([1]), r"the marker blocks.0.q.comfy_quant is not a JSON object"),
    "a deep list": (lambda: draft_with_marker("[" * 60000), r"the marker blocks.0.q.comfy_quant is nested"),
    "says nothing": (
        lambda: draft_with_marker({}),
        (r"the marker blocks.0.q.comfy_quant " r"names no format: \{\}"),
    ),
    "format of no one": (
        lambda: draft_with_marker({"format": "int9"}),
        r"names the format 'int9'; int8run reads int8_tensorwise, int8_axiswise",
    ),
    "format that is no text": (lambda: draft_with_marker({"format": 8}), r"has an invalid format: "),
    "flag that is no flag": (
        lambda: draft_with_marker({**TENSOR, "convrot": "yes"}),
        (r"has an invalid " r"convrot: "),
    ),
    "per_row that is no flag": (
        lambda: draft_with_marker({**TENSOR, "per_row": 1}),
        (r"has an invalid " r"per_row: "),
    ),
    "block that is no number": (
        lambda: draft_with_marker({**TENSOR, "group_size": "128"}),
        r"has an invalid group_size: ",
    ),
    "block of nothing": (
        lambda: draft_with_marker({**TENSOR, "group_size": 0}),
        (r"has an invalid " r"group_size: "),
    ),
    "fp8 label on int8": (
        lambda: draft_with_marker({"format": "float8_e4m3fn"}),
        (
            r"names the format 'float8_e4m3fn', and blocks.0.q.weight "
            r"is I8 with a scale in F32; they contradict each other"
        ),
    ),
    "int8 label on fp8": (
        lambda: draft_with_marker(TENSOR, draft_fp8((), "tensor")),
        (
            r"names the format 'int8_tensorwise', and blocks.0.q.weight "
            r"is F8_E4M3 with a scale in F32; they contradict"
        ),
    ),
    "no format on fp8": (
        lambda: draft_with_marker({"convrot": False}, draft_fp8((), "tensor")),
        r"names the format ''; int8run reads",
    ),
    "label on a float": (
        lambda: draft_with_marker(TENSOR, draft_plain_float()),
        r"blocks.0.q.weight is F32 and has blocks.0.q.comfy_quant, which such a weight cannot have",
    ),
    "label on a float in the header": (
        lambda: draft_with_header({LAYER: TENSOR}, draft_plain_float()),
        r"is F32 and has an entry in the header \(int8_tensorwise\)",
    ),
    "experts": (
        lambda: draft_with_marker({**TENSOR, "num_experts": 8}),
        "describes a bank of experts; int8run reads layers with a matrix each",
    ),
    "block against the shape": (
        lambda: draft_with_marker(
            {"format": "int8_blockwise", "group_size": 8}, draft_int8((3, 16), "grid", block=(4, 4))
        ),
        r"names blocks of 8, and blocks.0.q.weight_scale \[3, 16\] has blocks of 4; they contradict",
    ),
    "one marker missing": (
        lambda: merge_layers(draft_rowwise(), draft_int8((N, 1), "row")),
        "blocks.1.q has no comfy_quant marker and other INT8 layers have one",
    ),
    # rotations
    "group that does not divide": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 256}),
        "blocks.0.q is rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group by default that does not divide": (
        lambda: draft_with_marker(GROUP),
        "rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group of 48": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 48}),
        "names groups of 48; rotated are groups of a power of 2 from 2 to 4096",
    ),
    "group of 1": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 1}),
        ("names groups of 1; rotated"),
    ),
    "group of 8192": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 8192}),
        ("names groups of 8192; rotated"),
    ),
    "group of text": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": "16"}),
        ("names groups of '16'; rotated"),
    ),
    "group of true": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": True}),
        ("names groups of True; rotated"),
    ),
    "two groups": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 16, "quarot_groupsize": 64}),
        "names two sizes of rotated groups, 16 and 64",
    ),
    "fp8 rotated": (
        lambda: draft_with_marker({"format": "float8_e4m3fn", "convrot": True}, draft_fp8((), "tensor")),
        "says that an fp8 weight is rotated",
    ),
    # the header
    "header of no json": (lambda: draft_with_header("{"), "_quantization_metadata in its header is not JSON"),
    "header of a list": (
        lambda: draft_with_header("[]"),
        ("_quantization_metadata in its header is not a JSON object"),
    ),
    "header of lists": (
        lambda: draft_with_header([LAYER]),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header of texts": (
        lambda: draft_with_header({LAYER: "int8"}),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header for another file": (
        lambda: draft_with_header({"blocks.9.q": ROW}),
        "describes blocks.9.q, which the file does not have; it was written for another file",
    ),
    "header without the prefix": (
        lambda: draft_with_header({LAYER: ROW}, draft_rowwise().add_prefix("model.diffusion_model.")),
        (
            "describes blocks.0.q, which the file does not have; the file has "
            "model.diffusion_model.blocks.0.q.weight, so the prefix was lost"
        ),
    ),
    "header against the marker": (
        lambda: draft_with_header({LAYER: {**ROW, "convrot": False}}, draft_convrot(16)),
        "has convrot=False, the layer's marker True; they contradict each other",
    ),
    "header's group against the marker's": (
        lambda: draft_with_header({LAYER: {**GROUP, "convrot_groupsize": 64}}, draft_convrot(16)),
        "has convrot_groupsize=64, the layer's marker 16; they contradict",
    ),
    "header against our marker": (
        lambda: draft_with_header({LAYER: ROW}, draft_with_marker(make_int8run_marker())),
        "says 'int8_tensorwise', the layer's marker 'int8run_transformed'; they contradict",
    ),
    # our own format
    "ours without settings": (
        lambda: draft_with_marker(make_int8run_marker(settings=None)),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting of text": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": "x"})),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting that is true": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": True})),
        "lacks what such a marker holds",
    ),
    "ours with a setting that is infinite": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": float("inf")})),
        "lacks what such a marker holds",
    ),
    "ours without a method": (
        lambda: draft_with_marker(make_int8run_marker(outlier=None)),
        ("lacks what such a marker holds"),
    ),
    "ours with a random rotation": (
        lambda: draft_with_marker(make_int8run_marker(rotation="random")),
        ("lacks what such a marker holds"),
    ),
    "ours with half a rotation": (
        draft_int8run_without_group_size,
        "lacks what such a marker holds",
    ),
    ("ours with a factor that is no flag"): (
        lambda: draft_with_marker(make_int8run_marker(factor=1)),
        "lacks what such a marker holds",
    ),
    "ours with a size of none": (
        lambda: draft_with_marker(make_int8run_marker(group_size=None)),
        "has an invalid group_size|names groups of None",
    ),
    "ours regular of 32": (
        lambda: draft_with_marker(make_int8run_marker(rotation="regular", group_size=32)),
        "names groups of 32; a regular matrix needs a power of 4",
    ),
    "ours, its factor lost": (
        lambda: draft_with_marker(make_int8run_marker(factor=True)),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, a factor too many": (
        lambda: draft_with_tensor("pre_quant_scale", draft=draft_with_marker(make_int8run_marker())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, with a sigma": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_with_marker(make_int8run_marker())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    # factors
    "factor of another width": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(N))),
        r"pre_quant_scale has the shape \[12\], its weight needs \[64\]",
    ),
    "factor of zero": (
        lambda: apply_change(
            draft_rowwise(), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.zeros(K))
        ),
        "64 of 64 numbers of blocks.0.q.pre_quant_scale are not finite and above 0",
    ),
    "factor of whole numbers": (
        lambda: draft_with_tensor("pre_quant_scale", "I32"),
        "pre_quant_scale is I32; allowed are F32",
    ),
    "factor of another width of fp8": (
        lambda: apply_change(
            draft_fp8((), "tensor"), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(N))
        ),
        r"pre_quant_scale has the shape \[12\]",
    ),
    "factor for a float": (
        lambda: draft_with_tensor("pre_quant_scale", draft=draft_plain_float()),
        "is F32 and has blocks.0.q.pre_quant_scale, which such a weight cannot have",
    ),
    "factor alone": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put("norm.pre_quant_scale", "F32", 1)),
        "norm.pre_quant_scale belongs to no weight",
    ),
    # INT8-Toolkit
    "matrix of another kind": (
        lambda: apply_change(
            draft_toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.eye(128))
        ),
        r"quarot_hadamard F32 \[128, 128\] is not a Hadamard matrix",
    ),
    "matrix that is none": (
        lambda: apply_change(
            draft_toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.ones(128))
        ),
        r"quarot_hadamard F32 \[128\] is not a Hadamard matrix",
    ),
    "matrix of 48": (
        lambda: apply_change(
            draft_toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.ones((48, 48)))
        ),
        r"\[48, 48\] is not a Hadamard matrix",
    ),
    "matrix and convrot": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 64}, draft_toolkit(False)),
        "rotated by its marker and by the INT8-Toolkit's tensors; they contradict",
    ),
    "matrix and a factor": (
        lambda: apply_change(
            draft_toolkit(False), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(256))
        ),
        "rotated by its marker and by the INT8-Toolkit's",
    ),
    "sigma of another width": (
        lambda: apply_change(
            draft_toolkit(True), lambda d: d.put(f"{LAYER}.hadanorm_sigma", "F32", np.ones(4))
        ),
        r"hadanorm_sigma has the shape \[4\], its weight needs \[256\]",
    ),
    "sigma of zero": (
        lambda: apply_change(
            draft_toolkit(True), lambda d: d.put(f"{LAYER}.hadanorm_sigma", "F32", np.zeros(256))
        ),
        "256 of 256 numbers of blocks.0.q.hadanorm_sigma",
    ),
    "sigma for fp8": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.hadanorm_sigma, which such a weight cannot have",
    ),
    # QuIP
    "quip without signs": (
        lambda: drop_tensors(draft_quip(8, 32), "sign_col"),
        "is transformed by QuIP and sign_col is missing; its weight cannot be restored",
    ),
    "quip without its flag": (
        lambda: drop_tensors(draft_quip(8, 32), "hadamard_quip"),
        "is transformed by QuIP and hadamard_quip is missing",
    ),
    "quip of both kinds": (
        lambda: draft_with_tensor("quip_s_v", draft=draft_with_tensor("quip_s_u", draft=draft_quip(8, 32))),
        "is transformed by QuIP and it has hadamard_quip and quip_s_u",
    ),
    "older quip without v": (
        lambda: drop_tensors(draft_older_quip(False), "quip_s_v"),
        "is transformed by QuIP and quip_s_v is missing",
    ),
    "older quip of another size": (
        lambda: apply_change(
            draft_older_quip(False), lambda d: d.put(f"{LAYER}.quip_s_u", "F32", np.ones(5))
        ),
        r"quip_s_u is F32 \[5\]; its weight \[12, 64\] needs F32 \[12\]",
    ),
    "older quip that is nan": (
        lambda: apply_change(
            draft_older_quip(False), lambda d: d.put(f"{LAYER}.quip_s_u", "F32", np.full(N, np.nan))
        ),
        "quip_s_u has numbers that are not finite",
    ),
    "signs that are none": (
        lambda: apply_change(draft_quip(8, 32), lambda d: d.put(f"{LAYER}.sign_row", "F32", np.full(8, 2.0))),
        "sign_row has numbers that are neither 1 nor -1",
    ),
    "quip of another size": (
        lambda: apply_change(draft_quip(8, 32), lambda d: d.put(f"{LAYER}.hadamard_size_in", "I32", 64)),
        r"hadamard_size_in says 64, and blocks.0.q.weight has \[8, 32\]",
    ),
    "quip that is not padded": (
        draft_broken_quip,
        r"hadamard_size_out says 12, and blocks.0.q.weight has \[12, 32\]; both are one power of 2",
    ),
    "quip of no size": (
        lambda: apply_change(draft_quip(8, 32), lambda d: d.put(f"{LAYER}.hadamard_size_in", "I32", [])),
        r"hadamard_size_in says None, and",
    ),
    "quip and convrot": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 16}, draft_quip(8, 32)),
        "is transformed by QuIP and is rotated, scaled or stored transposed too",
    ),
    "quip's smooth factors of zero": (
        lambda: apply_change(
            draft_quip(12, 24, True), lambda d: d.put(f"{LAYER}.smooth_factors", "F32", np.zeros(24))
        ),
        "24 of 24 numbers of blocks.0.q.smooth_factors",
    ),
    # mxfp8 and nvfp4
    "nvfp4's scale for int8": (
        lambda: draft_with_tensor("weight_scale_2"),
        "is I8 and has blocks.0.q.weight_scale_2, which such a weight cannot have",
    ),
    "hybrid mxfp8's scale for fp8": (
        lambda: draft_with_tensor("weight_scalar", draft=draft_fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.weight_scalar, which such a weight cannot have",
    ),
    "nvfp4's label on int8": (
        lambda: draft_with_marker({"format": "nvfp4"}),
        "names the format 'nvfp4', and blocks.0.q.weight is I8 with a scale in F32; they contradict",
    ),
    "mxfp8's label on fp8": (
        lambda: draft_with_marker({"format": "mxfp8"}, draft_fp8((), "tensor")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with a scale in F32; they contradict",
    ),
    "mxfp8's label on a cast": (
        lambda: draft_with_marker({"format": "mxfp8"}, draft_fp8(None, "")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with no scale; they contradict",
    ),
    "fp8's label on mxfp8": (
        lambda: draft_with_marker({"format": "float8_e4m3fn"}, draft_blocks("mxfp8")),
        (
            "names the format 'float8_e4m3fn', and blocks.0.q.weight "
            "is F8_E4M3 with a scale in U8; they contradict"
        ),
    ),
    "pre-native label on nvfp4": (
        lambda: draft_with_marker({"convrot": False}, draft_blocks("nvfp4")),
        "names the format ''; int8run reads",
    ),
    "nvfp4 rotated": (
        lambda: draft_with_marker({"format": "nvfp4", "convrot": True}, draft_blocks("nvfp4")),
        "says that a weight in nvfp4 is rotated",
    ),
    "nvfp4 of other blocks": (
        lambda: draft_with_marker({"format": "nvfp4", "group_size": 32}, draft_blocks("nvfp4")),
        "names blocks of 32; nvfp4 has blocks of 16",
    ),
    "mxfp8 of other blocks": (
        lambda: draft_with_marker({"format": "mxfp8", "group_size": 16}, draft_blocks("mxfp8")),
        "names blocks of 16; mxfp8 has blocks of 32",
    ),
    "mxfp8 of experts": (
        lambda: draft_with_marker({"format": "mxfp8", "num_experts": 8}, draft_blocks("mxfp8")),
        "describes a bank of experts",
    ),
    "nvfp4 without scales": (
        lambda: drop_tensors(draft_blocks("nvfp4"), "weight_scale"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale; int8run reads such weights of nvfp4",
    ),
    "nvfp4 without its second scale": (
        lambda: drop_tensors(draft_blocks("nvfp4"), "weight_scale_2"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale_2; int8run reads such weights of nvfp4",
    ),
    "nvfp4 with two second scales": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put_scale(f"{LAYER}.weight_scale_2", 2)),
        r"weight_scale_2 has the shape \[2\]; it is one number for the whole weight",
    ),
    "nvfp4 with a second scale of zero": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put(f"{LAYER}.weight_scale_2", "F32", 0)),
        "1 of 1 numbers of blocks.0.q.weight_scale_2 are not finite and above 0",
    ),
    "nvfp4 with a whole second scale": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put(f"{LAYER}.weight_scale_2", "I32", 1)),
        "weight_scale_2 is I32; allowed are F32",
    ),
    "nvfp4 with float scales": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put_scale(f"{LAYER}.weight_scale", 128, 4)),
        "weight_scale is F32; the scales of nvfp4 are F8_E4M3 or U8",
    ),
    "nvfp4 of 3 dimensions": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 2, 8, 24),
        r"weight is U8 \[2, 8, 24\]; weights in nvfp4 are U8 \[N, K / 2\], K a multiple of 16",
    ),
    "nvfp4 of no rows": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 0, 24),
        r"weight is U8 \[0, 24\]; weights in nvfp4",
    ),
    "nvfp4 of half a block": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 16, 20),
        r"weight is U8 \[16, 20\]; weights in nvfp4",
    ),
    "mxfp8 of half a block": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight", "F8_E4M3", 32, 48),
        r"weight is F8_E4M3 \[32, 48\]; weights in mxfp8 are F8_E4M3 \[N, K\], K a multiple of 32",
    ),
    "mxfp8 of e5m2": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight", "F8_E5M2", 32, 64),
        r"weight is F8_E5M2 \[32, 64\]; weights in mxfp8",
    ),
    "nvfp4's scales of another shape": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight_scale", "F8_E4M3", 128, 8),
        (
            r"weight_scale has the shape \[128, 8\]; of blocks.0.q.weight "
            r"\[16, 24\] in nvfp4 it is \[128, 4\] in tiles, \[16, 3\] in rows"
        ),
    ),
    "mxfp8's scales of another shape": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight_scale", "U8", 64, 2),
        (
            r"weight_scale has the shape \[64, 2\]; of blocks.0.q.weight "
            r"\[32, 64\] in mxfp8 it is \[128, 4\] in tiles, \[32, 2\] in rows"
        ),
    ),
    "ComfyUI's label on scales in rows": (
        lambda: draft_with_marker({"format": "nvfp4"}, draft_blocks("nvfp4", 16, 64, tiles=False)),
        (
            "says 'nvfp4', whose scales lie in tiles, and blocks.0.q.weight_scale "
            "has the shape of scales in rows; they contradict"
        ),
    ),
    "tiles beside rows": (
        lambda: merge_layers(draft_blocks("mxfp8"), draft_blocks("mxfp8", 32, 64, tiles=False)),
        (
            "the scales of blocks.0.q lie in tiles as ComfyUI has them, "
            "those of blocks.1.q in rows as ModelOpt has them; a file has one"
        ),
    ),
    "nvfp4 of nobody": (
        lambda: draft_ambiguous_blocks("nvfp4"),
        (
            "1 weight is nvfp4 .first: blocks.0.q. by ComfyUI or by ModelOpt, "
            "and neither shapes nor markers show which; set model.quant_format=nvfp4 or "
            "model.quant_format=nvfp4_modelopt, for a text encoder clip=nvfp4 or clip=nvfp4_modelopt "
            ".quant_format in a program."
        ),
    ),
    "mxfp8 of nobody": (lambda: draft_ambiguous_blocks("mxfp8"), "clip=mxfp8 or clip=mxfp8_rows"),
    "mxfp8 of nobody beside nvfp4": (
        lambda: merge_layers(draft_blocks("nvfp4"), draft_ambiguous_blocks("mxfp8")),
        "1 weight is mxfp8 .first: blocks.1.q. by",
    ),
    "nvfp4's scale is nan": (
        lambda: draft_with_block_scale("nvfp4", 0x7F),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "nvfp4's scale is negative": (
        lambda: draft_with_block_scale("nvfp4", 0x81),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or neg",
    ),
    "ModelOpt's scale is negative": (
        lambda: draft_with_block_scale("nvfp4", 0xB8, False),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN",
    ),
    "mxfp8's scale is nan": (
        lambda: draft_with_block_scale("mxfp8", 0xFF),
        "1 of 64 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "shape that is none": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": "12x40"}, draft_blocks("mxfp8")),
        r"names the shape 12x40, and blocks.0.q.weight has \[32, 64\], which is not padded from it",
    ),
    "shape of one number": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12]}, draft_blocks("mxfp8")),
        r"names the shape \[12\], and",
    ),
    "shape of fractions": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12.0, 40]}, draft_blocks("mxfp8")),
        r"names the shape \[12.0, 40\], and",
    ),
    "shape of another weight": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12, 65]}, draft_blocks("mxfp8")),
        r"names the shape \[12, 65\], and",
    ),
    "shape without end": (
        lambda: draft_with_marker({"format": "nvfp4", "orig_shape": [10**400, 40]}, draft_blocks("nvfp4")),
        r"names the shape \[1000",
    ),
    "shape of nothing": (
        lambda: draft_with_marker({"format": "nvfp4", "orig_shape": [0, 40]}, draft_blocks("nvfp4")),
        r"names the shape \[0, 40\], and",
    ),
    "bias of another weight": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put(f"{LAYER}.bias", "F32", np.ones(17))),
        (
            r"blocks.0.q.bias has the shape \[17\], and blocks.0.q.weight "
            r"has \[16, 48\], which is not padded from it"
        ),
    ),
    "bias of two dimensions": (
        lambda: apply_change(
            draft_blocks("nvfp4"), lambda d: d.put(f"{LAYER}.bias", "F32", np.ones((12, 1)))
        ),
        r"blocks.0.q.bias has the shape \[12, 1\], and",
    ),
    "factor of another width of nvfp4": (
        lambda: apply_change(
            draft_blocks("nvfp4"), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(30))
        ),
        (
            r"blocks.0.q.pre_quant_scale has the shape \[30\], and "
            r"blocks.0.q.weight has \[16, 48\], which is not padded from it"
        ),
    ),
    "factor of another width than said": (
        lambda: draft_with_tensor(
            "pre_quant_scale",
            draft=draft_with_marker({"format": "mxfp8", "orig_shape": [12, 40]}, draft_blocks("mxfp8")),
        ),
        r"pre_quant_scale has the shape \[64\], its weight needs \[40\]",
    ),
    "sigma for nvfp4": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_blocks("nvfp4")),
        "is U8 and has blocks.0.q.hadanorm_sigma, which such a",
    ),
    # formats of others
    "bitsandbytes": (
        lambda: draft_with_tensor("SCB"),
        (
            "is a bitsandbytes file .it has blocks.0.q.SCB., which diffusers "
            "with bitsandbytes can read and int8run cannot; take the float"
        ),
    ),
    "bitsandbytes 4 bits": (lambda: draft_with_tensor("weight.absmax"), "is a bitsandbytes file"),
    "SDNQ": (lambda: draft_with_tensor("svd_up"), "is a SDNQ file .*, which diffusers with sdnq can read"),
    "compressed-tensors": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put("q.weight_packed", "I32", np.ones((2, 2)))),
        "is a compressed-tensors file",
    ),
    ("compressed-tensors, asymmetric"): (
        lambda: draft_with_tensor("weight_zero_point"),
        "is a compressed-tensors file",
    ),
    "nunchaku": (
        lambda: put_zeros(draft_plain_float(), "q.qweight", "I8", 2, 2),
        ("is a nunchaku file .it has q.qweight."),
    ),
    "nunchaku's header": (
        lambda: apply_change(
            draft_plain_float(), lambda d: d.metadata.update(quantization_config=('{"method": "svdquant"}'))
        ),
        "is a nunchaku file .the header of",
    ),
    "torchao": (
        lambda: apply_change(
            put_zeros(draft_plain_float(), "q._weight_qdata", "I8", 2, 2),
            lambda d: d.metadata.update(tensor_names="[]"),
        ),
        "is a torchao file",
    ),
    "torchao's header": (
        lambda: apply_change(
            put_zeros(draft_plain_float(), "q._weight_qdata_", "I8", 2, 2),
            lambda d: d.metadata.update(tensor_names="[]"),
        ),
        "is a torchao file .the header of",
    ),
    "modelopt's quantizers": (
        lambda: draft_with_tensor("weight_quantizer._scale"),
        "is a modelopt file .*, which diffusers with nvidia-modelopt",
    ),
    # optimum-quanto's QBytesTensor, and its scales of activations
    "quanto": (
        lambda: draft_with_tensors("weight._data", "weight._scale", "input_scale", "output_scale"),
        "is a quanto file .it has blocks.0.q.weight._data., which diffusers with optimum-quanto can read",
    ),
    "quanto, scale first": (
        lambda: draft_with_tensors("weight._scale", "weight._data"),
        "is a quanto file .it has blocks.0.q.weight._scale.",
    ),
    "gptq": (
        lambda: draft_with_tensors("qweight", "qzeros", "scales", "g_idx"),
        "is a GPTQ file .it has blocks.0.q.qweight., which transformers with GPTQModel",
    ),
    "lightx2v nvfp4": (lambda: draft_with_tensor("weight_global_scale"), "is a lightx2v nvfp4 file"),
    "w4a4": (lambda: draft_with_marker({"format": "convrot_w4a4"}), "is a convrot_w4a4 file"),
    "w4a8": (lambda: draft_with_tensor("weight_s_rel"), "is a asym_w4a8_int8 file"),
    "awq": (lambda: draft_with_tensor("weight_zeros"), "is a awq_w4a16 file"),
    "svdquant": (lambda: draft_with_tensor("proj_down"), "is a svdquant_w4a4 file"),
}
