"""What the numbers of a quantized weight come to: scales and codes that are finite, and whose product is not.

A damaged scale is often a large number and rarely none at all. Each layer whose largest scale could make a
row overflow is read, row by row; others need only their scales.
"""

from collections.abc import Mapping

import torch

from int8run.checkpoints.block_formats import MXFP8, NVFP4
from int8run.checkpoints.grouped import CORRECTION, ROW_SCALE
from int8run.checkpoints.layer import INT8, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.quant.grouped_weight import W4A8, W6A8

LARGEST_SUM = float(torch.finfo(torch.float32).max)
# the largest number of half precision: inputs are not larger in any model that runs in it
LARGEST_INPUT = 65504.0
# storage dtype or, of fp8, dtype in the file -> the largest number without its scale
LARGEST_CODES = {
    INT8: 128.0,
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    NVFP4: 6.0,
    MXFP8: 448.0,
    W4A8: 127.0,
    W6A8: 127.0,
}
ROWS = 256  # that are read at a time


def check_products(files: TensorFiles, layers: Mapping[str, CheckpointLayer]) -> None:
    """Check that every layer with scales can be computed in float32.

    A row of N numbers up to w gives sums up to N w x for inputs up to x. They overflow where
    N w 65504 > 3.4e38: for 4,096 inputs, with numbers above 1e30, where the weights of models are below 1e4.

    Args:
        files: the checkpoint.
        layers: its weights by name.

    Raises:
        FileError: naming the first layer that cannot.
    """
    for layer in layers.values():
        if not layer.granularity:
            continue
        factor = find_largest_factor(files, layer)
        limit = LARGEST_SUM / LARGEST_INPUT / max(layer.columns, 1) / factor
        if find_largest_scale(files, layer) * get_largest_code(files, layer) > limit:
            check_rows(files, layer, limit)


def get_largest_code(files: TensorFiles, layer: CheckpointLayer) -> float:
    """The largest number that a layer's dtype holds without its scale."""
    return LARGEST_CODES.get(layer.storage_dtype) or LARGEST_CODES[files[layer.key].dtype]


def find_largest_scale(files: TensorFiles, layer: CheckpointLayer) -> float:
    """The largest scale of a layer, or an upper bound of it."""
    if layer.is_grouped:
        return find_largest_row_scale(files, layer)
    scale = files.read(layer.part_keys["scale"])
    if layer.storage_dtype == NVFP4:  # scales of blocks are e4m3, and one for the whole weight
        return 448.0 * float(files.read(layer.part_keys["global"]).double().max())
    if layer.storage_dtype == MXFP8:  # powers of 2
        return 2.0 ** (int(scale.view(torch.uint8).max()) - 127)
    return float(scale.double().max()) if scale.numel() else 0.0


def find_largest_row_scale(files: TensorFiles, layer: CheckpointLayer) -> float:
    """The largest scale of the int8 numbers that codes decode to, its share of the correction included."""
    largest = float(files.read(layer.part_keys[ROW_SCALE]).double().max())
    if CORRECTION not in layer.part_keys:
        return largest
    correction = files.read(layer.part_keys[CORRECTION]).double().abs().max()
    return largest + float(correction) / LARGEST_CODES[layer.storage_dtype]


def find_largest_factor(files: TensorFiles, layer: CheckpointLayer) -> float:
    """By how much the factors of a layer's columns can enlarge a number of its weight or of its input."""
    largest = 1.0
    for part in ("factor", "sigma"):
        if part in layer.part_keys:
            factors = files.read(layer.part_keys[part]).double()
            largest *= max(1.0, float(factors.max()), float(1 / factors.min()))
    return largest


def check_rows(files: TensorFiles, layer: CheckpointLayer, limit: float) -> None:
    """Raise FileError for a row of a layer with a number above a limit, or an infinite one."""
    key = layer.part_keys[ROW_SCALE if layer.is_grouped else "scale"]
    for start in range(0, layer.rows, ROWS):
        rows = slice(start, min(start + ROWS, layer.rows))
        if layer.granularity == "transposed":
            scaled = layer.read_weight(files, rows)
        else:
            scaled = layer.read_scaled_rows(files, rows.start, rows.stop)
        largest = scaled.abs().amax(dim=1)
        too_large = ~(largest <= limit)
        if bool(too_large.any()):
            row = int(too_large.nonzero()[0])
            raise FileError(
                f"{files[key].file}: {layer.name} has numbers up to {float(largest[row]):.3g} in row "
                f"{start + row}, by {key}; products with them overflow (allowed are {limit:.3g}), so the "
                "file is damaged"
            )
