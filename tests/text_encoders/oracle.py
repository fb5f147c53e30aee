"""A second reader of quantized weights in safetensors files, in numpy and float64.

Written from the published formats alone.

Nothing of int8run is used here, and no tensor library. A file has one reading or none: where the formats
leave two open, or the file contradicts itself, `Unreadable` is raised, and a reader that returns numbers for
such a file returns noise.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "scale", "weight.scale", "weight.weight_scale")
FACTORS = ("pre_quant_scale", "hadanorm_sigma", "quarot_hadamard")
QUIP = ("hadamard_quip", "hadamard_size_out", "hadamard_size_in", "sign_row", "sign_col")
OLD_QUIP = ("quip_s_u", "quip_s_v")
BESIDE = (
    *SCALES[:3],
    *FACTORS,
    *QUIP,
    *OLD_QUIP,
    "weight_scale_2",
    "weight_scalar",
    "comfy_quant",
    "smooth_factors",
)
FOREIGN = (
    "SCB",
    "weight_format",
    "absmax",
    "quant_map",
    "qweight",
    "wscales",
    "_weight_qdata",
    "weight_zero_point",
    "weight_global_scale",
    "weight_s_rel",
    "weight_s_channel",
    "weight_zeros",
    "weight_zero",
    "weight_proj_down",
    "proj_down",
    "smooth_factor",
    "zero_point",
    "svd_up",
    "svd_down",
    "scale_2",
)
# format of a marker -> the dtypes that its weight may have
FORMATS = {
    **dict.fromkeys(("int8_tensorwise", "int8_axiswise", "int8_blockwise"), ("I8",)),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), FP8),
    **dict.fromkeys((f"float8_e4m3fn_{x}" for x in ("rowwise", "blockwise", "block3d")), FP8),
    **dict.fromkeys(("mxfp8", "hybrid_mxfp8"), ("F8_E4M3",)),
    "nvfp4": ("U8",),
}
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "word_embeddings", "wte")
CODES = {
    0: "float8_e4m3fn",
    1: "float8_e4m3fn_rowwise",
    2: "float8_e4m3fn_blockwise",
    3: "float8_e4m3fn_block3d",
    10: "int8_blockwise",
}
TURNED = "rows of a weight that is stored as [in, out]"
WORDS = ("float8_e5m2", *(f"float8_e4m3fn{x}" for x in ("", "_rowwise", "_blockwise", "_block3d")))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


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


@dataclass(frozen=True)
class Reading:
    """A weight.

    Args:
        weight: float64 [N, K] with the file's padding.
        word: of the format, as settings call it; empty where they have none.
        products: factors of each number that are rounded one after the other in float32; 1: a reader is exact
            to the last bit.
    """

    weight: Array
    word: str
    products: int = 1


# the container


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that keeps the container's rules."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    need(len(raw) >= 8 and 2 <= length <= len(raw) - 8, "the header's length")
    try:
        header = json.loads(raw[8 : 8 + length], object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Unreadable("the header is no JSON") from error
    need(isinstance(header, dict), "the header is no object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    need(isinstance(metadata, dict), "metadata")
    need(not any(isinstance(value, dict | list) for value in metadata.values()), "metadata")
    metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
    found, data, end = {}, raw[8 + length :], 0
    for entry in header.values():
        need(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry), "an entry")
        need(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES, "a dtype")
        need(
            whole(entry["shape"]) and whole(entry["data_offsets"]) and len(entry["data_offsets"]) == 2,
            "a shape or offsets",
        )
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        need(start == end and stop >= start, f"offsets of {key}")
        need(DTYPES[entry["dtype"]][0] * math.prod(entry["shape"]) == 8 * (stop - start), f"bytes of {key}")
        found[key], end = Tensor(entry["dtype"], tuple(entry["shape"]), data[start:stop]), stop
    need(end == len(data), "bytes at the end")
    return found, metadata


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    need(len(dict(pairs)) == len(pairs), "a key twice")
    return dict(pairs)


def whole(numbers: object) -> bool:
    """Whether these are sizes."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def need(true: object, what: str) -> None:
    """Raise Unreadable unless it is true."""
    if not true:
        raise Unreadable(what)


