"""The widths of the layers that a LoRA file changes, as far as the shapes in its header tell.

`base_model.py` compares them with those of the models that it knows. No tensor is read here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from int8run.lora.build_oft import OFT_PARTS
from int8run.lora.key_parsing import DENOISER, KOHYA_OFT_PARTS, parse_key


class LayerSize(NamedTuple):
    """The size of a layer as far as a file tells; None: not known."""

    in_features: int | None
    out_features: int | None


def read_layer_sizes(header: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerSize]:
    """Sizes of the denoiser's layers in a file, by module name with every `.` as `_`."""
    shapes: dict[str, dict[str, Sequence[Any]]] = {}
    for key, entry in header.items():
        component, name, part, _ = parse_key(key)
        if component == DENOISER:
            shapes.setdefault(name.replace(".", "_"), {})[part or ""] = entry["shape"]
    return {name: infer_layer_size(shapes_by_part) for name, shapes_by_part in shapes.items()}


def infer_layer_size(shapes: Mapping[str, Sequence[Any]]) -> LayerSize:
    """The size of the layer that an adapter belongs to, by the parts that its type has.

    With a Tucker core (`hada_t1`, `lokr_t2`) the left factors of a LoHa or LoKr are stored transposed, and
    nothing is inferred from them.

    Args:
        shapes: part of the adapter -> its shape, as the header says.
    """
    is_lora = "down" in shapes or "up" in shapes
    is_loha = "hada_w1_a" in shapes and "hada_t1" not in shapes
    is_lokr = "lokr_t2" not in shapes and any(part.startswith("lokr_") for part in shapes)
    is_oft = not shapes.keys().isdisjoint(OFT_PARTS)

    if is_lora:
        return infer_size(shapes, right="down", left="up")
    if is_loha:
        return infer_size(shapes, right="hada_w1_b", left="hada_w1_a")
    if is_lokr:
        return infer_lokr_size(shapes)
    if is_oft:
        return infer_oft_size(shapes)
    if "diff" in shapes:
        return infer_size(shapes, right="diff", left="diff")
    return infer_size(shapes, right="weight", left="weight")


def infer_size(shapes: Mapping[str, Sequence[Any]], *, right: str, left: str) -> LayerSize:
    """The size of the product of two factors: inputs [r, K] of the right one, outputs [N, r] of the left."""
    return LayerSize(in_features=get_dim(shapes, right, 1), out_features=get_dim(shapes, left, 0))


def infer_oft_size(shapes: Mapping[str, Sequence[Any]]) -> LayerSize:
    """The size of the layer that an OFT or BOFT rotates: its rows, or by PEFT its inputs."""
    row_parts = [part for part in ("oft_blocks", *KOHYA_OFT_PARTS) if part in shapes]
    rows = [get_rotated_features(shapes, part) for part in row_parts]
    known_rows = [count for count in rows if count is not None]
    if not rows:
        out_features = get_dim(shapes, "boft_s", 0)
    elif len(known_rows) == len(rows):
        out_features = sum(known_rows)
    else:
        out_features = None
    return LayerSize(in_features=get_rotated_features(shapes, "boft_R"), out_features=out_features)


def get_rotated_features(shapes: Mapping[str, Sequence[Any]], part: str) -> int | None:
    """Blocks times block size of `[..., blocks, b, b]`; None where the file has no such part."""
    shape = shapes.get(part, ())
    if len(shape) < 3:
        return None
    num_blocks, block_size = shape[-3], shape[-1]
    if type(num_blocks) is not int or type(block_size) is not int:
        return None
    return num_blocks * block_size


def infer_lokr_size(shapes: Mapping[str, Sequence[Any]]) -> LayerSize:
    """The size of the layer that a LoKr belongs to: the product of its factors' sizes, whole or low-rank."""
    inputs, outputs = [], []
    for factor in ("lokr_w1", "lokr_w2"):
        whole = infer_size(shapes, right=factor, left=factor)
        low_rank = infer_size(shapes, right=f"{factor}_b", left=f"{factor}_a")
        inputs.append(whole.in_features or low_rank.in_features)
        outputs.append(whole.out_features or low_rank.out_features)
    return LayerSize(multiply_if_known(inputs), multiply_if_known(outputs))


def get_dim(shapes: Mapping[str, Sequence[Any]], part: str, dim: int) -> int | None:
    """One dimension of a part; None where the file has no such part, or its shape is not one of a matrix."""
    shape = shapes.get(part, ())
    if len(shape) < 2:
        return None
    size = shape[dim]
    return size if type(size) is int else None


def multiply_if_known(factors: Sequence[int | None]) -> int | None:
    """The product; None where a factor is not known."""
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        return None
    return math.prod(known)
