"""Which numbers of a quantized weight share a scale.

The shapes of weight and scale decide; what a marker says is compared with them. `detect.py` calls this for
int8 and fp8, `block_scaled.py` and `quip.py` check their numbers with it. Weights are not read here, scales
are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.errors import FileError

SCALE_DTYPES = ("F32", "F16", "BF16", "F64")
SCALE_SHAPES = "one number, [N], [N, 1], [N, K/g], [N, K/b, 1] and [N/b, K/b]"


@dataclass(frozen=True)
class Granularity:
    """Which numbers of a weight share a scale.

    Args:
        name: tensor, row, group (of a row), grid (square blocks), block3d (groups, by a scale with 3
            dimensions), transposed (rows of a weight that is stored as [K, N]) or block (of mxfp8 and nvfp4);
            empty: no scale.
        block_size: columns that share a scale, where a row has several; else 0.
    """

    name: str
    block_size: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.block_size}" if self.block_size else self.name


def read_granularity(
    files: TensorFiles, info: TensorInfo, scale_key: str, marker: Marker | None
) -> Granularity:
    """Infer from the shapes which numbers share a scale, and check that every scale is finite and above 0.

    Args:
        files: the checkpoint.
        info: of the weight.
        scale_key: of the scales.
        marker: of the layer, if it has one.

    Raises:
        FileError: an unknown shape, a scale that is not a float, a block size in the marker that contradicts
            the shape.
    """
    scale = files[scale_key]
    if scale.dtype not in SCALE_DTYPES:
        raise FileError(
            f"{scale.file}: {scale_key} is {scale.dtype}, and {info.key} is {info.dtype}; "
            f"its scales are {', '.join(SCALE_DTYPES)}"
        )
    granularity = infer_granularity(info.shape, scale.shape, is_int8=info.dtype == "I8")
    if granularity is None:
        raise FileError(
            f"{scale.file}: {scale_key} has the shape {list(scale.shape)}, which does not fit a weight "
            f"{list(info.shape)}; scales are {SCALE_SHAPES}"
        )
    check_positive(files, scale_key)
    block_size = granularity.block_size
    if block_size and marker is not None and marker.block_size not in (None, block_size):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}, and {scale_key} {list(scale.shape)} "
            "has blocks of "
            f"{block_size}; they contradict each other, so the weight cannot be read"
        )
    return granularity


def infer_granularity(weight: Sequence[int], scale: Sequence[int], *, is_int8: bool) -> Granularity | None:
    """Which numbers share a scale, by two shapes alone.

    | scale of a weight [N, K] | |
    |---|---|
    | one number: [], [1], [1, 1] | tensor |
    | [N], [N, 1], also where N = K | row |
    | [N, K/b, 1] | block3d |
    | [N, K/g] with 1 < g < K | group |
    | [N/b, K/b], the same b > 1 | grid |
    | [1, K], int8 | transposed: the weight is stored as [in, out] |

    Args:
        weight: shape of the weight, of any number of dimensions.
        scale: shape of the scales.
        is_int8: whether the weight is int8; only those are stored transposed.

    Returns:
        None for shapes that do not fit.
    """
    shape = tuple(scale)
    n = weight[0] if weight else 1
    k = prod(weight[1:])
    if prod(shape) == 1:
        return Granularity("tensor")
    one_per_row = (n, *(1 for _ in weight[1:]))
    if shape in ((n,), one_per_row):
        return Granularity("row")
    if len(weight) != 2 or 0 in (n, k, *shape):
        return None

    if len(shape) == 3:
        is_block3d = shape[0] == n and shape[2] == 1 and k % shape[1] == 0
        return Granularity("block3d", k // shape[1]) if is_block3d else None
    if len(shape) != 2:
        return None
    if shape[0] == n and k % shape[1] == 0 and shape[1] < k:
        return Granularity("group", k // shape[1])
    if n % shape[0] == 0 and k % shape[1] == 0 and n // shape[0] == k // shape[1] > 1:
        return Granularity("grid", n // shape[0])
    if is_int8 and shape == (1, k):
        return Granularity("transposed")
    return None


def check_positive(files: TensorFiles, key: str, shape: tuple[int, ...] | None = None) -> None:
    """Check scales or factors, which are floats above 0.

    Args:
        files: the checkpoint.
        key: of the scales or factors.
        shape: that the weight needs; None: any.

    Raises:
        FileError: another dtype or shape, or a number that is not finite or not above 0.
    """
    info = files[key]
    if info.dtype not in SCALE_DTYPES:
        raise FileError(f"{info.file}: {key} is {info.dtype}; allowed are {', '.join(SCALE_DTYPES)}")
    if shape is not None and info.shape != shape:
        raise FileError(
            f"{info.file}: {key} has the shape {list(info.shape)}, its weight needs {list(shape)}; the file "
            "is damaged"
        )
    numbers = files.read(key).float()
    is_valid = torch.isfinite(numbers) & (numbers > 0)
    n_invalid = int((~is_valid).sum())
    if n_invalid:
        raise FileError(
            f"{info.file}: {n_invalid} of {numbers.numel()} numbers of {key} are not finite and above 0; "
            "the file is damaged"
        )
