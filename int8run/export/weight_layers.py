"""What reading and writing of INT8 layers share: whose weight a key is, and what is written beside it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from int8run.checkpoints.comfy_int8 import (
    CONVROT,
    FACTOR,
    WEIGHT,
    encode_int8_marker,
    is_conv_shape,
    sibling_key,
)
from int8run.checkpoints.quant_metadata import GROUPED_FORMAT, MARKER
from int8run.errors import ConfigError
from int8run.outlier.base import OutlierTransform

Layer = TypeVar("Layer")
BITS_OF_INT8 = 8


def find_weight_layer(layers: Mapping[str, Layer], key: str) -> Layer | None:
    """The layer whose weight a key is; None for the weight of no such layer, a bias and the like.

    Args:
        layers: by name.
        key: of a tensor.
    """
    if not key.endswith(WEIGHT):
        return None
    return layers.get(key.removesuffix(WEIGHT))


def check_saved_bits(bits: int | str, outlier: str) -> None:
    """Check that weights of these bits can be written, before any is made.

    Args:
        bits: `int8.bits`.
        outlier: name of the outlier method.

    Raises:
        ConfigError: for 4 or 6 bits under another method than the one that their format has.
    """
    if bits == BITS_OF_INT8 or outlier == CONVROT:
        return
    raise ConfigError(
        f"save= writes weights of int8.bits={bits} in ComfyUI's {GROUPED_FORMAT}, which is always rotated by "
        f"outlier=convrot, and outlier={outlier} is asked for; set outlier=convrot, or int8.bits=8"
    )


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
