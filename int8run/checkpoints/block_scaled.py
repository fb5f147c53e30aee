"""mxfp8 and nvfp4: weights whose blocks of a row share a small scale. Where those scales lie, and what the weight's real shape is.

ComfyUI keeps the scales in cuBLAS's tiles, and of nvfp4 the even columns in the high half of a byte; ModelOpt keeps the scales in rows
and the even columns in the low half. Where N is a multiple of 128 and the blocks of a row are one of 4, no shape tells which it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.checkpoints.unsupported import is_modelopt
from int8run.errors import FileError
from int8run.kernels.dequantize.reference import MXFP8_BLOCK, NVFP4_BLOCK, compute_swizzled_offsets
from int8run.quant.formats import SCALE_TILE
from int8run.quant.packed_weight import PackedWeight, round_up

NVFP4, MXFP8 = "nvfp4", "mxfp8"
TILE_ROWS, TILE_COLUMNS = SCALE_TILE


@dataclass(frozen=True)
class BlockFormat:
    """What all weights of a kind have in common.

    Args:
        dtype: of the codes in the file, of which a byte holds `packed`.
        scales: dtypes of the scales.
        first_wrong: the first byte that is no scale: from there on they are NaN or negative.
        block: numbers of a row that share one.
        multiple: what N and K are padded to.
        tiles, rows: the words for a layer whose scales lie so.
    """

    qdata_dtype: str
    values_per_byte: int
    scale_dtypes: tuple[str, ...]
    first_invalid_byte: int
    block_size: int
    padding_multiple: int
    swizzled_name: str
    row_major_name: str

    def count_columns(self, info: TensorInfo) -> int:
        """K of a weight, with its padding."""
        return info.shape[1] * self.values_per_byte


BLOCK_FORMATS = {
    NVFP4: BlockFormat("U8", 2, ("F8_E4M3", "U8"), 0x7F, NVFP4_BLOCK, 16, "nvfp4", "nvfp4_modelopt"),
    MXFP8: BlockFormat("F8_E4M3", 1, ("U8", "F8_E8M0"), 0xFF, MXFP8_BLOCK, 32, "mxfp8", "mxfp8_rows"),
}
MINUS_ZERO = 0x80  # in e4m3
FORMATS_BY_NAME = {
    word: kind for kind in BLOCK_FORMATS.values() for word in (kind.swizzled_name, kind.row_major_name)
}
SWIZZLED_FORMATS = {kind.swizzled_name for kind in BLOCK_FORMATS.values()}
# what a file must have beside the codes
REQUIRED_PARTS = {
    NVFP4: {"scale": "weight_scale", "global": "weight_scale_2"},
    MXFP8: {"scale": "weight_scale"},
}


class LogicalShape(NamedTuple):
    """N and K, and which of them the file tells; of the other the model's may be smaller, by the padding."""

    rows: int
    columns: int
    declared: tuple[bool, bool]


class BlockScaledLayer(Protocol):
    """What is asked of a layer, see `CheckpointLayer`."""

    @property
    def key(self) -> str: ...
    @property
    def part_keys(self) -> Mapping[str, str]: ...


