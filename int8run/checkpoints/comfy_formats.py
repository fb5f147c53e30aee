"""Weights in any of the formats of `quant/formats.py` as tensors of a safetensors file, by ComfyUI's names.

Beside `weight` lie `weight_scale`, of nvfp4 `weight_scale_2` too, a `comfy_quant` marker, and `pre_quant_scale` where inputs are
multiplied. A plain fp8 cast is its `weight` alone.
"""

import json
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import comfy_int8
from int8run.checkpoints.comfy_int8 import FACTOR, MARKER, SCALE, sibling_key
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.writer import TensorEntry
from int8run.outlier.base import OutlierTransform
from int8run.quant.formats import BLOCK, ROW, WeightFormat
from int8run.quant.packed_weight import PackedWeight

GLOBAL_SCALE = "weight_scale_2"
TORCH_DTYPES = {
    word: getattr(torch, name) for word, (_, name) in DTYPES.items() if name
}  # safetensors' word -> torch's dtype
SAFETENSORS_DTYPES = {dtype: word for word, dtype in TORCH_DTYPES.items()}


def build_marker(
    form: WeightFormat, shape: tuple[int, int], transform: OutlierTransform
) -> dict[str, object]:
    """What a reader must know of one layer besides its tensors; of a plain cast, nothing.

    Args:
        shape: N and K of the weight.

    Raises:
        ValueError: for a format that is never written, or a rotation or centering that no marker of the format can tell.
    """
    if form.qdata_dtype == torch.int8 and form.granularity == ROW:
        return comfy_int8.build_marker(transform)
    if form.is_read_only:
        raise ValueError(f"{form.name} is read and never written")
    if transform.group_size or transform.centered:
        raise ValueError(
            f"no marker of {form.name} can tell of {transform.label}; int8 with a scale for each row can have it"
        )
    found: dict[str, object] = {"format": form.marker_format} if form.marker_format else {}
    if form.block_size and form.granularity != BLOCK:
        found["group_size"] = form.block_size
    if form.padded_shape(*shape) != shape:
        found["orig_shape"] = list(shape)
    return found


def encode_marker(form: WeightFormat, shape: tuple[int, int], transform: OutlierTransform) -> bytes:
    """A marker as it stands in the file; empty where there is none."""
    found = build_marker(form, shape, transform)
    return json.dumps(found).encode() if found else b""


def plan_packed_entries(
    key: str, form: WeightFormat, shape: tuple[int, int], transform: OutlierTransform
) -> list[TensorEntry]:
    """What a weight adds to a file, before any of its numbers is known.

    Args:
        key: of the weight, `L.weight`.
        shape: N and K of the weight.

    Raises:
        ValueError: as `marker`.
    """
    scale, said = form.scale_shape(*shape), encode_marker(form, shape, transform)
    found: list[TensorEntry] = [(key, SAFETENSORS_DTYPES[form.qdata_dtype], form.qdata_shape(*shape))]
    if scale is not None:
        found.append((sibling_key(key, SCALE), get_scale_dtype(form), scale))
    if form.qdata_dtype == torch.uint8:
        found.append((sibling_key(key, GLOBAL_SCALE), "F32", ()))
    if said:
        found.append((sibling_key(key, MARKER), "U8", (len(said),)))
    if transform.factor is not None:
        found.append((sibling_key(key, FACTOR), "F32", (shape[1],)))
    return found


def get_scale_dtype(form: WeightFormat) -> str:
    """The dtype of the scales. mxfp8's exponents are bytes: older readers do not know the dtype that is theirs."""
    if form.granularity != BLOCK:
        return "F32"
    return "F8_E4M3" if form.qdata_dtype == torch.uint8 else "U8"


def collect_tensors(
    key: str, weight: PackedWeight, form: WeightFormat, transform: OutlierTransform
) -> dict[str, Tensor | bytes]:
    """The same with the numbers, under the same keys, for `StreamWriter.write`. Scales out of files get the format's dtype and shape.

    Raises:
        ValueError: as `marker`, or for a weight that is not in this format.
    """
    if not is_stored_as(form, weight):
        raise ValueError(
            f"{key} cannot be written as {form.name}: its codes, {weight.storage_dtype} {list(weight.qdata.shape)}, are in another format"
        )
    numbers = {
        key: weight.qdata,
        sibling_key(key, SCALE): weight.scale,
        sibling_key(key, GLOBAL_SCALE): weight.global_scale,
        sibling_key(key, FACTOR): transform.factor,
    }
    found: dict[str, Tensor | bytes] = {}
    for name, word, shape in plan_packed_entries(key, form, weight.shape, transform):
        tensor = numbers.get(name)
        if tensor is None:
            found[name] = encode_marker(form, weight.shape, transform)
        else:
            found[name] = (tensor.float() if word == "F32" else tensor.view(TORCH_DTYPES[word])).reshape(
                shape
            )
    return found


def is_stored_as(form: WeightFormat, weight: PackedWeight) -> bool:
    """Whether a weight is in a format, or needs no more than another shape or dtype of its scales to be."""
    codes = (weight.storage_dtype, weight.qdata.dtype, tuple(weight.qdata.shape))
    scale = form.scale_shape(*weight.shape)
    return (
        codes == (form.storage_dtype, form.qdata_dtype, form.qdata_shape(*weight.shape))
        and (None if weight.scale is None else weight.scale.numel())
        == (None if scale is None else prod(scale))
        and (form.granularity != BLOCK or weight.is_swizzled)
        and (
            form.qdata_dtype != torch.uint8 or (weight.high_nibble_first and weight.global_scale is not None)
        )
    )
