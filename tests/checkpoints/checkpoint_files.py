"""Small checkpoints of every kind that is read, written byte for byte by the formats' published formulas.

Nothing of int8run is used here. Codes and scales are random, so that nothing is rounded; the real weight is computed in float64.
`MISTAKES` are files with one thing wrong, each with the words that the refusal must contain.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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


# -- numbers ------------------------------------------------------------------------------------------------------------


def fp8_value(byte: int, exponent_bits: int) -> float:
    """The number of a byte: sign, exponent, mantissa; e4m3fn has no infinity."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte & 127) >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def fp8_values(codes: NDArray[Any], exponent_bits: int) -> Array:
    return np.array([fp8_value(byte, exponent_bits) for byte in range(256)])[codes]


FP8 = {"F8_E4M3": 4, "F8_E5M2": 5}
LAST_FINITE = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}


def sylvester(size: int) -> Array:
    """The sign of an entry is that of the number of bits that its row and column share."""
    i, j = np.indices((size, size))
    shared = sum((i & j) >> bit & 1 for bit in range(size.bit_length()))
    return (-1.0) ** shared / size**0.5


def regular(size: int) -> Array:
    """A digit of the row and one of the column, base 4, give a minus where they add to 3."""
    i, j = np.indices((size, size))
    minus = sum(
        (i >> 2 * place & 3) + (j >> 2 * place & 3) == 3 for place in range((size.bit_length() - 1) // 2)
    )
    return (-1.0) ** minus / size**0.5


def unrotated(weight: Array, matrix: Array) -> Array:
    """Each group of columns times the matrix."""
    size = len(matrix)
    return np.concatenate(
        [weight[:, at : at + size] @ matrix for at in range(0, weight.shape[1], size)], axis=1
    )


def blocked(scale: Array, height: int, width: int) -> Array:
    """The scale of each number where blocks share one."""
    return np.kron(scale, np.ones((height, width)))


# -- files --------------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
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
    chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

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

    def text(self, key: str, content: object, padding: bytes = b"") -> None:
        """Add a marker."""
        data = (content if isinstance(content, str) else json.dumps(content)).encode() + padding
        self.tensors[key] = "U8", (len(data),), data

    def codes(self, key: str, *shape: int) -> Array:
        """Add int8 codes, all of -128..127."""
        codes = self.chance.integers(-128, 128, shape)
        codes.flat[0] = -128
        return self.put(key, "I8", codes)

    def fp8(self, key: str, dtype: str, *shape: int) -> Array:
        """Add finite fp8 numbers."""
        codes = (
            self.chance.integers(0, LAST_FINITE[dtype] + 1, shape) | self.chance.integers(0, 2, shape) << 7
        )
        self.tensors[key] = dtype, tuple(shape), codes.astype("u1").tobytes()
        return fp8_values(codes, FP8[dtype])

    def scale(self, key: str, *shape: int, dtype: str = "F32") -> Array:
        """Add scales."""
        return self.put(key, dtype, self.chance.uniform(0.001, 0.02, shape))

    def header(self, layers: dict[str, object]) -> None:
        """Describe layers in the header."""
        self.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})

    def prefixed(self, prefix: str) -> "Draft":
        """The same tensors with something before their names."""
        tensors = {prefix + key: value for key, value in self.tensors.items()}
        return Draft(
            tensors,
            self.metadata,
            {prefix + name: weight for name, weight in self.real.items()},
            self.expected,
        )

    def write(self, path: Path) -> Path:
        """Write the file."""
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for key, (dtype, shape, data) in self.tensors.items():
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header).encode()
        path.write_bytes(
            len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in self.tensors.values())
        )
        return path


# -- kinds --------------------------------------------------------------------------------------------------------------

N, K = 12, 64
TENSOR, ROW = {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "per_row": True}


def expect(draft: Draft, real: Array, kind: str, granularity: str, label: str, **others: object) -> Draft:
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


def int8(
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
) -> Draft:
    """Codes, scales of a shape and perhaps a marker or an entry in the header; not rotated."""
    draft = Draft()
    q = draft.codes(f"{LAYER}.weight", *weight)
    s = draft.scale(f"{LAYER}.{name}", *shape, dtype=dtype)
    if marker is not None:
        draft.text(f"{LAYER}.comfy_quant", marker, padding)
    if header is not None:
        draft.header({LAYER: header})
    draft.put(f"{LAYER}.bias", "BF16", draft.chance.normal(size=weight[0]))
    spread = {"tensor": lambda: s.reshape(1, 1), "row": lambda: s.reshape(-1, 1)}
    full = spread[granularity]() if granularity in spread else blocked(s.reshape(s.shape[:2]), *block)
    words = f"{label}, {granularity}{f' {block[1]}' if granularity not in spread else ''}"
    return expect(draft, q * full, "int8", granularity, words, is_exact=exact, outlier_method="none")


def rotated(draft: Draft, matrix: Array, method: str) -> Draft:
    """The same file, known to be rotated: a marker must say so."""
    draft.real[LAYER] = unrotated(draft.real[LAYER], matrix)
    label = f"{draft.expected['label']}, {method} {len(matrix)}"
    draft.expected |= {
        "outlier_method": method,
        "rotation_group_size": len(matrix),
        "outlier_settings": {"group_size": len(matrix)},
        "label": label,
    }
    return draft


def convrot(group: int, k: int = K, **marker: object) -> Draft:
    said = {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": group,
        "per_row": True,
        **marker,
    }
    return rotated(int8((N, 1), "row", said, weight=(N, k)), regular(group), "convrot")


def lost_in_the_header(header: dict[str, object]) -> Draft:
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "per_row": True}
    return rotated(int8((N, 1), "row", said, header=header), regular(16), "convrot")


def smoothed(rotation: bool) -> Draft:
    said = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": 16} if rotation else {})}
    draft = int8((N, 1), "row", said)
    draft = rotated(draft, regular(16), "convrot") if rotation else draft
    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.chance.uniform(0.5, 2, K))
    draft.real[LAYER] = draft.real[LAYER] * factor
    if not rotation:
        draft.expected |= {"outlier_method": "smoothquant", "label": "int8_tensorwise, row, smoothquant"}
    return draft


def toolkit(sigma: bool, matrix: bool = True, scale: tuple[int, ...] = (N, 1), dtype: str = "F32") -> Draft:
    draft = Draft()
    k = 256
    q, s = draft.codes(f"{LAYER}.weight", N, k), draft.scale(f"{LAYER}.weight_scale", *scale)
    draft.put(f"{LAYER}.weight_packed", "I8", q.T)
    real = q * (s.reshape(-1, 1) if s.size > 1 else s.item())
    label = f"int8, {'row' if s.size > 1 else 'tensor'}"
    if matrix:
        draft.put(f"{LAYER}.quarot_hadamard", dtype, sylvester(128))
        real = unrotated(real, sylvester(128))
    if sigma:
        real = real / draft.put(f"{LAYER}.hadanorm_sigma", "F32", draft.chance.uniform(0.5, 2, k))
    method = "hadanorm" if sigma else "quarot"
    label += f", {method}{' 128' if matrix else ''}"
    return expect(
        draft,
        real,
        "int8",
        "row" if s.size > 1 else "tensor",
        label,
        is_exact=True,
        outlier_method=method,
        is_centered=sigma,
    )