def check_block_scaled(
    files: TensorFiles, info: TensorInfo, name: str, kind: str, keys: Mapping[str, str], marker: Marker | None
) -> LogicalShape:
    """Refuse what no writer makes; the block scales' numbers are left to `check_scales`.

    Returns:
        The weight's shape.

    Raises:
        FileError: dtypes or shapes that do not go together, a tensor that is missing, or a marker, a bias or a factor for another weight.
    """
    of = BLOCK_FORMATS[kind]
    for part, suffix in REQUIRED_PARTS[kind].items():
        if part not in keys:
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype} and has no {name}.{suffix}; int8run reads such weights of {kind}, where it says "
                "what the numbers mean"
            )
    if (
        info.dtype != of.qdata_dtype
        or len(info.shape) != 2
        or 0 in info.shape
        or of.count_columns(info) % of.block_size
    ):
        shape = "[N, K / 2]" if of.values_per_byte == 2 else "[N, K]"
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}; weights in {kind} are {of.qdata_dtype} {shape}, K a multiple of "
            f"{of.block_size}"
        )
    if marker is not None and marker.rotation_group_size():
        raise FileError(
            f"{marker.location} says that a weight in {kind} is rotated; int8run knows no such format"
        )
    if marker is not None and marker.block_size not in (None, of.block_size):
        raise FileError(
            f"{marker.location} names blocks of {marker.block_size}; {kind} has blocks of {of.block_size}"
        )
    scale = files[keys["scale"]]
    if scale.dtype not in of.scale_dtypes:
        raise FileError(
            f"{scale.file}: {scale.key} is {scale.dtype}; the scales of {kind} are {' or '.join(of.scale_dtypes)}"
        )
    find_layouts(files, info, kind, scale)
    if "global" in keys:
        one = files[keys["global"]]
        if one.shape not in ((), (1,), (1, 1)):
            raise FileError(
                f"{one.file}: {one.key} has the shape {list(one.shape)}; it is one number for the whole weight"
            )
        check_positive(files, one.key)
    return infer_logical_shape(files, info, name, of, keys, marker)


def find_layouts(files: TensorFiles, info: TensorInfo, kind: str, scale: TensorInfo) -> list[bool]:
    """Whether block scales can lie in tiles, by the shapes: [True], [False], or both.

    Raises:
        FileError: they fit neither way.
    """
    of = BLOCK_FORMATS[kind]
    rows = info.shape[0], of.count_columns(info) // of.block_size
    tiles = round_up(rows[0], TILE_ROWS), round_up(rows[1], TILE_COLUMNS)
    found = [way for way, shape in ((True, tiles), (False, rows)) if scale.shape == shape]
    if not found:
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}; of {info.key} {list(info.shape)} in {kind} it is "
            f"{list(tiles)} in tiles, {list(rows)} in rows"
        )
    return found


def infer_logical_shape(
    files: TensorFiles,
    info: TensorInfo,
    name: str,
    of: BlockFormat,
    keys: Mapping[str, str],
    marker: Marker | None,
) -> LogicalShape:
    """What the marker says, else of N what the bias and of K what the factor says, else the padded shape.

    Raises:
        FileError: where the codes are not padded from what is said.
    """
    padded = info.shape[0], of.count_columns(info)
    said = None if marker is None else marker.fields.get("orig_shape")
    if marker is not None and said is not None:
        whole = isinstance(said, list) and len(said) == 2 and all(type(size) is int for size in said)
        if not whole or not is_padded_from((said[0], said[1]), padded, of.padding_multiple):
            raise FileError(
                f"{marker.location} names the shape {str(said)[:80]}, and {info.key} has {list(padded)}, which is not padded from it"
            )
        return LogicalShape(said[0], said[1], (True, True))
    sizes = list(padded)
    for axis, key in enumerate((f"{name}.bias", keys.get("factor", ""))):
        if key in files:
            count = files[key].shape
            if len(count) != 1 or not is_padded_from(count, (padded[axis],), of.padding_multiple):
                raise FileError(
                    f"{files[key].file}: {key} has the shape {list(count)}, and {info.key} has {list(padded)}, which is not padded from it"
                )
            sizes[axis] = count[0]
    return LogicalShape(sizes[0], sizes[1], (f"{name}.bias" in files, "factor" in keys))


def is_padded_from(shape: tuple[int, ...], padded: tuple[int, ...], multiple: int) -> bool:
    """Whether sizes are padded to others, or are the same."""
    return all(
        size <= whole and whole in (size, round_up(size, multiple))
        for size, whole in zip(shape, padded, strict=True)
    )


