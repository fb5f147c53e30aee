"""Which numbers of a quantized weight share a scale.

The shapes of weight and scale decide; what a marker says is compared with them. `detect.py` calls this for
int8 and fp8, `block_scaled.py` and `quip.py` check their numbers with it. Weights are not read here, scales
are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.checkpoints.unsupported import read_quant_config
from int8run.errors import FileError

SCALE_SHAPES = "one number, [N], [N, 1], [N, K/g], [N, K/b, 1] and [N/b, K/b]"
# of blocks that do not divide a weight, so that the last one of a row is smaller
USUAL_BLOCK_SIZES = (16, 32, 64, 128, 256, 512)


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
    files: TensorFiles,
    info: TensorInfo,
    scale_key: str,
    marker: Marker | None,
    *,
    may_be_transposed: bool = False,
) -> Granularity:
    """Infer from the shapes which numbers share a scale, and check that every scale is finite and above 0.

    Args:
        files: the checkpoint.
        info: of the weight.
        scale_key: of the scales.
        marker: of the layer, if it has one.
        may_be_transposed: whether the program that wrote it stores weights as [in, out] where the scale says
            so, square ones too.

    Raises:
        FileError: an unknown shape, a scale that is not a float, a block size in the marker that contradicts
            the shape.
    """
    scale = files[scale_key]
    if scale.dtype not in FLOATS:
        raise FileError(
            f"{scale.file}: {scale_key} is {scale.dtype}, and {info.key} is {info.dtype}; "
            f"its scales are {', '.join(FLOATS)}"
        )
    if not may_be_transposed:
        check_orientation(info, scale, marker)
    block_size = find_named_block_size(files, marker)
    granularity = infer_granularity(
        info.shape, scale.shape, is_int8=info.dtype == "I8", block_size=block_size
    )
    if granularity is None:
        raise FileError(
            f"{scale.file}: {scale_key} has the shape {list(scale.shape)}, which does not fit a weight "
            f"{list(info.shape)}; scales are {SCALE_SHAPES}, with blocks of one known size"
        )
    check_positive(files, scale_key)
    block_size = granularity.block_size
    if block_size and marker is not None and marker.block_size not in (None, block_size):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}, and {scale_key} {list(scale.shape)} "
            f"has blocks of {block_size}; they contradict each other, so the weight cannot be read"
        )
    return granularity


def check_orientation(info: TensorInfo, scale: TensorInfo, marker: Marker | None) -> None:
    """Raise FileError for a scale [1, N] that may belong to columns as well as to rows.

    Programs that store an int8 weight as [in, out] write it so. comfy-kitchen multiplies the columns in one
    place and the rows in another, so that no file of ComfyUI has it with a meaning.
    """
    is_row = len(info.shape) == 2 and scale.shape == (1, info.shape[1]) and info.shape[1] > 1
    if not is_row or info.dtype != "I8" or info.shape[0] == 1:
        return
    if info.shape[0] == info.shape[1]:
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}, and {info.key} is square: it may "
            "belong to the rows of a weight that is stored as [in, out], or to columns; write it as "
            f"[{info.shape[0]}, 1], with the weight as [out, in]"
        )
    if marker is not None:
        raise FileError(
            f"{marker.location} is ComfyUI's, whose weights are [out, in], and {scale.key} has the shape "
            f"{list(scale.shape)}, as of a weight that is stored as [in, out]; "
            "they contradict each other, so the weight cannot be read"
        )


def find_named_block_size(files: TensorFiles, marker: Marker | None) -> int | None:
    """The size of blocks that a marker names, else the config beside the file; None: neither does."""
    if marker is not None and marker.block_size is not None:
        return marker.block_size
    sizes = read_quant_config(files).get("weight_block_size")
    if not isinstance(sizes, list) or [type(size) for size in sizes] != [int, int] or sizes[1] < 1:
        return None
    return int(sizes[1])


def infer_granularity(
    weight: Sequence[int], scale: Sequence[int], *, is_int8: bool, block_size: int | None = None
) -> Granularity | None:
    """Which numbers share a scale, by two shapes alone.

    | scale of a weight [N, K] | |
    |---|---|
    | one number: [], [1], [1, 1] | tensor |
    | [N], [N, 1], also where N = K | row |
    | [N, K/b, 1] | block3d |
    | [N, K/g] with 1 < g < K | group |
    | [N/b, K/b], the same b > 1 | grid |
    | [1, K], int8 | transposed: the weight is stored as [in, out] |

    Blocks need not divide a weight: K/b is rounded up, and the last block is smaller.

    Args:
        weight: shape of the weight, of any number of dimensions.
        scale: shape of the scales.
        is_int8: whether the weight is int8; only those are stored transposed.
        block_size: that is named somewhere; None: shapes decide.

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
        size = infer_block_size([(k, shape[1])], block_size)
        is_block3d = shape[0] == n and shape[2] == 1 and size is not None
        return Granularity("block3d", size or 0) if is_block3d else None
    if len(shape) != 2:
        return None
    if shape[0] == n and shape[1] < k:
        size = infer_block_size([(k, shape[1])], block_size)
        return None if size is None else Granularity("group", size)
    size = infer_block_size([(n, shape[0]), (k, shape[1])], block_size)
    if size is not None and size > 1:
        return Granularity("grid", size)
    if is_int8 and shape == (1, k):
        return Granularity("transposed")
    return None


def infer_block_size(axes: Sequence[tuple[int, int]], named: int | None) -> int | None:
    """How many numbers one block has along each axis of a weight.

    Args:
        axes: of each the numbers of the weight, and the blocks that they are in.
        named: the size that is named somewhere.

    Returns:
        None where no size fits, or where it is unclear which does: 192 numbers in 2 blocks may be 96 and 96,
        or 128 and 64.
    """
    if named is not None and fits_blocks(axes, named):
        return named
    quotients = {size // count for size, count in axes if size % count == 0}
    exact = None
    if len(quotients) == 1 and all(size % count == 0 for size, count in axes):
        exact = quotients.pop()
    ragged = [size for size in USUAL_BLOCK_SIZES if fits_blocks(axes, size) and size != exact]
    is_usual = exact is not None and exact & (exact - 1) == 0
    if exact is not None and (is_usual or not ragged):
        return exact
    return ragged[0] if exact is None and len(ragged) == 1 else None


def fits_blocks(axes: Sequence[tuple[int, int]], block_size: int) -> bool:
    """Whether so many numbers fill so many blocks of a size, the last of each axis perhaps in part."""
    return all(-(-size // block_size) == count for size, count in axes)


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
    if info.dtype not in FLOATS:
        raise FileError(f"{info.file}: {key} is {info.dtype}; allowed are {', '.join(FLOATS)}")
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
