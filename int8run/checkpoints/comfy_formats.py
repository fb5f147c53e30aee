"""Weights in any of the formats of `quant/formats.py` as tensors of a safetensors file, by ComfyUI's names.

Beside `weight` lie `weight_scale`, of nvfp4 `weight_scale_2` too, a `comfy_quant` marker, and `pre_quant_scale` where inputs are
multiplied. A plain fp8 cast is its `weight` alone.
"""

import json
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import comfy_int8
from int8run.checkpoints.comfy_int8 import FACTOR, MARKER, SCALE, beside
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.writer import Entry
from int8run.outlier.base import OutlierTransform
from int8run.quant.formats import BLOCK, ROW, Format
from int8run.quant.packed_weight import CodedWeight

GLOBAL_SCALE = "weight_scale_2"
TORCH = {
    word: getattr(torch, name) for word, (_, name) in DTYPES.items() if name
}  # safetensors' word -> torch's dtype
WORDS = {dtype: word for word, dtype in TORCH.items()}


def marker(form: Format, shape: tuple[int, int], transform: OutlierTransform) -> dict[str, object]:
    """What a reader must know of one layer besides its tensors; of a plain cast, nothing.

    Args:
        shape: N and K of the weight.

    Raises:
        ValueError: for a format that is never written, or a rotation or centering that no marker of the format can tell.
    """
    if form.codes == torch.int8 and form.granularity == ROW:
        return comfy_int8.marker(transform)
    if form.read_only:
        raise ValueError(f"{form.name} is read and never written")
    if transform.group_size or transform.centered:
        raise ValueError(
            f"no marker of {form.name} can tell of {transform.label}; int8 with a scale for each row can have it"
        )
    found: dict[str, object] = {"format": form.marker} if form.marker else {}
    if form.block and form.granularity != BLOCK:
        found["group_size"] = form.block
    if form.padded_shape(*shape) != shape:
        found["orig_shape"] = list(shape)
    return found


def marker_bytes(form: Format, shape: tuple[int, int], transform: OutlierTransform) -> bytes:
    """A marker as it stands in the file; empty where there is none."""
    found = marker(form, shape, transform)
    return json.dumps(found).encode() if found else b""


def coded_entries(key: str, form: Format, shape: tuple[int, int], transform: OutlierTransform) -> list[Entry]:
    """What a weight adds to a file, before any of its numbers is known.

    Args:
        key: of the weight, `L.weight`.
        shape: N and K of the weight.

    Raises:
        ValueError: as `marker`.
    """
    scale, said = form.scale_shape(*shape), marker_bytes(form, shape, transform)
    found: list[Entry] = [(key, WORDS[form.codes], form.codes_shape(*shape))]
    if scale is not None:
        found.append((beside(key, SCALE), scale_word(form), scale))
    if form.codes == torch.uint8:
        found.append((beside(key, GLOBAL_SCALE), "F32", ()))
    if said:
        found.append((beside(key, MARKER), "U8", (len(said),)))
    if transform.factor is not None:
        found.append((beside(key, FACTOR), "F32", (shape[1],)))
    return found


def scale_word(form: Format) -> str:
    """The dtype of the scales. mxfp8's exponents are bytes: older readers do not know the dtype that is theirs."""
    if form.granularity != BLOCK:
        return "F32"
    return "F8_E4M3" if form.codes == torch.uint8 else "U8"


def coded_tensors(
    key: str, weight: CodedWeight, form: Format, transform: OutlierTransform
) -> dict[str, Tensor | bytes]:
    """The same with the numbers, under the same keys, for `StreamWriter.write`. Scales out of files get the format's dtype and shape.

    Raises:
        ValueError: as `marker`, or for a weight that is not in this format.
    """
    if not is_in(form, weight):
        raise ValueError(
            f"{key} cannot be written as {form.name}: its codes, {weight.kind} {list(weight.qdata.shape)}, are in another format"
        )
    numbers = {
        key: weight.qdata,
        beside(key, SCALE): weight.scale,
        beside(key, GLOBAL_SCALE): weight.global_scale,
        beside(key, FACTOR): transform.factor,
    }
    found: dict[str, Tensor | bytes] = {}
    for name, word, shape in coded_entries(key, form, weight.shape, transform):
        tensor = numbers.get(name)
        if tensor is None:
            found[name] = marker_bytes(form, weight.shape, transform)
        else:
            found[name] = (tensor.float() if word == "F32" else tensor.view(TORCH[word])).reshape(shape)
    return found


def is_in(form: Format, weight: CodedWeight) -> bool:
    """Whether a weight is in a format, or needs no more than another shape or dtype of its scales to be."""
    codes = (weight.kind, weight.qdata.dtype, tuple(weight.qdata.shape))
    scale = form.scale_shape(*weight.shape)
    return (
        codes == (form.kind, form.codes, form.codes_shape(*weight.shape))
        and (None if weight.scale is None else weight.scale.numel())
        == (None if scale is None else prod(scale))
        and (form.granularity != BLOCK or weight.swizzled)
        and (form.codes != torch.uint8 or (weight.high_first and weight.global_scale is not None))
    )
