"""mxfp8 and nvfp4: weights whose blocks of a row share a small scale, checked and read from a file.

`classify.py` checks layers with this module, `layer.py` reads their numbers. Of nvfp4, ComfyUI keeps the even
columns in the high half of a byte, ModelOpt in the low half; in which order the scales stand is found out by
`block_layout.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.checkpoints.block_formats import (
    BLOCK_FORMATS,
    FORMATS_BY_NAME,
    SWIZZLED_NAMES,
    TILE_ROWS,
    BlockFormat,
)
from int8run.checkpoints.block_layout import find_layouts
from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.kernels.dequantize.reference import compute_swizzled_offsets
from int8run.quant.packed_weight import PackedWeight, round_up

MINUS_ZERO = 0x80  # in e4m3


@dataclass(frozen=True)
class LogicalShape:
    """The shape of a weight without padding.

    Args:
        rows: N.
        columns: K.
        declared: whether the file says what N, and K, are. Where it does not, the size here is the padded
            one, and the model's may be smaller.
    """

    rows: int
    columns: int
    declared: tuple[bool, bool]


def check_block_scaled(evidence: LayerEvidence, storage_dtype: str) -> LogicalShape:
    """Check a weight and what stands beside it, except for the numbers of the block scales.

    These are left to `check_block_scales`, when the order in which they stand is known.

    Args:
        evidence: what the file says about the layer.
        storage_dtype: mxfp8 or nvfp4.

    Returns:
        The weight's shape without padding.

    Raises:
        FileError: dtypes or shapes that do not go together, a tensor that is missing, or a marker, a bias or
            a factor for another weight.
    """
    check_required_parts(evidence, storage_dtype)
    check_weight(evidence.weight, storage_dtype)
    if evidence.marker is not None:
        check_marker(evidence.marker, storage_dtype)
    check_scale_dtype(evidence.get_part("scale"), storage_dtype)
    find_layouts(evidence.weight, evidence.get_part("scale"), storage_dtype)
    if evidence.has_part("global"):
        check_global_scale(evidence)
    return infer_logical_shape(evidence, storage_dtype)


def check_required_parts(evidence: LayerEvidence, storage_dtype: str) -> None:
    """Raise FileError for a scale that a weight needs and that is not there."""
    weight = evidence.weight
    for part, suffix in BLOCK_FORMATS[storage_dtype].required_parts.items():
        if not evidence.has_part(part):
            raise FileError(
                f"{weight.file}: {weight.key} is {weight.dtype} and has no {evidence.name}.{suffix}; "
                f"int8run reads such weights of {storage_dtype}, which needs it"
            )


def check_weight(info: TensorInfo, storage_dtype: str) -> None:
    """Raise FileError for a weight of another dtype or shape than the format has."""
    block_format = BLOCK_FORMATS[storage_dtype]
    is_matrix = len(info.shape) == 2 and 0 not in info.shape
    has_whole_blocks = is_matrix and block_format.count_columns(info) % block_format.block_size == 0
    if info.dtype == block_format.qdata_dtype and has_whole_blocks:
        return
    shape = "[N, K / 2]" if block_format.values_per_byte == 2 else "[N, K]"
    raise FileError(
        f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}; weights in {storage_dtype} are "
        f"{block_format.qdata_dtype} {shape}, K a multiple of {block_format.block_size}"
    )


def check_marker(marker: Marker, storage_dtype: str) -> None:
    """Raise FileError for a marker that says what a weight in this format cannot be."""
    block_size = BLOCK_FORMATS[storage_dtype].block_size
    if marker.rotation_group_size():
        raise FileError(
            f"{marker.location} says that a weight in {storage_dtype} is rotated; int8run does not know "
            "such a format"
        )
    if marker.block_size not in (None, block_size):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}; {storage_dtype} has blocks of "
            f"{block_size}"
        )


def check_scale_dtype(scale: TensorInfo, storage_dtype: str) -> None:
    """Raise FileError for block scales in a dtype that the format does not have."""
    allowed = BLOCK_FORMATS[storage_dtype].scale_dtypes
    if scale.dtype not in allowed:
        raise FileError(
            f"{scale.file}: {scale.key} is {scale.dtype}; the scales of {storage_dtype} are "
            f"{' or '.join(allowed)}"
        )


def check_global_scale(evidence: LayerEvidence) -> None:
    """Raise FileError unless the scale of the whole weight is one number, finite and above 0."""
    scale = evidence.get_part("global")
    if scale.shape not in ((), (1,), (1, 1)):
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}; it is one number for the whole "
            "weight"
        )
    check_positive(evidence.files, scale.key)


def infer_logical_shape(evidence: LayerEvidence, storage_dtype: str) -> LogicalShape:
    """Find N and K without padding.

    The marker says them, else the bias has N numbers and the factor K, else they are the padded sizes.

    Args:
        evidence: what the file says about the layer.
        storage_dtype: mxfp8 or nvfp4.

    Raises:
        FileError: where the weight is not padded from what is said.
    """
    block_format = BLOCK_FORMATS[storage_dtype]
    weight, marker = evidence.weight, evidence.marker
    if marker is not None and marker.fields.get("orig_shape") is not None:
        return parse_original_shape(marker, weight, block_format)

    rows, columns = block_format.get_padded_shape(weight)
    bias_key = f"{evidence.name}.bias"
    has_bias = bias_key in evidence.files
    if has_bias:
        rows = infer_size(evidence.files[bias_key], weight, block_format, axis=0)
    factor = evidence.find_part("factor")
    if factor is not None:
        columns = infer_size(factor, weight, block_format, axis=1)
    return LogicalShape(rows, columns, declared=(has_bias, factor is not None))


def parse_original_shape(marker: Marker, weight: TensorInfo, block_format: BlockFormat) -> LogicalShape:
    """The shape without padding that a marker names.

    Args:
        marker: with an `orig_shape`.
        weight: as it is in the file.
        block_format: of the weight.

    Raises:
        FileError: it is not a shape, or the weight is not padded from it.
    """
    original = marker.fields["orig_shape"]
    padded = block_format.get_padded_shape(weight)
    is_pair = isinstance(original, list) and [type(size) for size in original] == [int, int]
    if not is_pair or not is_padded_from(tuple(original), padded, block_format.padding_multiple):
        raise FileError(
            f"{marker.location} names the shape {str(original)[:80]}, and {weight.key} has {list(padded)}, "
            "which is not padded from it"
        )
    rows, columns = original
    return LogicalShape(rows, columns, declared=(True, True))


def infer_size(vector: TensorInfo, weight: TensorInfo, block_format: BlockFormat, *, axis: int) -> int:
    """N or K of a weight without padding, by a bias or a factor that has as many numbers.

    Args:
        vector: the bias or the factor.
        weight: that it belongs to.
        block_format: of the weight.
        axis: 0: N, 1: K.

    Raises:
        FileError: where the weight is not padded from it.
    """
    padded = block_format.get_padded_shape(weight)
    is_vector = len(vector.shape) == 1
    if not is_vector or not is_padded_from(vector.shape, (padded[axis],), block_format.padding_multiple):
        raise FileError(
            f"{vector.file}: {vector.key} has the shape {list(vector.shape)}, and {weight.key} has "
            f"{list(padded)}, which is not padded from it"
        )
    return vector.shape[0]


def is_padded_from(shape: tuple[int, ...], padded: tuple[int, ...], multiple: int) -> bool:
    """Whether sizes are padded to others, or are the same."""
    return all(
        size <= padded_size and padded_size in (size, round_up(size, multiple))
        for size, padded_size in zip(shape, padded, strict=True)
    )


def check_block_scales(files: TensorFiles, info: TensorInfo, format_name: str, scale_key: str) -> None:
    """Raise FileError for block scales that are NaN or negative.

    Zero is allowed, and so is any number that only fills up a tile.

    Args:
        files: the checkpoint.
        info: of the weight.
        format_name: of the layer.
        scale_key: of the block scales.
    """
    block_format = FORMATS_BY_NAME[format_name]
    scale = files.read(scale_key).view(torch.uint8)
    if int(scale.max()) < block_format.first_invalid_byte:
        return
    if format_name in SWIZZLED_NAMES:
        blocks_per_row = block_format.count_columns(info) // block_format.block_size
        scale = scale.flatten()[compute_swizzled_offsets(info.shape[0], blocks_per_row)]
    is_invalid = (scale >= block_format.first_invalid_byte) & (scale != MINUS_ZERO)
    n_invalid = int(is_invalid.sum())
    if n_invalid:
        raise FileError(
            f"{info.file}: {n_invalid} of {scale.numel()} numbers of {scale_key} are NaN or negative; "
            "the file is damaged"
        )


def read_packed_weight(
    files: TensorFiles, key: str, format_name: str, keys: Mapping[str, str], shape: tuple[int, int]
) -> PackedWeight:
    """Read a weight as it lies in the file.

    Args:
        files: the checkpoint.
        key: of the weight.
        format_name: of the layer.
        keys: what for -> key, of the tensors beside the weight.
        shape: N and K without padding.
    """
    is_comfy = format_name in SWIZZLED_NAMES
    return PackedWeight(
        qdata=files.read(key),
        scale=files.read(keys["scale"]),
        shape=shape,
        global_scale=read_global_scale(files, keys),
        is_swizzled=is_comfy,
        high_nibble_first=is_comfy,
    )


def read_packed_rows(
    files: TensorFiles, key: str, format_name: str, keys: Mapping[str, str], rows: tuple[int, int]
) -> PackedWeight:
    """Read some rows of a weight with all columns of the file; the scales come in rows.

    Of scales in tiles, only the tiles that hold these rows are read.

    Args:
        files: the checkpoint.
        key: of the weight.
        format_name: of the layer.
        keys: what for -> key, of the tensors beside the weight.
        rows: the first, and the one after the last.
    """
    block_format = FORMATS_BY_NAME[format_name]
    is_comfy = format_name in SWIZZLED_NAMES
    start, stop = rows
    columns = block_format.count_columns(files[key])
    if is_comfy:
        blocks_per_row = columns // block_format.block_size
        scale = read_swizzled_rows(files, keys["scale"], start, stop, blocks_per_row)
    else:
        scale = files.read(keys["scale"], slice(start, stop))
    return PackedWeight(
        qdata=files.read(key, slice(start, stop)),
        scale=scale,
        shape=(stop - start, columns),
        global_scale=read_global_scale(files, keys),
        is_swizzled=False,
        high_nibble_first=is_comfy,
    )


def read_swizzled_rows(
    files: TensorFiles, scale_key: str, start: int, stop: int, blocks_per_row: int
) -> Tensor:
    """Read the block scales of some rows out of tiles.

    Args:
        files: the checkpoint.
        scale_key: of the scales.
        start: the first row.
        stop: the row after the last.
        blocks_per_row: without the blocks that fill up a tile.

    Returns:
        [stop - start, blocks_per_row], in the dtype of the file.
    """
    tile_start = start // TILE_ROWS * TILE_ROWS
    tiles = files.read(scale_key, slice(tile_start, round_up(stop, TILE_ROWS)))
    offsets = compute_swizzled_offsets(stop - tile_start, blocks_per_row)  # [stop - tile_start, blocks]
    requested = offsets[start - tile_start :]  # [rows, blocks]
    # as bytes: not every torch can index floats of 8 bits
    return tiles.view(torch.uint8).flatten()[requested].view(tiles.dtype)


def read_global_scale(files: TensorFiles, keys: Mapping[str, str]) -> Tensor | None:
    """The scale of the whole weight, float32 []; None in formats without one."""
    if "global" not in keys:
        return None
    return files.read(keys["global"]).float().reshape(())