def quip(n: int, k: int, smooth: bool = False) -> Draft:
    """Padded to powers of 2; only n and k rows and columns are the weight."""
    draft = Draft()
    padded = tuple(1 << (size - 1).bit_length() for size in (n, k))
    q, s = draft.codes(f"{LAYER}.weight", *padded), draft.scale(f"{LAYER}.weight_scale", padded[0], 1)
    draft.text(f"{LAYER}.comfy_quant", TENSOR)
    draft.put(f"{LAYER}.hadamard_quip", "I8", 1)
    for name, size in zip(("out", "in"), padded, strict=True):
        draft.put(f"{LAYER}.hadamard_size_{name}", "I32", size)
    row, col = (
        draft.put(f"{LAYER}.sign_{name}", "F32", draft.chance.choice([-1.0, 1.0], size))
        for name, size in zip(("row", "col"), padded, strict=True)
    )
    real = row[:, None] * (sylvester(padded[0]) @ (q * s) @ sylvester(padded[1])) * col
    real = real[:n, :k]
    if smooth:
        real = real / draft.put(f"{LAYER}.smooth_factors", "F32", draft.chance.uniform(0.5, 2, k))
    draft.put(f"{LAYER}.bias", "F32", np.zeros(n))
    draft = expect(
        draft,
        real,
        "int8",
        "row",
        "int8_tensorwise, row, quip",
        is_exact=False,
        outlier_method="quip",
        is_padded=True,
    )
    draft.expected |= {"rows": padded[0], "columns": padded[1]}
    return draft


def older_quip(dense: bool) -> Draft:
    draft = Draft()
    q, s = draft.codes(f"{LAYER}.weight", N, K), draft.scale(f"{LAYER}.weight_scale", N, 1)
    u, v = (
        draft.put(f"{LAYER}.quip_s_{x}", "F32", draft.chance.normal(size=(size, size) if dense else size))
        for x, size in (("u", N), ("v", K))
    )
    real = u @ (q * s) @ v.T if dense else u[:, None] * (q * s) * v
    return expect(
        draft, real, "int8", "row", "int8, row, quip", is_exact=False, outlier_method="quip", is_padded=False
    )


def transposed() -> Draft:
    """[K, N] in the file."""
    draft = Draft()
    q, s = draft.codes(f"{LAYER}.weight", K, N), draft.scale(f"{LAYER}.scale", 1, N)
    return expect(
        draft, (q * s).T, "int8", "transposed", "int8, transposed", is_exact=False, outlier_method="none"
    )


