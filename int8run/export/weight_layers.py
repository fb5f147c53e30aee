"""What reading and writing of INT8 layers share: whose weight a key is, and what is written beside it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from int8run.checkpoints.comfy_int8 import FACTOR, WEIGHT, encode_int8_marker, is_conv_shape, sibling_key
from int8run.checkpoints.quant_metadata import MARKER
from int8run.outlier.base import OutlierTransform

Layer = TypeVar("Layer")


def find_weight_layer(layers: Mapping[str, Layer], key: str) -> Layer | None:
    """The layer whose weight a key is; None for the weight of no such layer, a bias and the like.

    Args:
        layers: by name.
        key: of a tensor.
    """
    if not key.endswith(WEIGHT):
        return None
    return layers.get(key.removesuffix(WEIGHT))


def iterate_transform_tensors(
    key: str, transform: OutlierTransform, shape: Sequence[int]
) -> Iterator[tuple[str, Tensor | bytes]]:
    """What stands once beside an INT8 weight: ComfyUI's marker, and the factors of its columns.

    Args:
        key: of the weight.
        transform: that it was quantized under.
        shape: of the weight.
    """
    yield sibling_key(key, MARKER), encode_int8_marker(transform, is_conv=is_conv_shape(shape))
    if transform.factor is not None:
        yield sibling_key(key, FACTOR), transform.factor.float().cpu().contiguous()
