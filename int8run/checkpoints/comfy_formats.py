"""Weights in any of the formats of `quant/formats.py` as tensors of a safetensors file, by ComfyUI's names.

Beside `weight` stand `weight_scale`, of nvfp4 `weight_scale_2` too, a `comfy_quant` marker, and
`pre_quant_scale` where inputs are multiplied. A plain fp8 cast is its `weight` alone. The task that quantizes
text encoders writes by this module; `detect.py` reads the result back.
"""

import json
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import comfy_int8
from int8run.checkpoints.comfy_grouped import (
    CodeTensors,
    build_grouped_marker,
    collect_grouped_tensors,
    describe_made_codes,
    plan_grouped_entries,
)
from int8run.checkpoints.comfy_int8 import FACTOR, SCALE, sibling_key
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.quant_metadata import MARKER
from int8run.checkpoints.writer import TensorEntry
from int8run.outlier.base import OutlierTransform
from int8run.quant.formats import BLOCK, ROW, WeightFormat
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.packed_weight import PackedWeight

GLOBAL_SCALE = "weight_scale_2"
# safetensors' name of a dtype -> torch's dtype, and back
TORCH_DTYPES = {name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if dtype.torch_name}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def build_marker(
    weight_format: WeightFormat, shape: tuple[int, int], transform: OutlierTransform
) -> dict[str, object]:
    """What a reader must know about one layer besides its tensors; nothing for a plain cast.

    Args:
        weight_format: that the weight is written in.
        shape: N and K of the weight.
        transform: what was done to the weight before it was rounded.

    Raises:
        ValueError: for a format that is never written, or a rotation or centering that its marker cannot
            describe.
    """
    if weight_format.qdata_dtype == torch.int8 and weight_format.granularity == ROW:
        return comfy_int8.build_marker(transform)
    if weight_format.is_grouped:
        return build_grouped_marker(weight_format.block_size, transform)
    if weight_format.is_read_only:
        raise ValueError(f"{weight_format.name} is read and never written")
    if transform.group_size or transform.centered:
        raise ValueError(
            f"the marker of {weight_format.name} cannot describe {transform.label}; "
            "int8 with a scale for each row can have it"
        )
    marker: dict[str, object] = {}
    if weight_format.marker_format:
        marker["format"] = weight_format.marker_format
    if weight_format.block_size and weight_format.granularity != BLOCK:
        marker["group_size"] = weight_format.block_size
    if weight_format.get_padded_shape(*shape) != shape:
        marker["orig_shape"] = list(shape)
    return marker


def encode_format_marker(
    weight_format: WeightFormat, shape: tuple[int, int], transform: OutlierTransform
) -> bytes:
    """The marker as the file holds it: JSON, as a row of bytes; empty where there is none."""
    marker = build_marker(weight_format, shape, transform)
    return json.dumps(marker).encode() if marker else b""


def plan_packed_entries(
    key: str,
    weight_format: WeightFormat,
    shape: tuple[int, int],
    transform: OutlierTransform,
    codes: CodeTensors | None = None,
) -> list[TensorEntry]:
    """List the tensors that a weight adds to a file, before any of its numbers is known.

    Args:
        key: of the weight, `L.weight`.
        weight_format: that the weight is written in.
        shape: N and K of the weight.
        transform: what was done to the weight before it was rounded.
        codes: which tensors a weight of 4 or 6 bits is, that is copied; None: as int8run makes them.

    Raises:
        ValueError: as `build_marker`.
    """
    if weight_format.is_grouped:
        codes = codes or describe_made_codes(weight_format.group_layout)
        return plan_grouped_entries(key, shape, codes, transform)
    rows, columns = shape
    qdata_shape = weight_format.get_qdata_shape(rows, columns)
    scale_shape = weight_format.get_scale_shape(rows, columns)
    marker = encode_format_marker(weight_format, shape, transform)
    entries = [TensorEntry(key, SAFETENSORS_DTYPES[weight_format.qdata_dtype], qdata_shape)]
    if scale_shape is not None:
        entries.append(TensorEntry(sibling_key(key, SCALE), get_scale_dtype(weight_format), scale_shape))
    if has_global_scale(weight_format):
        entries.append(TensorEntry(sibling_key(key, GLOBAL_SCALE), "F32", ()))
    if marker:
        entries.append(TensorEntry(sibling_key(key, MARKER), "U8", (len(marker),)))
    if transform.factor is not None:
        entries.append(TensorEntry(sibling_key(key, FACTOR), "F32", (columns,)))
    return entries


