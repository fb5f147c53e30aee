"""A second reader of quantized weights in safetensors files, in numpy and float64.

Written from the published formats alone.

Nothing of int8run is used here, and no tensor library. A file has one reading or none: where the formats
leave two open, or the file contradicts itself, `Unreadable` is raised, and a reader that returns numbers for
such a file returns noise.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from text_encoders.oracle_codes import CODE_PARTS, read_codes
from text_encoders.oracle_file import FLOATS, FP8, Tensor, need, numbers, positive
from text_encoders.oracle_markers import FORMATS, get_group_size, read_markers
from text_encoders.oracle_numbers import (
    FACTORS,
    OLD_QUIP,
    QUIP,
    Reading,
    count_blocks,
    read_fp8,
    read_int8,
    read_mxfp8,
    read_nvfp4,
)
from text_encoders.oracle_shards import read_all_files

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "scale", "weight.scale", "weight.weight_scale")
BESIDE = (
    *SCALES[:3],
    *CODE_PARTS,
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
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "word_embeddings", "wte")


def read(path: Path, prefix: str = "") -> dict[str, Reading]:
    """Every matrix of a file, and every fp8 weight, by layer; in a larger file those below a prefix.

    Args:
        path: of the file, or of the index of several.
        prefix: before the keys that are read.

    Raises:
        Unreadable
    """
    everything, metadata = read_all_files(path)
    tensors = {key: tensor for key, tensor in everything.items() if key.startswith(prefix)}
    for key, tensor in tensors.items():
        refuse_strays(tensors, key, tensor)
    need("tensor_names" not in metadata or not any("_weight_qdata" in key for key in tensors), "torchao")
    need("svdquant" not in metadata.get("quantization_config", ""), "nunchaku")
    markers = read_markers(everything, metadata)
    fields = {name: marker for name, marker in markers.items() if name.startswith(prefix)}
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    refuse_lost_parts(tensors, fields, names)
    layouts = {dtype: find_tile_layouts(tensors, fields, names, dtype) for dtype in ("U8", "F8_E4M3")}
    readings = {}
    for name in names:
        reading = read_layer(tensors, name, fields.get(name), layouts)
        if reading is not None:
            readings[name] = reading
    return readings


def refuse_strays(tensors: Mapping[str, Tensor], key: str, tensor: Tensor) -> None:
    """Refuse a tensor of another program, one without the weight that it belongs to, and stray integers."""
    layer, _, suffix = key.rpartition(".")
    need(suffix not in FOREIGN, f"{key} is another program's")
    is_own_weight = layer.endswith(".weight") and layer in tensors
    if suffix in BESIDE and not is_own_weight:
        need(f"{layer}.weight" in tensors, f"{key} without its weight")
    need(tensor.dtype != "I8" or suffix in ("weight", "weight_packed", "hadamard_quip"), f"{key} is I8")


def refuse_lost_parts(
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
        elif get_group_size(fields[name]):
            rotated = True
    need(not (unmarked and rotated), "a marker was lost")
    for key in tensors:
        if key.rpartition(".")[2] == "scaled_fp8":
            prefix = key.removesuffix("scaled_fp8")
            read_fp8 = [n for n in names if n.startswith(prefix) and tensors[f"{n}.weight"].dtype in FP8]
            has_scale = any(f"{n}.{suffix}" in tensors for n in read_fp8 for suffix in SCALES)
            need(not read_fp8 or has_scale, "the scales were lost")


def has_blocks(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a layer's scales are 8 bits wide: nvfp4 and mxfp8."""
    scale = find_scale(tensors, name)
    return scale is not None and scale.dtype in ("U8", "F8_E8M0", "F8_E4M3")


def find_tile_layouts(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], names: list[str], dtype: str
) -> set[bool]:
    """Whether the block scales lie in tiles, as far as markers and shapes of all layers of a kind say."""
    found = set()
    for name in names:
        weight, scale = tensors[f"{name}.weight"], find_scale(tensors, name)
        if weight.dtype != dtype or scale is None or not has_blocks(tensors, name):
            continue
        rows, columns = count_blocks(weight)
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


def find_scale(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The one scale of a weight. `scale` and the like are weights of norms as well."""
    keys = [f"{name}.{suffix}" for suffix in SCALES if f"{name}.{suffix}" in tensors]
    if tensors[f"{name}.weight"].dtype in FLOATS:
        keys = [key for key in keys if not key.endswith((".scale", "weight.weight_scale"))]
    need(len(keys) < 2, f"two scales of {name}")
    return tensors[keys[0]] if keys else None


def read_layer(
    tensors: Mapping[str, Tensor],
    name: str,
    fields: Mapping[str, Any] | None,
    layouts: Mapping[str, set[bool]],
) -> Reading | None:
    """One weight; None for a float that is no matrix.

    Args:
        tensors: of the file.
        name: of the layer.
        fields: of its marker; None without one.
        layouts: those of block scales that the file leaves possible, by dtype of the weight.
    """
    weight, scale = tensors[f"{name}.weight"], find_scale(tensors, name)
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
    if word == "asym_w4a8_int8":
        need(scale is None, f"{name} has int8's scale")
        return read_codes(weight, beside, known)
    need(set(CODE_PARTS).isdisjoint(beside), f"{name} has tensors of codes")
    if weight.dtype == "I8":
        return read_int8(weight, scale, beside, known)

    need(weight.dtype in (*FP8, "U8"), f"{name} is {weight.dtype}")
    need(not get_group_size(known), f"{name} is rotated and not int8")
    of_other_kinds = {*QUIP, *OLD_QUIP, *FACTORS[1:], "smooth_factors"}
    need(of_other_kinds.isdisjoint(beside), f"{name} has another kind's tensors")
    if weight.dtype == "U8":
        reading = read_nvfp4(weight, scale, beside, layouts["U8"])
    else:
        reading = read_fp8_or_mxfp8(tensors, name, fields, layouts["F8_E4M3"])
    if reading is None or "pre_quant_scale" not in beside:
        return reading
    factor = positive(beside["pre_quant_scale"], "a factor")
    need(factor.shape == (math.prod(reading.weight.shape[1:]),), "a factor's width")
    return Reading(reading.weight * factor.reshape(reading.weight.shape[1:]), reading.word, 2)


def read_fp8_or_mxfp8(
    tensors: Mapping[str, Tensor], name: str, fields: Mapping[str, Any] | None, layouts: set[bool]
) -> Reading | None:
    """A weight of 8-bit floats: mxfp8 where its scales have 8 bits, too.

    Args:
        tensors: of the file.
        name: of the layer.
        fields: of its marker; None without one.
        layouts: those of block scales that the file leaves possible.
    """
    weight, scale = tensors[f"{name}.weight"], find_scale(tensors, name)
    word = (fields or {}).get("format", "")
    need(f"{name}.weight_scale_2" not in tensors, f"{name} has two scales")
    if scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return read_mxfp8(weight, scale, layouts)
    is_mxfp8 = word in ("mxfp8", "hybrid_mxfp8") or f"{name}.weight_scalar" in tensors
    need(not is_mxfp8, f"{name} is mxfp8 and has no such scale")
    reading = read_fp8(weight, scale, word, fields)
    need(is_cast(tensors, name, scale) or not reading, "fp8 that fills its range has lost its scale")
    return reading


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
    has_scales = False
    for key, other in tensors.items():
        if key.endswith(".weight") and other.dtype in FP8:
            has_scales |= find_scale(tensors, key.removesuffix(".weight")) is not None
    return not has_scales and weight.dtype == "F8_E4M3" and name.split(".")[-1] in EMBEDDINGS
