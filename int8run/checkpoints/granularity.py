"""Which numbers of a quantized weight share a scale.

The shapes of weight and scale decide; what a marker says is compared with them. `classify.py` and
`classify_int8.py` ask for the granularity of fp8 and int8 weights, `block_scaled.py` and `quip.py` check
their numbers with `check_positive`. Weights are not read here, scales are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.powers import is_power_of_2
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles
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


def read_granularity(evidence: LayerEvidence, *, may_be_transposed: bool = False) -> Granularity:
    """Infer from the shapes which numbers share a scale, and check that every scale is finite and above 0.

    Args:
        evidence: what the file says about the layer, which has a scale.
        may_be_transposed: whether the program that wrote it stores weights as [in, out] where the scale says
            so, square ones too.

    Raises:
        FileError: an unknown shape, a scale that is not a float, a block size in the marker that contradicts
            the shape.
    """
    weight, scale, marker = evidence.weight, evidence.get_part("scale"), evidence.marker
    if scale.dtype not in FLOATS:
        raise FileError(
            f"{scale.file}: {scale.key} is {scale.dtype}, and {weight.key} is {weight.dtype}; "
            f"its scales are {', '.join(FLOATS)}"
        )
    if not may_be_transposed:
        check_orientation(weight, scale, marker)
    named_block_size = find_named_block_size(evidence.files, marker)
    granularity = infer_granularity(
        weight.shape, scale.shape, is_int8=weight.dtype == "I8", block_size=named_block_size
    )
    if granularity is None:
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}, which does not fit a weight "
            f"{list(weight.shape)}; scales are {SCALE_SHAPES}, with blocks of one known size"
        )
    check_positive(evidence.files, scale.key)
    block_size = granularity.block_size
    if block_size and marker is not None and marker.block_size not in (None, block_size):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}, and {scale.key} {list(scale.shape)} "
            f"has blocks of {block_size}; they contradict each other, so the weight cannot be read"
        )
    return granularity


def check_orientation(weight: TensorInfo, scale: TensorInfo, marker: Marker | None) -> None:
    """Raise FileError for a scale [1, N] that may belong to columns as well as to rows.

    Programs that store an int8 weight as [in, out] write it so. comfy-kitchen multiplies the columns in one
    place and the rows in another, so that no file of ComfyUI has it with a meaning.
    """
    if weight.dtype != "I8" or len(weight.shape) != 2:
        return
    rows, columns = weight.shape
    if scale.shape != (1, columns) or rows == 1 or columns == 1:
        return
    if rows == columns:
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}, and {weight.key} is square: it "
            "may belong to the rows of a weight that is stored as [in, out], or to columns; write it as "
            f"[{rows}, 1], with the weight as [out, in]"
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
    sizes = read_quant_config(files).get("weight_block_size")  # [rows of a block, columns of a block]
    if not isinstance(sizes, list) or [type(size) for size in sizes] != [int, int]:
        return None
    _, columns = sizes
    if columns < 1:
        return None
    return int(columns)


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
    if prod(shape) == 1:
        return Granularity("tensor")
    n = weight[0] if weight else 1
    k = prod(weight[1:])
    one_per_row = (n, *(1 for _ in weight[1:]))
    if shape in ((n,), one_per_row):
        return Granularity("row")
    if len(weight) != 2 or 0 in (n, k, *shape):
        return None

    found = None
    if len(shape) == 3:
        found = infer_block3d((n, k), shape, block_size)
    elif len(shape) == 2:
        found = infer_blocks((n, k), shape, block_size)
    if found is None and is_int8 and shape == (1, k):
        return Granularity("transposed")
    return found


def infer_block3d(
    weight: tuple[int, int], scale: tuple[int, ...], block_size: int | None
) -> Granularity | None:
    """Groups of a row whose scales are [N, K/b, 1]; None for other shapes.

    Args:
        weight: N and K.
        scale: shape of the scales, three numbers.
        block_size: that is named somewhere; None: shapes decide.
    """
    n, k = weight
    rows, blocks_per_row, last = scale
    if rows != n or last != 1:
        return None
    size = infer_block_size([(k, blocks_per_row)], block_size)
    if size is None:
        return None
    return Granularity("block3d", size)


def infer_blocks(
    weight: tuple[int, int], scale: tuple[int, ...], block_size: int | None
) -> Granularity | None:
    """Groups of a row whose scales are [N, K/g], or square blocks of [N/b, K/b]; None for other shapes.

    Args:
        weight: N and K.
        scale: shape of the scales, two numbers.
        block_size: that is named somewhere; None: shapes decide.
    """
    n, k = weight
    block_rows, block_columns = scale
    if block_rows == n and block_columns < k:
        size = infer_block_size([(k, block_columns)], block_size)
        if size is None:
            return None
        return Granularity("group", size)
    size = infer_block_size([(n, block_rows), (k, block_columns)], block_size)
    if size is None or size <= 1:
        return None
    return Granularity("grid", size)


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
    exact = find_exact_block_size(axes)
    others = [size for size in USUAL_BLOCK_SIZES if size != exact and fits_blocks(axes, size)]
    if exact is not None and (is_power_of_2(exact) or not others):
        return exact
    if exact is None and len(others) == 1:
        return others[0]
    return None


def find_exact_block_size(axes: Sequence[tuple[int, int]]) -> int | None:
    """The size of blocks that divide a weight along every axis without a rest; None where there is none."""
    sizes = set()
    for size, count in axes:
        if size % count:
            return None
        sizes.add(size // count)
    return sizes.pop() if len(sizes) == 1 else None


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
