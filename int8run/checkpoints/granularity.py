"""Which numbers of a quantized weight share a scale: told by shapes, checked against what a marker says."""

from collections.abc import Sequence
from math import prod

import torch

from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.errors import FileError

SCALE_DTYPES = ("F32", "F16", "BF16", "F64")
SCALE_SHAPES = "one number, [N], [N, 1], [N, K/g], [N, K/b, 1] and [N/b, K/b]"


def read_granularity(
    files: TensorFiles, info: TensorInfo, key: str, marker: Marker | None
) -> tuple[str, int]:
    """Which numbers share a scale, by the shapes, and the size of a block; every scale is finite and above 0.

    Raises:
        FileError: no known shape, a scale that is no float, a block size in the marker that contradicts the shape.
    """
    scale = files[key]
    if scale.dtype not in SCALE_DTYPES:
        raise FileError(
            f"{scale.file}: {key} is {scale.dtype}, and {info.key} is {info.dtype}; its scales are {', '.join(SCALE_DTYPES)}"
        )
    found = infer_granularity(info.shape, scale.shape, info.dtype == "I8")
    if found is None:
        raise FileError(
            f"{scale.file}: {key} has the shape {list(scale.shape)}, which no weight {list(info.shape)} has; scales are {SCALE_SHAPES}"
        )
    check_positive(files, key)
    name, block = found
    if block and marker is not None and marker.block_size not in (None, block):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}, and {key} {list(scale.shape)} has blocks of {block}; they contradict each "
            "other, nobody knows which is true"
        )
    return name, block


def infer_granularity(weight: Sequence[int], scale: Sequence[int], int8: bool) -> tuple[str, int] | None:
    """Name and block size of the scales of a weight; None for shapes that do not fit.

    | scale of a weight [N, K] | |
    |---|---|
    | one number: [], [1], [1, 1] | tensor |
    | [N], [N, 1], also where N = K | row |
    | [N, K/b, 1] | block3d |
    | [N, K/g] with 1 < g < K | group |
    | [N/b, K/b], the same b > 1 | grid |
    | [1, K], int8 | transposed: the weight is stored as [in, out] |
    """
    shape = tuple(scale)
    n, k = weight[0] if weight else 1, prod(weight[1:])
    if prod(shape) == 1:
        return "tensor", 0
    if shape in ((n,), (n, *(1 for _ in weight[1:]))):
        return "row", 0
    if len(weight) != 2 or 0 in (n, k, *shape):
        return None
    if len(shape) == 3 and shape[0] == n and shape[2] == 1 and k % shape[1] == 0:
        return "block3d", k // shape[1]
    if len(shape) != 2:
        return None
    if shape[0] == n and k % shape[1] == 0 and shape[1] < k:
        return "group", k // shape[1]
    if n % shape[0] == 0 and k % shape[1] == 0 and n // shape[0] == k // shape[1] > 1:
        return "grid", n // shape[0]
    return ("transposed", 0) if int8 and shape == (1, k) else None


def check_positive(files: TensorFiles, key: str, shape: tuple[int, ...] | None = None) -> None:
    """Refuse scales and factors that no writer makes: of another dtype or shape, not finite, or not above 0."""
    info = files[key]
    if info.dtype not in SCALE_DTYPES:
        raise FileError(f"{info.file}: {key} is {info.dtype}; it takes {', '.join(SCALE_DTYPES)}")
    if shape is not None and info.shape != shape:
        raise FileError(
            f"{info.file}: {key} has the shape {list(info.shape)}, its weight wants {list(shape)}; the file is damaged"
        )
    numbers = files.read(key).float()
    wrong = int((~(torch.isfinite(numbers) & (numbers > 0))).sum())
    if wrong:
        raise FileError(
            f"{info.file}: {wrong} of {numbers.numel()} numbers of {key} are not finite and above 0; the file is damaged"
        )
