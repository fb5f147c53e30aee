"""The blocks in which a tensor is read, quantized and written: some rows of it, a few megabytes.

`stream_quantizer` moves them. How many rows are one block depends on how the source has the tensor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import FLOAT, GGUF, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.export.stream_plan import Target
from int8run.export.weight_layers import find_weight_layer
from int8run.models.tensor_part import TensorPart

BLOCK_BYTES = 4 * 2**20  # of a weight that are read at a time


@dataclass(frozen=True)
class Block:
    """Rows of one tensor of the source, as many as are processed at a time.

    Args:
        target: that they belong to.
        key: of the tensor.
        rows: None: all of a tensor without dimensions.
        last: whether it is the last block of the target.
    """

    target: Target
    key: str
    rows: slice | None
    last: bool


def iterate_blocks(
    target: Target, files: TensorFiles, stored: Mapping[str, CheckpointLayer]
) -> Iterator[Block]:
    """The blocks of a target, in the order in which they are written."""
    spans = [span for part in target.parts for span in iterate_row_spans(part, files, stored)]
    for i, (key, rows) in enumerate(spans):
        yield Block(target, key, rows, i == len(spans) - 1)


def iterate_sample(
    target: Target, files: TensorFiles, stored: Mapping[str, CheckpointLayer], step: int
) -> Iterator[Block]:
    """Every row of a target whose number is a multiple of a step, each as a block; with a step of 1 all rows.

    Args:
        target: a matrix.
        files: the source.
        stored: the source's weights by name.
        step: from one row to the next.
    """
    if step == 1:
        yield from iterate_blocks(target, files, stored)
        return
    first = 0  # row of the target that the block begins with
    for block in iterate_blocks(target, files, stored):
        assert block.rows is not None, "a matrix has rows"
        start, stop = block.rows.start, block.rows.stop
        for row in range(start + -first % step, stop, step):
            yield replace(block, rows=slice(row, row + 1))
        first += stop - start


def iterate_row_spans(
    part: TensorPart, files: TensorFiles, stored: Mapping[str, CheckpointLayer]
) -> Iterator[tuple[str, slice | None]]:
    """The rows of one part in pieces; halves that change places come the other way round.

    Args:
        part: rows of a tensor of the source.
        files: the source.
        stored: the source's weights by name.
    """
    layer = find_weight_layer(stored, part.key)
    shape = files[part.key].shape
    if layer is not None and len(layer.shape) == 2:
        shape = (layer.rows, layer.columns)
    if not shape:
        yield part.key, None
        return
    first, end, _ = (part.rows or slice(None)).indices(shape[0])
    spans = [(first, end)]
    if part.swap_halves:
        half = end - (end - first) // 2
        spans = [(half, end), (first, half)]
    step = count_block_rows(shape, DTYPES[files[part.key].dtype].bits, layer)
    for start, stop in spans:
        for row in range(start, stop, step):
            yield part.key, slice(row, min(row + step, stop))


def count_block_rows(shape: Sequence[int], bits: int, layer: CheckpointLayer | None) -> int:
    """How many rows of a tensor are one block.

    Args:
        shape: of the tensor.
        bits: of one number in the file.
        layer: whose weight it is.
    """
    row_bytes = math.prod(shape[1:]) * max(1, bits // 8)
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    if layer is None or layer.storage_dtype in (FLOAT, GGUF):  # the bits of both are those of floats
        return rows
    # weights that are stored as [K, N], or transformed on both sides, are dequantized as a whole
    if layer.granularity == "transposed" or layer.outlier_method == "quip":
        return shape[0]
    return max(1, rows // 4)  # one byte becomes float32 on the way