def get_scale_dtype(weight_format: WeightFormat) -> str:
    """The dtype of the scales, by safetensors' name.

    mxfp8's exponents are written as bytes: older readers do not know the dtype that was made for them.
    """
    if weight_format.granularity != BLOCK:
        return "F32"
    return "F8_E4M3" if has_global_scale(weight_format) else "U8"


def has_global_scale(weight_format: WeightFormat) -> bool:
    """Whether the format is nvfp4, whose block scales are multiplied by one scale for the whole weight."""
    return weight_format.qdata_dtype == torch.uint8


def collect_tensors(
    key: str, weight: PackedWeight | GroupedWeight, weight_format: WeightFormat, transform: OutlierTransform
) -> dict[str, Tensor | bytes]:
    """Collect the numbers of the entries of `plan_packed_entries`, for `StreamWriter.write`.

    Scales that come from another file get the dtype and the shape of the format.

    Args:
        key: of the weight, `L.weight`.
        weight: N and K as in the plan.
        weight_format: that the weight is in already.
        transform: what was done to the weight before it was rounded.

    Raises:
        ValueError: as `build_marker`, or for a weight that is not in this format.
    """
    if not is_stored_as(weight_format, weight):
        raise ValueError(
            f"{key} cannot be written as {weight_format.name}: its qdata, {weight.storage_dtype} "
            f"{list(weight.shape)}, is in another format"
        )
    if isinstance(weight, GroupedWeight):
        return collect_grouped_tensors(key, weight, transform)
    numbers = {
        key: weight.qdata,
        sibling_key(key, SCALE): weight.scale,
        sibling_key(key, GLOBAL_SCALE): weight.global_scale,
        sibling_key(key, FACTOR): transform.factor,
    }
    tensors: dict[str, Tensor | bytes] = {}
    for entry in plan_packed_entries(key, weight_format, weight.shape, transform):
        tensor = numbers.get(entry.key)
        if tensor is None:
            tensors[entry.key] = encode_format_marker(weight_format, weight.shape, transform)
        elif entry.dtype == "F32":
            tensors[entry.key] = tensor.float().reshape(entry.shape)
        else:
            tensors[entry.key] = tensor.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def is_stored_as(weight_format: WeightFormat, weight: PackedWeight | GroupedWeight) -> bool:
    """Whether a weight is in a format, or needs no more than another shape or dtype of its scales to be."""
    if isinstance(weight, GroupedWeight):
        return weight.storage_dtype == weight_format.storage_dtype
    if weight.storage_dtype != weight_format.storage_dtype or weight.qdata.dtype != weight_format.qdata_dtype:
        return False
    if tuple(weight.qdata.shape) != weight_format.get_qdata_shape(*weight.shape):
        return False
    if not has_scales_of(weight_format, weight):
        return False
    if weight_format.granularity == BLOCK and not weight.is_swizzled:
        return False
    if has_global_scale(weight_format):
        return weight.high_nibble_first and weight.global_scale is not None
    return True


def has_scales_of(weight_format: WeightFormat, weight: PackedWeight) -> bool:
    """Whether a weight has as many scales as it has in a format; their shape may be another."""
    scale_shape = weight_format.get_scale_shape(*weight.shape)
    if scale_shape is None or weight.scale is None:
        return scale_shape is None and weight.scale is None
    return weight.scale.numel() == prod(scale_shape)