def fp8(
    shape: tuple[int, ...] | None,
    granularity: str,
    *,
    dtype: str = "F8_E4M3",
    name: str = "weight_scale",
    marker: object = None,
    block: tuple[int, int] = (1, 1),
    legacy: int | None = None,
    header: object = None,
) -> Draft:
    """fp8 numbers; legacy: elements of the `scaled_fp8` marker of the file."""
    draft = Draft()
    real = draft.fp8(f"{LAYER}.weight", dtype, N, K)
    word = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    label = f"{word} cast"
    if shape is not None:
        s = draft.scale(f"{LAYER}.{name}", *shape)
        full = {"tensor": lambda: s.reshape(1, 1), "row": lambda: s.reshape(-1, 1)}.get(
            granularity, lambda: blocked(s.reshape(s.shape[:2]), *block)
        )()
        real, label = real * full, f"{word} scaled, {granularity}{f' {block[1]}' if max(block) > 1 else ''}"
    if marker is not None:
        draft.text(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.header({LAYER: header})
    if legacy is not None:
        draft.tensors["scaled_fp8"] = dtype, (legacy,), bytes(legacy)
        draft.put(f"{LAYER}.scale_input", "F32", 1.0)
    return expect(draft, real, "fp8", granularity, label, is_exact=False, outlier_method="none")


def smoothed_fp8() -> Draft:
    draft = fp8((), "tensor", marker={"format": "float8_e4m3fn"})
    draft.real[LAYER] = draft.real[LAYER] * draft.put(
        f"{LAYER}.pre_quant_scale", "F32", draft.chance.uniform(0.5, 2, K)
    )
    return draft


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def in_tiles(scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same scales where cuBLAS wants them, and rubbish where it wants none."""
    rows, columns = scale.shape
    shape = up_to(rows, 128), up_to(columns, 4)
    flat = np.full(shape, 0xFF, np.uint8).reshape(-1)
    r, c = np.indices(scale.shape)
    flat[(r // 128 * (shape[1] // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale
    return flat.reshape(shape)


def block_scales(draft: Draft, scale: NDArray[np.uint8], tiles: bool, dtype: str) -> None:
    found = in_tiles(scale) if tiles else scale
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, found.shape, found.tobytes()


def blocks(
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
) -> Draft:
    """mxfp8 or nvfp4 with random numbers, also in the padding.

    Args:
        n, k: of the weight.
        rows: in the file; None: padded as ComfyUI pads.
        told: which of them the file tells.
    """
    draft = Draft()
    nvfp4 = kind == "nvfp4"
    multiple = 16 if nvfp4 else 32
    padded = rows or up_to(n, multiple), up_to(k, multiple)
    if nvfp4:
        codes = draft.chance.integers(0, 256, (padded[0], padded[1] // 2)).astype("u1")
        draft.tensors[f"{LAYER}.weight"] = "U8", codes.shape, codes.tobytes()
        halves = (codes >> 4, codes & 15) if tiles else (codes & 15, codes >> 4)
        real = E2M1[np.stack(halves, -1).reshape(padded)]
        scale = draft.chance.integers(0, 0x7F, (padded[0], padded[1] // 16)).astype("u1")
        real = real * blocked(fp8_values(scale, 4), 1, 16)
        real = real * draft.scale(f"{LAYER}.weight_scale_2")
    else:
        real = draft.fp8(f"{LAYER}.weight", "F8_E4M3", *padded)
        scale = draft.chance.integers(100, 140, (padded[0], padded[1] // 32)).astype("u1")
        real = real * blocked(2.0 ** (scale - 127.0), 1, 32)
    block_scales(draft, scale, tiles, dtype or ("F8_E4M3" if nvfp4 else "U8"))
    if scalar:
        draft.scale(f"{LAYER}.weight_scalar")
    if marker is not None:
        draft.text(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.header({LAYER: header})
    if bias:
        draft.put(f"{LAYER}.bias", "F32", np.zeros(n))
    word = word or kind
    expect(
        draft,
        real[:n, :k],
        kind,
        "block",
        word,
        format_name=word,
        is_exact=False,
        outlier_method="none",
        is_packable=True,
    )
    told = told or (bias, False)
    sizes = {"rows": n if told[0] else padded[0], "columns": k if told[1] else padded[1]}
    draft.expected |= {"declared": told, "is_padded": told != (True, True), "block_size": multiple, **sizes}
    return draft


def smoothed_blocks(kind: str) -> Draft:
    """The factors tell K."""
    draft = blocks(kind, marker={"format": kind}, told=(True, True))
    draft.real[LAYER] = draft.real[LAYER] * draft.put(
        f"{LAYER}.pre_quant_scale", "F32", draft.chance.uniform(0.5, 2, 40)
    )
    return draft


def unsure(kind: str, n: int = 128, k: int = 128) -> Draft:
    """Scales of a shape that they have in tiles and in rows."""
    return blocks(kind, n, k, bias=False)


def lightx2v_comfy() -> Draft:
    """int8 with the marker of fp8 files."""
    draft = int8((), "tensor", name="scale_weight", label="int8")
    draft.tensors["scaled_fp8"] = "F8_E4M3", (2,), bytes(2)
    return draft


def floats(dtype: str, word: str) -> Draft:
    draft = Draft()
    real = draft.put(f"{LAYER}.weight", dtype, draft.chance.normal(size=(N, K)))
    return expect(draft, real, "float", "", word, is_exact=False, outlier_method="none")


KINDS: dict[str, Callable[[], Draft]] = {
    # ComfyUI's own, and the shapes of one scale
    "tensor []": lambda: int8((), "tensor", TENSOR),
    "tensor [1]": lambda: int8((1,), "tensor", TENSOR),
    "tensor [1, 1]": lambda: int8((1, 1), "tensor", TENSOR),
    "row [N, 1]": lambda: int8((N, 1), "row", ROW),
    "row [N]": lambda: int8((N,), "row", TENSOR),
    "row [N] of a square": lambda: int8((K,), "row", TENSOR, weight=(K, K)),
    "row [N, 1] of a square": lambda: int8((K, 1), "row", ROW, weight=(K, K)),
    "one row": lambda: int8((1, 1), "tensor", TENSOR, weight=(1, K)),
    "one column": lambda: int8((N, 1), "row", TENSOR, weight=(N, 1)),
    "row in the header": lambda: int8((N, 1), "row", header=ROW),
    "axiswise": lambda: int8((N,), "row", {"format": "int8_axiswise"}, label="int8_axiswise"),
    "bf16 scale with a marker": lambda: int8((N, 1), "row", ROW, dtype="BF16"),
    "embedding's padding": lambda: int8((N, 1), "row", ROW, padding=b"\0\0\0"),
    "doubled braces": lambda: int8((N, 1), "row", '{{"format": "int8_tensorwise"}}'),
    "orig_dtype": lambda: int8(
        (N, 1), "row", {"format": "int8_tensorwise", "orig_dtype": "torch.bfloat16", "per_row": True}
    ),
    # rotations
    "convrot 16": lambda: convrot(16),
    "convrot 4": lambda: convrot(4),
    "convrot 64": lambda: convrot(64),
    "convrot 256 by default": lambda: rotated(
        int8((N, 1), "row", {"format": "int8_tensorwise", "convrot": True}, weight=(N, 512)),
        regular(256),
        "convrot",
    ),
    "convrot 1024": lambda: convrot(1024, 1024),
    "convrot 32 is Sylvester's": lambda: rotated(
        int8((N, 1), "row", {**ROW, "convrot": True, "convrot_groupsize": 32}), sylvester(32), "quarot"
    ),
    "convrot of a tensor scale": lambda: rotated(
        int8((), "tensor", {**TENSOR, "convrot": True, "convrot_groupsize": 16}), regular(16), "convrot"
    ),
    "convrot in params": lambda: rotated(
        int8((N, 1), "row", {**TENSOR, "params": {"convrot": True, "convrot_groupsize": 16}}),
        regular(16),
        "convrot",
    ),
    "convrot in the header": lambda: rotated(
        int8((N, 1), "row", header={**ROW, "convrot": True, "convrot_groupsize": 16}), regular(16), "convrot"
    ),
    "convrot lost in the header": lambda: lost_in_the_header(
        {"format": "int8_tensorwise", "group_size": 128}
    ),
    "convrot's size lost in the header": lambda: lost_in_the_header(
        {"format": "int8_tensorwise", "convrot": True}
    ),
    "quarot, pre-native": lambda: rotated(
        int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 16}, label="int8"), regular(16), "convrot"
    ),
    "quarot of 128": lambda: rotated(
        int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 128}, weight=(N, 128), label="int8"),
        sylvester(128),
        "quarot",
    ),
    "convrot, pre-native": lambda: rotated(
        int8((N, 1), "row", {"convrot": True, "convrot_groupsize": 64, "per_row": True}, label="int8"),
        regular(64),
        "convrot",
    ),
    "quarot false": lambda: int8((N, 1), "row", {"quarot": False}, label="int8"),
    "convrot false": lambda: int8((N, 1), "row", {"convrot": False, "per_row": True}, label="int8"),
    "smoothed": lambda: smoothed(False),
    "smoothed and rotated": lambda: smoothed(True),
    # blocks
    "grid": lambda: int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "group_size": 4},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid in params": lambda: int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "params": {"group_size": 4}},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without its size": lambda: int8(
        (3, 16), "grid", {"format": "int8_blockwise"}, block=(4, 4), label="int8_blockwise", exact=False
    ),
    "grid of one column": lambda: int8(
        (3, 1),
        "grid",
        {"format": "int8_blockwise"},
        weight=(12, 4),
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without a marker": lambda: int8(
        (3, 16), "grid", name="scale_weight", block=(4, 4), label="int8", exact=False
    ),
    "block3d": lambda: int8(
        (N, 4, 1),
        "block3d",
        {"format": "int8_blockwise", "group_size": 16},
        block=(1, 16),
        label="int8_blockwise",
        exact=False,
    ),
    "block3d of one block": lambda: int8(
        (N, 1, 1), "block3d", {"format": "int8_blockwise"}, block=(1, K), label="int8_blockwise", exact=False
    ),
    "block3d, rotated": lambda: rotated(
        int8(
            (N, 4, 1),
            "block3d",
            {"format": "int8_blockwise", "convrot": True, "convrot_groupsize": 64},
            block=(1, 16),
            label="int8_blockwise",
            exact=False,
        ),
        regular(64),
        "convrot",
    ),
    "group": lambda: int8((N, 8), "group", block=(1, 8), label="int8", exact=False),
    # Wan-INT8's names
    **{
        f"named {name}": lambda name=name: int8(
            (N, 4, 1), "block3d", name=name, block=(1, 16), label="int8", exact=False
        )  # type: ignore[misc]
        for name in ("scale", "weight.scale", "weight.weight_scale", "scale_weight", "weight_scale_inv")
    },
    # others
    "lightx2v bf16": lambda: int8((N, 1), "row", dtype="BF16", label="int8"),
    "lightx2v f16": lambda: int8((N, 1), "row", dtype="F16", label="int8"),
    "lightx2v comfy mode": lightx2v_comfy,
    "toolkit quarot": lambda: toolkit(False),
    "toolkit quarot, one scale": lambda: toolkit(False, scale=(1,)),
    "toolkit quarot in half precision": lambda: toolkit(False, dtype="BF16"),
    "toolkit hadanorm": lambda: toolkit(True),
    "toolkit sigma alone": lambda: toolkit(True, matrix=False),
    "quip": lambda: quip(8, 32),
    "quip, padded": lambda: quip(12, 24),
    "quip, smoothed": lambda: quip(12, 24, smooth=True),
    "older quip": lambda: older_quip(False),
    "older quip, dense": lambda: older_quip(True),
    "transposed": transposed,
    # fp8
    "fp8": lambda: fp8((), "tensor", marker={"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
    "fp8 in the header": lambda: fp8((), "tensor", header={"format": "float8_e4m3fn"}),
    "fp8 e5m2": lambda: fp8((1,), "tensor", dtype="F8_E5M2", marker={"format": "float8_e5m2"}),
    "fp8 e5m2 with the label of e4m3": lambda: fp8(
        (), "tensor", dtype="F8_E5M2", marker={"format": "float8_e4m3fn"}
    ),
    "fp8 marked, no scale": lambda: fp8(None, "", marker={"format": "float8_e4m3fn"}),
    "fp8 legacy": lambda: fp8((), "tensor", name="scale_weight", legacy=2),
    "fp8 legacy, empty marker": lambda: fp8((1,), "tensor", name="scale_weight", legacy=0),
    "fp8 row": lambda: fp8((N,), "row", marker={"format": "float8_e4m3fn_rowwise"}),
    "fp8 row [N, 1]": lambda: fp8((N, 1), "row"),
    "fp8 grid": lambda: fp8(
        (3, 16), "grid", marker={"format": "float8_e4m3fn_blockwise", "group_size": 4}, block=(4, 4)
    ),
    "fp8 grid of transformers": lambda: fp8((3, 16), "grid", name="weight_scale_inv", block=(4, 4)),
    "fp8 block3d": lambda: fp8((N, 4, 1), "block3d", marker={"format": "float8_e4m3fn"}, block=(1, 16)),
    "fp8 block3d by its name": lambda: fp8(
        (N, 4, 1), "block3d", marker={"format": "float8_e4m3fn_block3d"}, block=(1, 16)
    ),
    "fp8 smoothed": smoothed_fp8,
    "fp8 cast": lambda: fp8(None, ""),
    "fp8 cast e5m2": lambda: fp8(None, "", dtype="F8_E5M2"),
    # blocks with small scales
    "nvfp4": lambda: blocks("nvfp4", marker={"format": "nvfp4"}),
    "nvfp4 in the header": lambda: blocks("nvfp4", header={"format": "nvfp4"}, dtype="U8"),
    "nvfp4 with its shape": lambda: blocks(
        "nvfp4", marker={"format": "nvfp4", "orig_shape": [N, 40]}, bias=False, told=(True, True)
    ),
    "nvfp4 without a marker": lambda: blocks("nvfp4", 16, 64, bias=False),
    "nvfp4 of many tiles": lambda: blocks("nvfp4", 272, 160, marker={"format": "nvfp4", "group_size": 16}),
    "nvfp4 smoothed": lambda: smoothed_blocks("nvfp4"),
    "nvfp4 by ModelOpt": lambda: blocks("nvfp4", 16, 64, tiles=False, word="nvfp4_modelopt"),
    "nvfp4 by ModelOpt, wide": lambda: blocks(
        "nvfp4", 130, 48, tiles=False, word="nvfp4_modelopt", rows=130, bias=False
    ),
    "mxfp8": lambda: blocks(
        "mxfp8", marker={"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.bfloat16"}
    ),
    "mxfp8 in the header": lambda: blocks(
        "mxfp8", header={"format": "mxfp8", "orig_shape": [N, 40]}, told=(True, True)
    ),
    "mxfp8 in e8m0": lambda: blocks("mxfp8", dtype="F8_E8M0"),
    "mxfp8 with all its rows": lambda: blocks("mxfp8", N, 64, marker={"format": "mxfp8"}, rows=N),
    "mxfp8 of many tiles": lambda: blocks("mxfp8", 272, 320, bias=False),
    "mxfp8 smoothed": lambda: smoothed_blocks("mxfp8"),
    "mxfp8 in rows": lambda: blocks("mxfp8", 32, 320, tiles=False, word="mxfp8_rows"),
    "hybrid mxfp8": lambda: blocks("mxfp8", marker={"format": "hybrid_mxfp8"}, scalar=True),
    # floats
    "bf16": lambda: floats("BF16", "bfloat16"),
    "f16": lambda: floats("F16", "float16"),
    "f32": lambda: floats("F32", "float32"),
    "f64": lambda: floats("F64", "float64"),
}


# -- mistakes -----------------------------------------------------------------------------------------------------------


def row() -> Draft:
    return int8((N, 1), "row", ROW)


def bare(dtype: str = "F32") -> Draft:
    """A file with one float weight."""
    return floats(dtype, "")


def but(draft: Draft, change: Callable[[Draft], object]) -> Draft:
    change(draft)
    return draft


def without(draft: Draft, *suffixes: str) -> Draft:
    for suffix in suffixes:
        del draft.tensors[f"{LAYER}.{suffix}"]
    return draft


def with_scale(*values: float) -> Draft:
    draft = row()
    draft.put(f"{LAYER}.weight_scale", "F32", np.resize(values, (N, 1)))
    return draft


def said(marker: object, draft: Draft | None = None) -> Draft:
    draft = draft or row()
    draft.text(f"{LAYER}.comfy_quant", marker)
    return draft


def raw(draft: Draft, key: str, dtype: str, *shape: int) -> Draft:
    """A tensor of zeros with any dtype of a byte."""
    draft.tensors[key] = dtype, shape, bytes(int(np.prod(shape)))
    return draft


def beside(suffix: str, dtype: str = "F32", draft: Draft | None = None) -> Draft:
    """A file with one more tensor beside the weight."""
    draft = draft or row()
    draft.put(f"{LAYER}.{suffix}", dtype, np.ones(K))
    return draft


def headed(layers: object, draft: Draft | None = None) -> Draft:
    draft = draft or row()
    draft.metadata["_quantization_metadata"] = (
        layers if isinstance(layers, str) else json.dumps({"layers": layers})
    )
    return draft


def with_block_scale(kind: str, byte: int, tiles: bool = True) -> Draft:
    """One scale of many is another; nvfp4 of [16, 48], mxfp8 of [32, 64]."""
    draft = blocks(kind, tiles=tiles)
    dtype, shape, data = draft.tensors[f"{LAYER}.weight_scale"]
    changed = bytearray(data)
    changed[16 if tiles else 3] = byte  # that of row 1, block 0
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, shape, bytes(changed)
    return draft


def two_layers(first: Draft, second: Draft) -> Draft:
    first.tensors |= {key.replace("blocks.0", "blocks.1"): value for key, value in second.tensors.items()}
    return first


def ours(**change: object) -> dict[str, object]:
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


def odd_quip() -> Draft:
    """QuIP by Hadamard matrices of a size that has none."""
    draft = quip(8, 32)
    draft.codes(f"{LAYER}.weight", 12, 32)
    draft.scale(f"{LAYER}.weight_scale", 12, 1)
    draft.put(f"{LAYER}.hadamard_size_out", "I32", 12)
    draft.put(f"{LAYER}.sign_row", "F32", np.ones(12))
    return draft


GROUP = {"format": "int8_tensorwise", "convrot": True}
MISTAKES: dict[str, tuple[Callable[[], Draft], str]] = {
    # scales
    "no scale": (
        lambda: without(row(), "weight_scale"),
        r"blocks.0.q is INT8 and has no weight_scale, so its numbers mean nothing",
    ),
    "scale alone": (
        lambda: without(row(), "weight"),
        r"blocks.0.q.weight_scale belongs to no weight, blocks.0.q.weight is missing",
    ),
    "marker alone": (
        lambda: without(row(), "weight", "weight_scale"),
        r"blocks.0.q.comfy_quant belongs to no weight",
    ),
    "scale of a legacy name alone": (
        lambda: without(fp8((), "tensor", name="scale_weight", legacy=2), "weight"),
        "scale_.* belongs to no weight",
    ),
    "one scale too few": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", N - 1, 1)),
        r"weight_scale has the shape \[11, 1\], which does not fit a weight \[12, 64\]; scales are one number, \[N\]",
    ),
    "a scale for each column": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", K)),
        r"has the shape \[64\], which does not fit a weight \[12, 64\]",
    ),
    "a scale for each number": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", N, K)),
        r"has the shape \[12, 64\], which does not fit a weight",
    ),
    "blocks that do not divide": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", N, 7)),
        r"has the shape \[12, 7\], which does not fit a weight",
    ),
    "blocks that are not square": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", 3, 8)),
        r"has the shape \[3, 8\], which does not fit a weight",
    ),
    "3-D blocks that do not divide": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", N, 5, 1)),
        r"has the shape \[12, 5, 1\], which does not fit",
    ),
    "3-D blocks of two": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", N, 4, 2)),
        r"has the shape \[12, 4, 2\], which does not fit",
    ),
    "transposed fp8": (
        lambda: but(fp8((), "tensor"), lambda d: d.scale(f"{LAYER}.weight_scale", 1, K)),
        r"has the shape \[1, 64\], which does not fit a weight \[12, 64\]",
    ),
    "no scales at all": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.weight_scale", 0)),
        r"has the shape \[0\], which does not fit a weight",
    ),
    "fp8 scale": (
        lambda: raw(row(), f"{LAYER}.weight_scale", "F8_E4M3", N, 1),
        r"weight_scale is F8_E4M3, and blocks.0.q.weight is I8; its scales are F32",
    ),
    "whole scales": (
        lambda: but(row(), lambda d: d.put(f"{LAYER}.weight_scale", "I32", np.ones((N, 1)))),
        "weight_scale is I32, and",
    ),
    "a scale of zero": (
        lambda: with_scale(1, 0, 1),
        "4 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a negative scale": (
        lambda: with_scale(1, -1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a scale that is nan": (
        lambda: with_scale(float("nan"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "an infinite scale": (
        lambda: with_scale(float("inf"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "two scales": (
        lambda: but(row(), lambda d: d.scale(f"{LAYER}.scale_weight", N, 1)),
        "has two scales, blocks.0.q.weight_scale and blocks.0.q.scale_weight",
    ),
    "a scale for a float": (
        lambda: but(bare(), lambda d: d.scale(f"{LAYER}.weight_scale", 1)),
        "weight is F32 and has blocks.0.q.weight_scale, which is not 1; it is unclear whether",
    ),
    "an infinite scale for a float": (
        lambda: but(bare(), lambda d: d.put(f"{LAYER}.weight_scale", "F32", float("inf"))),
        "1 of 1 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "fp8 scales lost": (
        lambda: raw(fp8(None, ""), "scaled_fp8", "F8_E4M3", 2),
        r"scaled_fp8 says that fp8 weights have scales, and none has one \(blocks.0.q\)",
    ),
    "row scales of fp8 lost": (
        lambda: fp8(None, "", marker={"format": "float8_e4m3fn_rowwise"}),
        "names the format 'float8_e4m3fn_rowwise', and blocks.0.q has no weight_scale; the file is incomplete, download it again",
    ),
    "block scales of fp8 lost": (
        lambda: fp8(None, "", header={"format": "float8_e4m3fn_block3d"}),
        "names the format 'float8_e4m3fn_block3d', and blocks.0.q has no weight_scale",
    ),
    # weights
    "int8 of 3 dimensions": (
        lambda: raw(row(), f"{LAYER}.weight", "I8", 2, N, K),
        r"weight is I8 \[2, 12, 64\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 vector": (
        lambda: raw(row(), f"{LAYER}.weight", "I8", N),
        r"weight is I8 \[12\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 of no rows": (lambda: raw(row(), f"{LAYER}.weight", "I8", 0, K), r"weight is I8 \[0, 64\]"),
    "int8 that is no weight": (
        lambda: raw(bare(), "table", "I8", 3, 4),
        "table is I8 and not the weight of a layer",
    ),
    "whole weight": (
        lambda: but(bare(), lambda d: d.put(f"{LAYER}.weight", "I64", np.ones((2, 2)))),
        "blocks.0.q.weight is I64; int8run reads weights of F64, F32",
    ),
    "fp8 of AMD": (
        lambda: raw(bare(), f"{LAYER}.weight", "F8_E4M3FNUZ", 2, 2),
        "blocks.0.q.weight is F8_E4M3FNUZ; int8run reads weights",
    ),
    # markers
    "marker of floats": (
        lambda: beside("comfy_quant"),
        r"comfy_quant is F32 \[64\]; a marker is a short row of bytes, U8",
    ),
    "marker of two axes": (
        lambda: raw(row(), f"{LAYER}.comfy_quant", "U8", 2, 8),
        r"comfy_quant is U8 \[2, 8\]; a marker is",
    ),
    "long marker": (
        lambda: raw(row(), f"{LAYER}.comfy_quant", "U8", 70000),
        r"comfy_quant is U8 \[70000\]; a marker is a short row",
    ),
    "empty marker": (lambda: said(""), r"the marker blocks.0.q.comfy_quant is not JSON: b''"),
    "no json": (lambda: said("{format"), r"the marker blocks.0.q.comfy_quant is not JSON: b'\{format'"),
    "a list": (lambda: said([1]), r"the marker blocks.0.q.comfy_quant is not a JSON object"),
    "a deep list": (lambda: said("[" * 60000), r"the marker blocks.0.q.comfy_quant is not JSON"),
    "says nothing": (lambda: said({}), r"the marker blocks.0.q.comfy_quant names no format: \{\}"),
    "format of no one": (
        lambda: said({"format": "int9"}),
        r"names the format 'int9'; int8run reads int8_tensorwise, int8_axiswise",
    ),
    "format that is no text": (lambda: said({"format": 8}), r"has an invalid format: "),
    "flag that is no flag": (lambda: said({**TENSOR, "convrot": "yes"}), r"has an invalid convrot: "),
    "per_row that is no flag": (lambda: said({**TENSOR, "per_row": 1}), r"has an invalid per_row: "),
    "block that is no number": (
        lambda: said({**TENSOR, "group_size": "128"}),
        r"has an invalid group_size: ",
    ),
    "block of nothing": (lambda: said({**TENSOR, "group_size": 0}), r"has an invalid group_size: "),
    "fp8 label on int8": (
        lambda: said({"format": "float8_e4m3fn"}),
        r"names the format 'float8_e4m3fn', and blocks.0.q.weight is I8 with a scale in F32; they contradict each other",
    ),
    "int8 label on fp8": (
        lambda: said(TENSOR, fp8((), "tensor")),
        r"names the format 'int8_tensorwise', and blocks.0.q.weight is F8_E4M3 with a scale in F32; they contradict",
    ),
    "no format on fp8": (
        lambda: said({"convrot": False}, fp8((), "tensor")),
        r"names the format ''; int8run reads",
    ),
    "label on a float": (
        lambda: said(TENSOR, bare()),
        r"blocks.0.q.weight is F32 and has blocks.0.q.comfy_quant, which such a weight cannot have",
    ),
    "label on a float in the header": (
        lambda: headed({LAYER: TENSOR}, bare()),
        r"is F32 and has an entry in the header \(int8_tensorwise\)",
    ),
    "experts": (
        lambda: said({**TENSOR, "num_experts": 8}),
        "describes a bank of experts; int8run reads layers with a matrix each",
    ),
    "block against the shape": (
        lambda: said({"format": "int8_blockwise", "group_size": 8}, int8((3, 16), "grid", block=(4, 4))),
        r"names blocks of 8, and blocks.0.q.weight_scale \[3, 16\] has blocks of 4; they contradict",
    ),
    "one marker missing": (
        lambda: two_layers(row(), int8((N, 1), "row")),
        "blocks.1.q has no comfy_quant marker and other INT8 layers have one",
    ),
    # rotations
    "group that does not divide": (
        lambda: said({**GROUP, "convrot_groupsize": 256}),
        "blocks.0.q is rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group by default that does not divide": (
        lambda: said(GROUP),
        "rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group of 48": (
        lambda: said({**GROUP, "convrot_groupsize": 48}),
        "names groups of 48; rotated are groups of a power of 2 from 2 to 4096",
    ),
    "group of 1": (lambda: said({**GROUP, "convrot_groupsize": 1}), "names groups of 1; rotated"),
    "group of 8192": (lambda: said({**GROUP, "convrot_groupsize": 8192}), "names groups of 8192; rotated"),
    "group of text": (lambda: said({**GROUP, "convrot_groupsize": "16"}), "names groups of '16'; rotated"),
    "group of true": (lambda: said({**GROUP, "convrot_groupsize": True}), "names groups of True; rotated"),
    "two groups": (
        lambda: said({**GROUP, "convrot_groupsize": 16, "quarot_groupsize": 64}),
        "names two sizes of rotated groups, 16 and 64",
    ),
    "fp8 rotated": (
        lambda: said({"format": "float8_e4m3fn", "convrot": True}, fp8((), "tensor")),
        "says that an fp8 weight is rotated",
    ),
    # the header
    "header of no json": (lambda: headed("{"), "_quantization_metadata in its header is not JSON"),
    "header of a list": (lambda: headed("[]"), "_quantization_metadata in its header is not a JSON object"),
    "header of lists": (
        lambda: headed([LAYER]),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header of texts": (
        lambda: headed({LAYER: "int8"}),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header for another file": (
        lambda: headed({"blocks.9.q": ROW}),
        "describes blocks.9.q, which the file does not have; it was written for another file",
    ),
    "header without the prefix": (
        lambda: headed({LAYER: ROW}, row().prefixed("model.diffusion_model.")),
        "describes blocks.0.q, which the file does not have; the file has model.diffusion_model.blocks.0.q.weight, so the prefix was lost",
    ),
    "header against the marker": (
        lambda: headed({LAYER: {**ROW, "convrot": False}}, convrot(16)),
        "has convrot=False, the layer's marker True; they contradict each other",
    ),
    "header's group against the marker's": (
        lambda: headed({LAYER: {**GROUP, "convrot_groupsize": 64}}, convrot(16)),
        "has convrot_groupsize=64, the layer's marker 16; they contradict",
    ),
    "header against our marker": (
        lambda: headed({LAYER: ROW}, said(ours())),
        "says 'int8_tensorwise', the layer's marker 'int8run_transformed'; they contradict",
    ),
    # our own format
    "ours without settings": (
        lambda: said(ours(settings=None)),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting of text": (
        lambda: said(ours(settings={"alpha": "x"})),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting that is true": (
        lambda: said(ours(settings={"alpha": True})),
        "lacks what such a marker holds",
    ),
    "ours with a setting that is infinite": (
        lambda: said(ours(settings={"alpha": float("inf")})),
        "lacks what such a marker holds",
    ),
    "ours without a method": (lambda: said(ours(outlier=None)), "lacks what such a marker holds"),
    "ours with a random rotation": (lambda: said(ours(rotation="random")), "lacks what such a marker holds"),
    "ours with half a rotation": (
        lambda: said({k: v for k, v in ours().items() if k != "group_size"}),
        "lacks what such a marker holds",
    ),
    "ours with a factor that is no flag": (lambda: said(ours(factor=1)), "lacks what such a marker holds"),
    "ours with a size of none": (
        lambda: said(ours(group_size=None)),
        "has an invalid group_size|names groups of None",
    ),
    "ours regular of 32": (
        lambda: said(ours(rotation="regular", group_size=32)),
        "names groups of 32; a regular matrix needs a power of 4",
    ),
    "ours, its factor lost": (
        lambda: said(ours(factor=True)),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, a factor too many": (
        lambda: beside("pre_quant_scale", draft=said(ours())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, with a sigma": (
        lambda: beside("hadanorm_sigma", draft=said(ours())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    # factors
    "factor of another width": (
        lambda: but(row(), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(N))),
        r"pre_quant_scale has the shape \[12\], its weight needs \[64\]",
    ),
    "factor of zero": (
        lambda: but(row(), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.zeros(K))),
        "64 of 64 numbers of blocks.0.q.pre_quant_scale are not finite and above 0",
    ),
    "factor of whole numbers": (
        lambda: beside("pre_quant_scale", "I32"),
        "pre_quant_scale is I32; allowed are F32",
    ),
    "factor of another width of fp8": (
        lambda: but(fp8((), "tensor"), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(N))),
        r"pre_quant_scale has the shape \[12\]",
    ),
    "factor for a float": (
        lambda: beside("pre_quant_scale", draft=bare()),
        "is F32 and has blocks.0.q.pre_quant_scale, which such a weight cannot have",
    ),
    "factor alone": (
        lambda: but(bare(), lambda d: d.put("norm.pre_quant_scale", "F32", 1)),
        "norm.pre_quant_scale belongs to no weight",
    ),
    # INT8-Toolkit
    "matrix of another kind": (
        lambda: but(toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.eye(128))),
        r"quarot_hadamard F32 \[128, 128\] is not a Hadamard matrix",
    ),
    "matrix that is none": (
        lambda: but(toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.ones(128))),
        r"quarot_hadamard F32 \[128\] is not a Hadamard matrix",
    ),
    "matrix of 48": (
        lambda: but(toolkit(False), lambda d: d.put(f"{LAYER}.quarot_hadamard", "F32", np.ones((48, 48)))),
        r"\[48, 48\] is not a Hadamard matrix",
    ),
    "matrix and convrot": (
        lambda: said({**GROUP, "convrot_groupsize": 64}, toolkit(False)),
        "rotated by its marker and by the INT8-Toolkit's tensors; they contradict",
    ),
    "matrix and a factor": (
        lambda: but(toolkit(False), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(256))),
        "rotated by its marker and by the INT8-Toolkit's",
    ),
    "sigma of another width": (
        lambda: but(toolkit(True), lambda d: d.put(f"{LAYER}.hadanorm_sigma", "F32", np.ones(4))),
        r"hadanorm_sigma has the shape \[4\], its weight needs \[256\]",
    ),
    "sigma of zero": (
        lambda: but(toolkit(True), lambda d: d.put(f"{LAYER}.hadanorm_sigma", "F32", np.zeros(256))),
        "256 of 256 numbers of blocks.0.q.hadanorm_sigma",
    ),
    "sigma for fp8": (
        lambda: beside("hadanorm_sigma", draft=fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.hadanorm_sigma, which such a weight cannot have",
    ),
    # QuIP
    "quip without signs": (
        lambda: without(quip(8, 32), "sign_col"),
        "is transformed by QuIP and sign_col is missing; its weight cannot be restored",
    ),
    "quip without its flag": (
        lambda: without(quip(8, 32), "hadamard_quip"),
        "is transformed by QuIP and hadamard_quip is missing",
    ),
    "quip of both kinds": (
        lambda: beside("quip_s_v", draft=beside("quip_s_u", draft=quip(8, 32))),
        "is transformed by QuIP and it has hadamard_quip and quip_s_u",
    ),
    "older quip without v": (
        lambda: without(older_quip(False), "quip_s_v"),
        "is transformed by QuIP and quip_s_v is missing",
    ),
    "older quip of another size": (
        lambda: but(older_quip(False), lambda d: d.put(f"{LAYER}.quip_s_u", "F32", np.ones(5))),
        r"quip_s_u is F32 \[5\]; its weight \[12, 64\] needs F32 \[12\]",
    ),
    "older quip that is nan": (
        lambda: but(older_quip(False), lambda d: d.put(f"{LAYER}.quip_s_u", "F32", np.full(N, np.nan))),
        "quip_s_u has numbers that are not finite",
    ),
    "signs that are none": (
        lambda: but(quip(8, 32), lambda d: d.put(f"{LAYER}.sign_row", "F32", np.full(8, 2.0))),
        "sign_row has numbers that are neither 1 nor -1",
    ),
    "quip of another size": (
        lambda: but(quip(8, 32), lambda d: d.put(f"{LAYER}.hadamard_size_in", "I32", 64)),
        r"hadamard_size_in says 64, and blocks.0.q.weight has \[8, 32\]",
    ),
    "quip that is not padded": (
        odd_quip,
        r"hadamard_size_out says 12, and blocks.0.q.weight has \[12, 32\]; both are one power of 2",
    ),
    "quip of no size": (
        lambda: but(quip(8, 32), lambda d: d.put(f"{LAYER}.hadamard_size_in", "I32", [])),
        r"hadamard_size_in says None, and",
    ),
    "quip and convrot": (
        lambda: said({**GROUP, "convrot_groupsize": 16}, quip(8, 32)),
        "is transformed by QuIP and in another way too",
    ),
    "quip's smooth factors of zero": (
        lambda: but(quip(12, 24, True), lambda d: d.put(f"{LAYER}.smooth_factors", "F32", np.zeros(24))),
        "24 of 24 numbers of blocks.0.q.smooth_factors",
    ),
    # mxfp8 and nvfp4
    "nvfp4's scale for int8": (
        lambda: beside("weight_scale_2"),
        "is I8 and has blocks.0.q.weight_scale_2, which such a weight cannot have",
    ),
    "hybrid mxfp8's scale for fp8": (
        lambda: beside("weight_scalar", draft=fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.weight_scalar, which such a weight cannot have",
    ),
    "nvfp4's label on int8": (
        lambda: said({"format": "nvfp4"}),
        "names the format 'nvfp4', and blocks.0.q.weight is I8 with a scale in F32; they contradict",
    ),
    "mxfp8's label on fp8": (
        lambda: said({"format": "mxfp8"}, fp8((), "tensor")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with a scale in F32; they contradict",
    ),
    "mxfp8's label on a cast": (
        lambda: said({"format": "mxfp8"}, fp8(None, "")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with no scale; they contradict",
    ),
    "fp8's label on mxfp8": (
        lambda: said({"format": "float8_e4m3fn"}, blocks("mxfp8")),
        "names the format 'float8_e4m3fn', and blocks.0.q.weight is F8_E4M3 with a scale in U8; they contradict",
    ),
    "pre-native label on nvfp4": (
        lambda: said({"convrot": False}, blocks("nvfp4")),
        "names the format ''; int8run reads",
    ),
    "nvfp4 rotated": (
        lambda: said({"format": "nvfp4", "convrot": True}, blocks("nvfp4")),
        "says that a weight in nvfp4 is rotated",
    ),
    "nvfp4 of other blocks": (
        lambda: said({"format": "nvfp4", "group_size": 32}, blocks("nvfp4")),
        "names blocks of 32; nvfp4 has blocks of 16",
    ),
    "mxfp8 of other blocks": (
        lambda: said({"format": "mxfp8", "group_size": 16}, blocks("mxfp8")),
        "names blocks of 16; mxfp8 has blocks of 32",
    ),
    "mxfp8 of experts": (
        lambda: said({"format": "mxfp8", "num_experts": 8}, blocks("mxfp8")),
        "describes a bank of experts",
    ),
    "nvfp4 without scales": (
        lambda: without(blocks("nvfp4"), "weight_scale"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale; int8run reads such weights of nvfp4",
    ),
    "nvfp4 without its second scale": (
        lambda: without(blocks("nvfp4"), "weight_scale_2"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale_2; int8run reads such weights of nvfp4",
    ),
    "nvfp4 with two second scales": (
        lambda: but(blocks("nvfp4"), lambda d: d.scale(f"{LAYER}.weight_scale_2", 2)),
        r"weight_scale_2 has the shape \[2\]; it is one number for the whole weight",
    ),
    "nvfp4 with a second scale of zero": (
        lambda: but(blocks("nvfp4"), lambda d: d.put(f"{LAYER}.weight_scale_2", "F32", 0)),
        "1 of 1 numbers of blocks.0.q.weight_scale_2 are not finite and above 0",
    ),
    "nvfp4 with a whole second scale": (
        lambda: but(blocks("nvfp4"), lambda d: d.put(f"{LAYER}.weight_scale_2", "I32", 1)),
        "weight_scale_2 is I32; allowed are F32",
    ),
    "nvfp4 with float scales": (
        lambda: but(blocks("nvfp4"), lambda d: d.scale(f"{LAYER}.weight_scale", 128, 4)),
        "weight_scale is F32; the scales of nvfp4 are F8_E4M3 or U8",
    ),
    "nvfp4 of 3 dimensions": (
        lambda: raw(blocks("nvfp4"), f"{LAYER}.weight", "U8", 2, 8, 24),
        r"weight is U8 \[2, 8, 24\]; weights in nvfp4 are U8 \[N, K / 2\], K a multiple of 16",
    ),
    "nvfp4 of no rows": (
        lambda: raw(blocks("nvfp4"), f"{LAYER}.weight", "U8", 0, 24),
        r"weight is U8 \[0, 24\]; weights in nvfp4",
    ),
    "nvfp4 of half a block": (
        lambda: raw(blocks("nvfp4"), f"{LAYER}.weight", "U8", 16, 20),
        r"weight is U8 \[16, 20\]; weights in nvfp4",
    ),
    "mxfp8 of half a block": (
        lambda: raw(blocks("mxfp8"), f"{LAYER}.weight", "F8_E4M3", 32, 48),
        r"weight is F8_E4M3 \[32, 48\]; weights in mxfp8 are F8_E4M3 \[N, K\], K a multiple of 32",
    ),
    "mxfp8 of e5m2": (
        lambda: raw(blocks("mxfp8"), f"{LAYER}.weight", "F8_E5M2", 32, 64),
        r"weight is F8_E5M2 \[32, 64\]; weights in mxfp8",
    ),
    "nvfp4's scales of another shape": (
        lambda: raw(blocks("nvfp4"), f"{LAYER}.weight_scale", "F8_E4M3", 128, 8),
        r"weight_scale has the shape \[128, 8\]; of blocks.0.q.weight \[16, 24\] in nvfp4 it is \[128, 4\] in tiles, \[16, 3\] in rows",
    ),
    "mxfp8's scales of another shape": (
        lambda: raw(blocks("mxfp8"), f"{LAYER}.weight_scale", "U8", 64, 2),
        r"weight_scale has the shape \[64, 2\]; of blocks.0.q.weight \[32, 64\] in mxfp8 it is \[128, 4\] in tiles, \[32, 2\] in rows",
    ),
    "ComfyUI's label on scales in rows": (
        lambda: said({"format": "nvfp4"}, blocks("nvfp4", 16, 64, tiles=False)),
        "says 'nvfp4', whose scales lie in tiles, and blocks.0.q.weight_scale has the shape of scales in rows; they contradict",
    ),
    "tiles beside rows": (
        lambda: two_layers(blocks("mxfp8"), blocks("mxfp8", 32, 64, tiles=False)),
        "the scales of blocks.0.q lie in tiles as ComfyUI has them, those of blocks.1.q in rows as ModelOpt has them; a file has one",
    ),
    "nvfp4 of nobody": (
        lambda: unsure("nvfp4"),
        "1 weights are nvfp4 .first: blocks.0.q. by ComfyUI or by ModelOpt, and neither shapes nor markers show which; for a text encoder "
        "set clip=nvfp4 or clip=nvfp4_modelopt .quant_format in a program., else take a file with comfy_quant markers",
    ),
    "mxfp8 of nobody": (lambda: unsure("mxfp8"), "clip=mxfp8 or clip=mxfp8_rows"),
    "mxfp8 of nobody beside nvfp4": (
        lambda: two_layers(blocks("nvfp4"), unsure("mxfp8")),
        "1 weights are mxfp8 .first: blocks.1.q. by",
    ),
    "nvfp4's scale is nan": (
        lambda: with_block_scale("nvfp4", 0x7F),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "nvfp4's scale is negative": (
        lambda: with_block_scale("nvfp4", 0x81),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or neg",
    ),
    "ModelOpt's scale is negative": (
        lambda: with_block_scale("nvfp4", 0xB8, False),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN",
    ),
    "mxfp8's scale is nan": (
        lambda: with_block_scale("mxfp8", 0xFF),
        "1 of 64 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "shape that is none": (
        lambda: said({"format": "mxfp8", "orig_shape": "12x40"}, blocks("mxfp8")),
        r"names the shape 12x40, and blocks.0.q.weight has \[32, 64\], which is not padded from it",
    ),
    "shape of one number": (
        lambda: said({"format": "mxfp8", "orig_shape": [12]}, blocks("mxfp8")),
        r"names the shape \[12\], and",
    ),
    "shape of fractions": (
        lambda: said({"format": "mxfp8", "orig_shape": [12.0, 40]}, blocks("mxfp8")),
        r"names the shape \[12.0, 40\], and",
    ),
    "shape of another weight": (
        lambda: said({"format": "mxfp8", "orig_shape": [12, 65]}, blocks("mxfp8")),
        r"names the shape \[12, 65\], and",
    ),
    "shape without end": (
        lambda: said({"format": "nvfp4", "orig_shape": [10**400, 40]}, blocks("nvfp4")),
        r"names the shape \[1000",
    ),
    "shape of nothing": (
        lambda: said({"format": "nvfp4", "orig_shape": [0, 40]}, blocks("nvfp4")),
        r"names the shape \[0, 40\], and",
    ),
    "bias of another weight": (
        lambda: but(blocks("nvfp4"), lambda d: d.put(f"{LAYER}.bias", "F32", np.ones(17))),
        r"blocks.0.q.bias has the shape \[17\], and blocks.0.q.weight has \[16, 48\], which is not padded from it",
    ),
    "bias of two dimensions": (
        lambda: but(blocks("nvfp4"), lambda d: d.put(f"{LAYER}.bias", "F32", np.ones((12, 1)))),
        r"blocks.0.q.bias has the shape \[12, 1\], and",
    ),
    "factor of another width of nvfp4": (
        lambda: but(blocks("nvfp4"), lambda d: d.put(f"{LAYER}.pre_quant_scale", "F32", np.ones(30))),
        r"blocks.0.q.pre_quant_scale has the shape \[30\], and blocks.0.q.weight has \[16, 48\], which is not padded from it",
    ),
    "factor of another width than said": (
        lambda: beside(
            "pre_quant_scale", draft=said({"format": "mxfp8", "orig_shape": [12, 40]}, blocks("mxfp8"))
        ),
        r"pre_quant_scale has the shape \[64\], its weight needs \[40\]",
    ),
    "sigma for nvfp4": (
        lambda: beside("hadanorm_sigma", draft=blocks("nvfp4")),
        "is U8 and has blocks.0.q.hadanorm_sigma, which such a",
    ),
    # formats of others
    "bitsandbytes": (
        lambda: beside("SCB"),
        "is a bitsandbytes file .it has blocks.0.q.SCB., which diffusers with bitsandbytes can read and int8run cannot; take the float",
    ),
    "bitsandbytes 4 bits": (lambda: beside("weight.absmax"), "is a bitsandbytes file"),
    "SDNQ": (lambda: beside("svd_up"), "is a SDNQ file .*, which diffusers with sdnq can read"),
    "compressed-tensors": (
        lambda: but(bare(), lambda d: d.put("q.weight_packed", "I32", np.ones((2, 2)))),
        "is a compressed-tensors file",
    ),
    "compressed-tensors, asymmetric": (lambda: beside("weight_zero_point"), "is a compressed-tensors file"),
    "nunchaku": (lambda: raw(bare(), "q.qweight", "I8", 2, 2), "is a nunchaku file .it has q.qweight."),
    "nunchaku's header": (
        lambda: but(bare(), lambda d: d.metadata.update(quantization_config='{"method": "svdquant"}')),
        "is a nunchaku file .the header of",
    ),
    "torchao": (
        lambda: but(
            raw(bare(), "q._weight_qdata", "I8", 2, 2), lambda d: d.metadata.update(tensor_names="[]")
        ),
        "is a torchao file",
    ),
    "torchao's header": (
        lambda: but(
            raw(bare(), "q._weight_qdata_", "I8", 2, 2), lambda d: d.metadata.update(tensor_names="[]")
        ),
        "is a torchao file .the header of",
    ),
    "modelopt's quantizers": (
        lambda: beside("weight_quantizer._scale"),
        "is a modelopt file .*, which diffusers with nvidia-modelopt",
    ),
    "lightx2v nvfp4": (lambda: beside("weight_global_scale"), "is a lightx2v nvfp4 file"),
    "w4a4": (lambda: said({"format": "convrot_w4a4"}), "is a convrot_w4a4 file"),
    "w4a8": (lambda: beside("weight_s_rel"), "is a asym_w4a8_int8 file"),
    "awq": (lambda: beside("weight_zeros"), "is a awq_w4a16 file"),
    "svdquant": (lambda: beside("proj_down"), "is a svdquant_w4a4 file"),
}