def resolve_format_name(
    files: TensorFiles,
    kind: str,
    layers: Mapping[str, BlockScaledLayer],
    marked: Mapping[str, Marker],
    asked: str | None,
) -> str:
    """The word of all layers of a kind: as markers or shapes say, else as is asked, else by the folder's config.

    Args:
        marked: layers that have a marker or an entry in the header, as ComfyUI's have and no others.
        asked: the word of a format, perhaps of another kind.

    Raises:
        FileError: for layers that contradict each other, or that nobody can tell.
    """
    of = BLOCK_FORMATS[kind]
    shown: dict[bool, str] = {}  # whether scales lie in tiles -> a layer that says so
    for name, layer in layers.items():
        found = find_layouts(files, files[layer.key], kind, files[layer.part_keys["scale"]])
        if name in marked and True not in found:
            raise FileError(
                f"{marked[name].location} says {marked[name].format_name!r}, whose scales lie in tiles, and {layer.part_keys['scale']} has the shape of "
                "scales in rows; they contradict each other, nobody knows which is true"
            )
        if name in marked or len(found) == 1:
            shown.setdefault(found[0], name)
    if len(shown) == 2:
        raise FileError(
            f"{files.path}: the scales of {shown[True]} lie in tiles as ComfyUI has them, those of {shown[False]} in rows as ModelOpt has "
            "them; a file has one maker, nobody knows how to read it"
        )
    if shown:
        return of.swizzled_name if True in shown else of.row_major_name
    if asked in (of.swizzled_name, of.row_major_name):
        return asked
    if is_modelopt(files):
        return of.row_major_name
    raise FileError(
        f"{files.path}: {len(layers)} weights are {kind} (first: {next(iter(layers))}) by ComfyUI or by ModelOpt, and neither shapes nor "
        f"markers tell which; for a text encoder set clip={of.swizzled_name} or clip={of.row_major_name} (quant_format in a program), else take a file "
        "with comfy_quant markers"
    )


def check_block_scales(files: TensorFiles, info: TensorInfo, word: str, key: str) -> None:
    """Refuse block scales that are NaN or negative. Zero is one, and what fills up tiles is no matter.

    Raises:
        FileError
    """
    of, scale = FORMATS_BY_NAME[word], files.read(key).view(torch.uint8)
    if int(scale.max()) < of.first_invalid_byte:
        return
    if word in SWIZZLED_FORMATS:
        scale = scale.flatten()[
            compute_swizzled_offsets(info.shape[0], of.count_columns(info) // of.block_size)
        ]
    wrong = int(((scale >= of.first_invalid_byte) & (scale != MINUS_ZERO)).sum())
    if wrong:
        raise FileError(
            f"{info.file}: {wrong} of {scale.numel()} numbers of {key} are NaN or negative; the file is damaged"
        )


def read_packed_weight(
    files: TensorFiles, key: str, word: str, keys: Mapping[str, str], shape: tuple[int, int]
) -> PackedWeight:
    """A weight as it lies in the file.

    Args:
        key: of the codes.
        word: of the layer.
        keys: of what stands beside them.
        shape: N and K without padding.
    """
    tiles = word in SWIZZLED_FORMATS
    return PackedWeight(
        files.read(key),
        files.read(keys["scale"]),
        shape,
        read_global_scale(files, keys),
        is_swizzled=tiles,
        high_nibble_first=tiles,
    )


def read_packed_rows(
    files: TensorFiles, key: str, word: str, keys: Mapping[str, str], start: int, stop: int
) -> PackedWeight:
    """Some rows of a weight with all columns of the file, the scales in rows. Of scales in tiles the tiles of these rows are read."""
    of, tiles = FORMATS_BY_NAME[word], word in SWIZZLED_FORMATS
    codes = files.read(key, slice(start, stop))
    columns = of.count_columns(files[key])
    first, last = (start // TILE_ROWS * TILE_ROWS, round_up(stop, TILE_ROWS)) if tiles else (start, stop)
    scale = files.read(keys["scale"], slice(first, last))
    if tiles:
        offsets = compute_swizzled_offsets(stop - first, columns // of.block_size)[start - first :]
        scale = scale.view(torch.uint8).flatten()[offsets].view(scale.dtype)
    return PackedWeight(
        codes,
        scale,
        (stop - start, columns),
        read_global_scale(files, keys),
        is_swizzled=False,
        high_nibble_first=tiles,
    )


def read_global_scale(files: TensorFiles, keys: Mapping[str, str]) -> Tensor | None:
    """The scale of a whole weight, of kinds that have one."""
    return files.read(keys["global"]).float().reshape(()) if "global" in keys else None
