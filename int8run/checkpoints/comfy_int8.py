"""ComfyUI's INT8 format: int8 weights, each with a scale and a marker beside it, in one safetensors file.

Layers without a transform, and layers rotated by a regular Hadamard matrix, are ComfyUI's own
`int8_tensorwise`. The others, and convolutions, carry a format name of int8run, which ComfyUI refuses: it
would otherwise load them as if their weights were not transformed. `export` and the tasks that quantize files
write by this module; `detect.py` reads the result back.
"""

import json
from collections.abc import Sequence
from math import prod

from int8run.checkpoints.quant_metadata import INT8RUN_CONV_FORMAT, INT8RUN_FORMAT, MARKER
from int8run.checkpoints.writer import TensorEntry
from int8run.outlier.base import NONE, OutlierTransform

COMFY_FORMAT = "int8_tensorwise"
CONVROT = "convrot"
CONV_DIMENSIONS = (4, 5)  # of the weight of a convolution: over images, over videos
WEIGHT = ".weight"
# names of what stands beside a weight; MARKER is the third
SCALE, FACTOR = "weight_scale", "pre_quant_scale"


def build_marker(transform: OutlierTransform, *, is_conv: bool = False) -> dict[str, object]:
    """What a reader must know about one layer besides its tensors.

    Args:
        transform: what was done to the weight before it was rounded.
        is_conv: whether it is the weight of a convolution, of which only channels can be rotated.
    """
    if is_conv:
        return build_conv_marker(transform)
    if transform.method == NONE:
        return {"format": COMFY_FORMAT, "per_row": True}
    if transform.method == CONVROT:
        return {
            "format": COMFY_FORMAT,
            "convrot": True,
            "convrot_groupsize": transform.group_size,
            "per_row": True,
        }
    marker: dict[str, object] = {
        "format": INT8RUN_FORMAT,
        "outlier": transform.method,
        "settings": transform.settings,
    }
    if transform.group_size:
        marker["rotation"] = name_rotation(transform)
        marker["group_size"] = transform.group_size
    marker["centered"] = transform.centered
    marker["factor"] = transform.factor is not None
    return marker


def build_conv_marker(transform: OutlierTransform) -> dict[str, object]:
    """The same of a convolution; without a rotation it says nothing of a method."""
    marker: dict[str, object] = {"format": INT8RUN_CONV_FORMAT, "per_row": True}
    if transform.group_size:
        marker["outlier"] = transform.method
        marker["settings"] = transform.settings
        marker["rotation"] = name_rotation(transform)
        marker["group_size"] = transform.group_size
    return marker


def name_rotation(transform: OutlierTransform) -> str:
    """The word for the construction of a transform's matrix."""
    return "sylvester" if transform.sylvester else "regular"


def encode_int8_marker(transform: OutlierTransform, *, is_conv: bool = False) -> bytes:
    """The marker as the file holds it: JSON, as a row of bytes. Arguments as `build_marker` takes them."""
    return json.dumps(build_marker(transform, is_conv=is_conv)).encode()


def is_conv_shape(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is that of a convolution that INT8 has: over images or videos."""
    return len(shape) in CONV_DIMENSIONS


def sibling_key(key: str, suffix: str) -> str:
    """The key of a tensor beside a weight: `L.weight` and `weight_scale` give `L.weight_scale`."""
    return f"{key.removesuffix(WEIGHT)}.{suffix}"


def plan_int8_entries(key: str, shape: tuple[int, ...], transform: OutlierTransform) -> list[TensorEntry]:
    """List the tensors that an INT8 weight adds to a file.

    Args:
        key: of the weight, `L.weight`.
        shape: N and K of the weight, or [N, C / groups, *kernel].
        transform: what was done to it before it was rounded.

    Returns:
        Integers of that shape, a scale for each row [N, 1], the marker, and the factors of the columns [K]
        where it has some.
    """
    marker = encode_int8_marker(transform, is_conv=is_conv_shape(shape))
    rows, columns = shape[0], prod(shape[1:])
    entries = [
        TensorEntry(key, "I8", shape),
        TensorEntry(sibling_key(key, SCALE), "F32", (rows, 1)),
        TensorEntry(sibling_key(key, MARKER), "U8", (len(marker),)),
    ]
    if transform.factor is not None:
        entries.append(TensorEntry(sibling_key(key, FACTOR), "F32", (columns,)))
    return entries