# numbers


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
        values = TABLES[tensor.dtype][stored]
    else:
        single = (stored.astype("<u4") << 16).view("<f4") if tensor.dtype == "BF16" else stored
        with np.errstate(invalid="ignore"):
            values = single.astype(np.float64)
    return values.reshape(tensor.shape)


def positive(tensor: Tensor, what: str) -> Array:
    """Scales: floats, finite and above 0, also as float32, in which everybody multiplies."""
    need(tensor.dtype in FLOATS, f"{what} is {tensor.dtype}")
    values = numbers(tensor)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    need(np.isfinite(single).all() and (single > 0).all(), f"{what} is not finite and above 0")
    return single.astype(np.float64)


def hadamard(size: int, sylvester: bool) -> Array:
    """Orthonormal; regular of a power of 4, or Sylvester's."""
    base = np.array([[1, 1], [1, -1]]) if sylvester else 1 - 2 * np.eye(4)[::-1]
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, base)
    need(len(matrix) == size, f"a Hadamard matrix of {size}")
    return matrix / size**0.5


def rows_of(buffer: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """Block scales out of cuBLAS's tiles of 128 x 4, in which four rows of 32 lie beside each other."""
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = buffer.reshape(high, wide, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(128 * high, 4 * wide)[:rows, :columns]


# what the file says


def json_object(text: bytes) -> dict[str, Any]:
    """An object, with doubled braces and zeros at its end if need be."""
    text = text.strip(b"\0 \t\r\n")
    if text[:2] == b"{{" and text[-2:] == b"}}":
        text = text[1:-1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {text[:40]!r}") from error
    need(isinstance(found, dict), "no JSON object")
    return found


def flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a marker, those in `params` among them."""
    inner = found.get("params")
    return {
        **(inner if isinstance(inner, dict) else {}),
        **{key: value for key, value in found.items() if key != "params"},
    }


def marker_fields(tensor: Tensor) -> dict[str, Any]:
    """JSON, or in early files a byte."""
    need(tensor.dtype == "U8" and len(tensor.shape) == 1 and tensor.data, "a marker's bytes")
    if b"{" not in tensor.data and tensor.data[0] in CODES:
        return {"format": CODES[tensor.data[0]]}
    return flat(json_object(tensor.data))


def said(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Fields by layer: the header's, and of what it does not mention the marker's."""
    found = {
        key.removesuffix(".comfy_quant"): marker_fields(t)
        for key, t in tensors.items()
        if key.endswith(".comfy_quant")
    }
    if "_quantization_metadata" in metadata:
        layers = json_object(metadata["_quantization_metadata"].encode(errors="surrogatepass")).get(
            "layers", {}
        )
        need(
            isinstance(layers, dict) and all(isinstance(x, dict) for x in layers.values()),
            "the header's layers",
        )
        for name, entry in layers.items():
            need(f"{name}.weight" in tensors, f"the header describes {name}")
            header, marker = flat(entry), found.get(name, {})
            need(not clash(header, marker), f"header and marker of {name}")
            found[name] = {**marker, **header}
            if any(fields.get(flag) is True for fields in (header, marker) for flag in ("convrot", "quarot")):
                found[name]["convrot"] = True
    for name, fields in found.items():
        check_fields(name, fields)
    return found


def clash(header: Mapping[str, Any], marker: Mapping[str, Any]) -> bool:
    """Whether two carriers name different groups."""
    names = ("convrot_groupsize", "quarot_groupsize")
    return any(key in header and key in marker and header[key] != marker[key] for key in names)


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse fields of kinds that no writer makes."""
    need(
        all(isinstance(fields.get(key, False), bool) for key in ("convrot", "quarot", "per_row")),
        f"flags of {name}",
    )
    need(fields.get("format", "") in ("", *FORMATS), f"format of {name}")
    need(fields.get("num_experts") is None, f"experts of {name}")


def group_of(fields: Mapping[str, Any]) -> int:
    """Columns that were rotated together; 0: none."""
    if not (fields.get("convrot") or fields.get("quarot")):
        return 0
    sizes = {
        json.dumps(fields[key]) for key in ("convrot_groupsize", "quarot_groupsize") if key in fields
    } or {"256"}
    need(len(sizes) == 1, "two groups")
    size = json.loads(sizes.pop())
    need(type(size) is int and size >= 2 and size & (size - 1) == 0, f"groups of {size}")
    return size


# layers


def read(path: Path, prefix: str = "") -> dict[str, Reading]:
    """Every matrix of a file, and every fp8 weight, by layer; in a larger file those below a prefix.

    Raises:
        Unreadable
    """
    tensors, metadata = tensors_of(path)
    everything, tensors = tensors, {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    for key, tensor in tensors.items():
        refuse_strays(tensors, key, tensor)
    need("tensor_names" not in metadata or not any("_weight_qdata" in key for key in tensors), "torchao")
    need("svdquant" not in metadata.get("quantization_config", ""), "nunchaku")
    fields = {name: told for name, told in said(everything, metadata).items() if name.startswith(prefix)}
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    refuse_lost(tensors, fields, names)
    swizzled = {dtype: told_layout(tensors, fields, names, dtype) for dtype in ("U8", "F8_E4M3")}
    found = {name: reading_of(tensors, name, fields.get(name), swizzled) for name in names}
    return {name: reading for name, reading in found.items() if reading is not None}


def refuse_strays(tensors: Mapping[str, Tensor], key: str, tensor: Tensor) -> None:
    """Refuse a tensor of another program, one without the weight that it belongs to, and stray integers."""
    layer, _, suffix = key.rpartition(".")
    need(suffix not in FOREIGN, f"{key} is another program's")
    is_own_weight = layer.endswith(".weight") and layer in tensors
    if suffix in BESIDE and not is_own_weight:
        need(f"{layer}.weight" in tensors, f"{key} without its weight")
    need(tensor.dtype != "I8" or suffix in ("weight", "weight_packed", "hadamard_quip"), f"{key} is I8")


def refuse_lost(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Mapping[str, Any]], names: list[str]
) -> None:
    """Refuse files that lost markers or scales of some layers."""
    unmarked = False
    rotated = False
    for name in names:
        if tensors[f"{name}.weight"].dtype != "I8":
            continue
        if name not in fields:
            unmarked = True
        elif group_of(fields[name]):
            rotated = True
    need(not (unmarked and rotated), "a marker was lost")
    for key in tensors:
        if key.rpartition(".")[2] == "scaled_fp8":
            prefix = key.removesuffix("scaled_fp8")
            fp8 = [n for n in names if n.startswith(prefix) and tensors[f"{n}.weight"].dtype in FP8]
            has_scale = any(f"{n}.{suffix}" in tensors for n in fp8 for suffix in SCALES)
            need(not fp8 or has_scale, "the scales were lost")


def blocks_of(weight: Tensor) -> tuple[int, int]:
    """Rows and blocks of a row, of nvfp4 and mxfp8."""
    need(len(weight.shape) == 2 and math.prod(weight.shape), "a weight with blocks is a matrix")
    rows, columns = weight.shape
    return rows, -(-2 * columns // 16) if weight.dtype == "U8" else -(-columns // 32)


def has_blocks(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a layer's scales are 8 bits wide: nvfp4 and mxfp8."""
    scale = scale_of(tensors, name)
    return scale is not None and scale.dtype in ("U8", "F8_E8M0", "F8_E4M3")


def told_layout(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], names: list[str], dtype: str
) -> set[bool]:
    """Whether the block scales lie in tiles, as far as markers and shapes of all layers of a kind say."""
    found = set()
    for name in names:
        weight, scale = tensors[f"{name}.weight"], scale_of(tensors, name)
        if weight.dtype != dtype or scale is None or not has_blocks(tensors, name):
            continue
        rows, columns = blocks_of(weight)
        tiles = scale.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
        plain = scale.shape == (rows, columns)
        need(tiles or plain, f"the shape of the scales of {name}")
        if name in fields and fields[name].get("format") in ("nvfp4", "mxfp8", "hybrid_mxfp8"):
            need(tiles, f"{name} has ComfyUI's marker and scales in rows")
            found.add(True)
        elif tiles != plain:
            found.add(tiles)
    need(len(found) < 2, "two layouts of block scales in one file")
    return found


def scale_of(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The one scale of a weight. `scale` and the like are weights of norms as well."""
    keys = [f"{name}.{suffix}" for suffix in SCALES if f"{name}.{suffix}" in tensors]
    if tensors[f"{name}.weight"].dtype in FLOATS:
        keys = [key for key in keys if not key.endswith((".scale", "weight.weight_scale"))]
    need(len(keys) < 2, f"two scales of {name}")
    return tensors[keys[0]] if keys else None


def reading_of(
    tensors: Mapping[str, Tensor],
    name: str,
    fields: Mapping[str, Any] | None,
    swizzled: Mapping[str, set[bool]],
) -> Reading | None:
    """One weight; None for a float that is no matrix.

    Args:
        tensors: of the file.
        name: of the layer.
        fields: of its marker; None without one.
        swizzled: layouts of block scales that the file leaves possible, by dtype of the weight.
    """
    weight, scale = tensors[f"{name}.weight"], scale_of(tensors, name)
    beside = {suffix: tensors[f"{name}.{suffix}"] for suffix in BESIDE if f"{name}.{suffix}" in tensors}
    if weight.dtype in FLOATS:
        has_others = bool(set(beside) - set(SCALES))
        need(fields is None and not has_others, f"{name} is a float and has a quantized weight's tensors")
        need(scale is None or (positive(scale, name) == 1).all(), f"{name} is a float and has a scale")
        return Reading(numbers(weight), "") if len(weight.shape) == 2 else None
    known = fields or {}
    word = known.get("format", "")
    need(not word or weight.dtype in FORMATS[word], f"{name} has another kind's marker")
    need(fields is None or word or weight.dtype == "I8", f"{name}'s marker names no format")
    if weight.dtype == "I8":
        return int8(weight, scale, beside, known)

    need(weight.dtype in (*FP8, "U8"), f"{name} is {weight.dtype}")
    need(not group_of(known), f"{name} is rotated and not int8")
    of_other_kinds = {*QUIP, *OLD_QUIP, *FACTORS[1:], "smooth_factors"}
    need(of_other_kinds.isdisjoint(beside), f"{name} has another kind's tensors")
    if weight.dtype == "U8":
        reading = nvfp4(weight, scale, beside, swizzled["U8"])
    else:
        reading = fp8_or_mxfp8(tensors, name, fields, swizzled["F8_E4M3"])
    if reading is None or "pre_quant_scale" not in beside:
        return reading
    factor = positive(beside["pre_quant_scale"], "a factor")
    need(factor.shape == (math.prod(reading.weight.shape[1:]),), "a factor's width")
    return Reading(reading.weight * factor.reshape(reading.weight.shape[1:]), reading.word, 2)


def fp8_or_mxfp8(
    tensors: Mapping[str, Tensor], name: str, fields: Mapping[str, Any] | None, swizzled: set[bool]
) -> Reading | None:
    """A weight of 8-bit floats: mxfp8 where its scales have 8 bits, too.

    Args:
        tensors: of the file.
        name: of the layer.
        fields: of its marker; None without one.
        swizzled: layouts of block scales that the file leaves possible.
    """
    weight, scale = tensors[f"{name}.weight"], scale_of(tensors, name)
    word = (fields or {}).get("format", "")
    need(f"{name}.weight_scale_2" not in tensors, f"{name} has two scales")
    if scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return mxfp8(weight, scale, swizzled)
    is_mxfp8 = word in ("mxfp8", "hybrid_mxfp8") or f"{name}.weight_scalar" in tensors
    need(not is_mxfp8, f"{name} is mxfp8 and has no such scale")
    reading = fp8(weight, scale, word, fields)
    need(is_cast(tensors, name, scale) or not reading, "fp8 that fills its range has lost its scale")
    return reading


def int8(
    weight: Tensor, scale: Tensor | None, beside: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Reading:
    """Rows, groups, blocks, rotated or not, and what other programs make of them.

    Args:
        weight: I8 [N, K].
        scale: its scale.
        beside: tensors of the layer by suffix.
        fields: of its marker; empty without one.
    """
    is_matrix = len(weight.shape) == 2 and math.prod(weight.shape) > 0
    need(scale is not None and is_matrix, "an int8 weight is a matrix and has a scale")
    need({"weight_scale_2", "weight_scalar"}.isdisjoint(beside), "an int8 weight with a second scale")
    real, word = scaled(numbers(weight), positive(scale, "a scale"), "int8", fields or None)
    if set(beside) & {*QUIP, *OLD_QUIP}:
        need(not group_of(fields) and not set(beside) & set(FACTORS), "transformed twice")
        return Reading(unquip(real, beside), "", 99)

    group, sylvester = rotation_of(beside, fields)
    if group:
        real = rotate(real, group, sylvester)
        is_convrot = word in ("int8_rowwise", "int8_tensorwise") and not sylvester
        word = "int8_convrot" if is_convrot else ""
    need(not ({"pre_quant_scale"} < {*beside} & {*FACTORS}), "two kinds of factors")
    for part, power in (("pre_quant_scale", 1), ("hadanorm_sigma", -1)):
        if part in beside:
            factor = positive(beside[part], "a factor")
            need(factor.shape == (real.shape[1],), "a factor's width")
            real = real * factor**power
    if word == TURNED:
        word = "int8_rowwise"
    if "hadanorm_sigma" in beside:  # ComfyUI has no name for a centered layer
        word = ""
    products = 99 if group else 1 + len(set(beside) & set(FACTORS))
    return Reading(real, word, products)


def rotation_of(beside: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[int, bool]:
    """Columns that were rotated together, 0 for none; and whether by Sylvester's matrix.

    Args:
        beside: tensors of the layer by suffix; the matrix may be among them.
        fields: of its marker.
    """
    group = group_of(fields)
    if "quarot_hadamard" not in beside:
        # a power of 4 is rotated by the regular matrix
        is_power_of_4 = group.bit_length() % 2 == 1
        return group, group > 0 and not is_power_of_4
    need(not group, "rotated twice")
    matrix = numbers(beside["quarot_hadamard"])
    size = len(matrix) if matrix.ndim == 2 else 0
    need(matrix.shape == (size, size) and size & (size - 1) == 0 and size > 1, "a matrix")
    tolerance = 0.02 / size**0.5
    if np.allclose(matrix, hadamard(size, sylvester=True), atol=tolerance):
        return size, True
    has_regular = size.bit_length() % 2 == 1
    need(
        has_regular and np.allclose(matrix, hadamard(size, sylvester=False), atol=tolerance),
        "a Hadamard matrix",
    )
    return size, False


def rotate(real: Array, group: int, sylvester: bool) -> Array:
    """Groups of columns, each times the matrix, which is its own inverse."""
    need(real.shape[1] % group == 0, f"groups of {group}")
    matrix = hadamard(group, sylvester)
    starts = range(0, real.shape[1], group)
    return np.concatenate([real[:, start : start + group] @ matrix for start in starts], axis=1)


def unquip(real: Array, beside: Mapping[str, Tensor]) -> Array:
    """QuIP undone: by signs and Sylvester's matrices, or in the older form by vectors or matrices."""
    new, old = set(beside) & set(QUIP), set(beside) & set(OLD_QUIP)
    need((len(new) == len(QUIP) and not old) or (len(old) == 2 and not new), "a part of QuIP is missing")
    if new:
        real = undo_signs(real, beside)
    else:
        real = undo_matrices(real, *(numbers(beside[part]) for part in OLD_QUIP))
    if "smooth_factors" in beside:
        factors = positive(beside["smooth_factors"], "a factor")
        need(factors.ndim == 1 and len(factors) <= real.shape[1], "a factor's width")
        real = real[:, : len(factors)] / factors
    return real


def undo_signs(real: Array, beside: Mapping[str, Tensor]) -> Array:
    """QuIP by signs and Sylvester's matrices of both sides."""
    n, k = real.shape
    sizes = [numbers(beside[part]).tolist() for part in QUIP[1:3]]
    need(sizes == [n, k], "QuIP's sizes")
    row_signs, column_signs = (numbers(beside[part]) for part in QUIP[3:])
    has_shapes = row_signs.shape == (n,) and column_signs.shape == (k,)
    need(has_shapes and (abs(row_signs) == 1).all() and (abs(column_signs) == 1).all(), "QuIP's signs")
    rotated = hadamard(n, sylvester=True) @ real @ hadamard(k, sylvester=True)
    return row_signs[:, None] * rotated * column_signs


def undo_matrices(real: Array, u: Array, v: Array) -> Array:
    """QuIP in its older form: by a vector or a matrix on each side."""
    n, k = real.shape
    has_shapes = u.shape in ((n,), (n, n)) and v.shape in ((k,), (k, k))
    need(has_shapes and np.isfinite(u).all() and np.isfinite(v).all(), "QuIP's u and v")
    real = u[:, None] * real if u.ndim == 1 else u @ real
    return real * v if v.ndim == 1 else real @ v.T


def size_of_blocks(axes: list[tuple[int, int]], named: int | None) -> int:
    """The one size of blocks that fills these numbers of blocks, the last ones perhaps in part."""

    def fits(size: int) -> bool:
        return all(math.ceil(numbers / size) == count for numbers, count in axes)

    if named and named == named and fits(named):  # not NaN
        return named
    usual = [2**power for power in range(4, 10) if fits(2**power)]
    exact = {numbers // count if numbers % count == 0 else 0 for numbers, count in axes}
    if len(exact) == 1 and min(exact):
        (size,) = exact
        need(size.bit_count() == 1 or not usual, "blocks of two possible sizes")
        return size
    need(len(usual) == 1, "a scale's shape")
    return usual[0]


def scaled(
    codes: Array, scale: Array, kind: str, fields: Mapping[str, Any] | None = None
) -> tuple[Array, str]:
    """Codes times scales, told apart by the shapes of the two, and the format's word."""
    n, k = codes.shape
    named = (fields or {}).get("group_size")
    need(named is None or isinstance(named, int | float), "a size of groups that is no number")
    if scale.size == 1:
        return codes * scale.item(), f"{kind}_tensorwise" if kind == "int8" else kind
    if scale.shape in ((n,), (n, 1)):
        return codes * scale.reshape(n, 1), f"{kind}_rowwise"
    need(0 not in scale.shape, "a scale of no numbers")
    if scale.ndim == 3 and scale.shape[::2] == (n, 1):
        size = size_of_blocks([(k, scale.shape[1])], named)
        return codes * np.repeat(scale[:, :, 0], size, axis=1)[:, :k], f"{kind}_block3d"
    need(scale.ndim == 2, "a scale's shape")
    a, b = scale.shape
    if kind == "int8" and (a, b) == (1, k):  # stored as [in, out]
        need(n == 1 or (n != k and fields is None), "a scale of rows or of columns")
        return (codes * scale).T, TURNED
    if a == n and b < k:
        return codes * np.repeat(scale, size_of_blocks([(k, b)], named), axis=1)[:, :k], ""
    size = size_of_blocks([(n, a), (k, b)], named)
    need(size > 1, "a scale's shape")
    spread = np.repeat(np.repeat(scale, size, axis=0), size, axis=1)
    return codes * spread[:n, :k], f"{kind}_blockwise"


def fp8(weight: Tensor, scale: Tensor | None, word: str, fields: Mapping[str, Any] | None) -> Reading | None:
    """A plain cast, or times a scale. Weights of convolutions and norms are read as matrices by rows."""
    if not weight.shape:
        return None
    kind = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[weight.dtype]
    codes = numbers(weight)
    if scale is None:
        need(not word, "a scale was lost")
        return Reading(codes, f"{kind}_cast")
    if codes.ndim == 2:
        real, found = scaled(codes, positive(scale, "a scale"), kind, fields)
    else:
        values, ones = positive(scale, "a scale"), (1,) * (codes.ndim - 1)
        need(
            values.size == 1 or values.shape in (codes.shape[:1], (*codes.shape[:1], *ones)),
            "a scale of no matrix",
        )
        real = codes * (values.reshape(-1, *ones) if values.size > 1 else values.item())
        found = kind if values.size == 1 else f"{kind}_rowwise"
    return Reading(real, found if found in WORDS else "")


def is_cast(tensors: Mapping[str, Tensor], name: str, scale: Tensor | None) -> bool:
    """Whether fp8 numbers without a scale, or with a scale of 1, may be those of real weights.

    Of a table of words in a file without scales anything may be.
    """
    weight = tensors[f"{name}.weight"]
    if len(weight.shape) < 2 or (scale is not None and not (numbers(scale) == 1).all()):
        return True
    codes = numbers(weight)
    if (abs(codes[np.isfinite(codes)]) <= 224).all():
        return True
    others = [
        key.removesuffix(".weight")
        for key, other in tensors.items()
        if key.endswith(".weight") and other.dtype in FP8
    ]
    has_scales = any(scale_of(tensors, other) is not None for other in others)
    return not has_scales and weight.dtype == "F8_E4M3" and name.split(".")[-1] in EMBEDDINGS


def mxfp8(weight: Tensor, scale: Tensor, swizzled: set[bool]) -> Reading:
    """A power of 2 for 32 numbers of a row."""
    rows, columns = blocks_of(weight)
    need(weight.dtype == "F8_E4M3" and len(swizzled) == 1, "mxfp8 of an unknown layout")
    exponents = np.frombuffer(scale.data, "u1")
    tiles = True in swizzled
    exponents = rows_of(exponents, rows, columns) if tiles else exponents.reshape(rows, columns)
    need((exponents != 255).all(), "an exponent that is NaN")
    spread = np.repeat(2.0 ** (exponents - 127.0), 32, axis=1)[:, : weight.shape[1]]
    return Reading(numbers(weight) * spread, "mxfp8" if tiles else "mxfp8_rows")


def nvfp4(weight: Tensor, scale: Tensor | None, beside: Mapping[str, Tensor], swizzled: set[bool]) -> Reading:
    """Codes of 4 bits, a scale of 8 bits for 16 numbers of a row, and one for all."""
    need(
        scale is not None and "weight_scale_2" in beside and beside["weight_scale_2"].one,
        "nvfp4 has two scales",
    )
    need("weight_scalar" not in beside and scale.dtype in ("U8", "F8_E4M3"), "nvfp4 has other scales")
    rows, columns = blocks_of(weight)
    need(len(swizzled) == 1, "nvfp4 of an unknown flavour")
    tiles = True in swizzled
    stored = np.frombuffer(scale.data, "u1")
    stored = rows_of(stored, rows, columns) if tiles else stored.reshape(rows, columns)
    blocks = TABLES["F8_E4M3"][stored]
    need(np.isfinite(blocks).all() and (blocks >= 0).all(), "a block's scale")
    packed = np.frombuffer(weight.data, "u1").reshape(weight.shape)
    halves = (packed >> 4, packed & 15) if tiles else (packed & 15, packed >> 4)
    codes = np.stack(halves, axis=-1).reshape(rows, -1)
    spread = np.repeat(blocks, 16, axis=1)[:, : codes.shape[1]]
    total = positive(beside["weight_scale_2"], "the second scale").item()
    return Reading(E2M1[codes] * spread * total, "nvfp4" if tiles else "nvfp4_modelopt")
