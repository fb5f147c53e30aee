"""In which order the block scales of mxfp8 and nvfp4 stand, which a file does not always say itself.

ComfyUI keeps them in cuBLAS's tiles ("swizzled"), ModelOpt in rows. Where N is a multiple of 128 and the
blocks of a row are one of 4, no shape shows which it is. `block_scaled` asks per layer, `detect` for the
whole file when all of its layers are known.
"""

from collections.abc import Mapping
from typing import Protocol

from int8run.checkpoints.block_formats import BLOCK_FORMATS, TILE_COLUMNS, TILE_ROWS
from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.unsupported import is_modelopt
from int8run.errors import FileError
from int8run.quant.packed_weight import round_up
from int8run.utils.plurals import count_noun


class BlockScaledLayer(Protocol):
    """What this module uses of a `CheckpointLayer`, which is defined above it."""

    @property
    def key(self) -> str:
        """The weight's key."""
        ...

    @property
    def part_keys(self) -> Mapping[str, str]:
        """What for -> key, of the tensors beside the weight."""
        ...


def find_layouts(info: TensorInfo, scale: TensorInfo, storage_dtype: str) -> list[bool]:
    """Whether block scales can lie in tiles, by the shapes.

    Args:
        info: of the weight.
        scale: of its block scales.
        storage_dtype: mxfp8 or nvfp4.

    Returns:
        [True], [False], or both where the two layouts have the same shape.

    Raises:
        FileError: they fit neither way.
    """
    block_format = BLOCK_FORMATS[storage_dtype]
    blocks_per_row = block_format.count_columns(info) // block_format.block_size
    in_rows = (info.shape[0], blocks_per_row)
    in_tiles = (round_up(info.shape[0], TILE_ROWS), round_up(blocks_per_row, TILE_COLUMNS))
    layouts = []
    if scale.shape == in_tiles:
        layouts.append(True)
    if scale.shape == in_rows:
        layouts.append(False)
    if not layouts:
        raise FileError(
            f"{scale.file}: {scale.key} has the shape {list(scale.shape)}; of {info.key} {list(info.shape)} "
            f"in {storage_dtype} it is {list(in_tiles)} in tiles, {list(in_rows)} in rows"
        )
    return layouts


def resolve_format_name(
    files: TensorFiles,
    storage_dtype: str,
    layers: Mapping[str, BlockScaledLayer],
    markers: Mapping[str, Marker],
    quant_format: str,
) -> str:
    """The format name of all layers in mxfp8, or in nvfp4, of a file: a file has one maker.

    Markers and shapes decide; else the name that the user declares; else the config in the folder.

    Args:
        files: the checkpoint.
        storage_dtype: mxfp8 or nvfp4.
        layers: all that have it.
        markers: of the layers that have one, or an entry in the header, as ComfyUI's have and no others.
        quant_format: that the user declares; perhaps `auto`, or one of another storage dtype.

    Raises:
        FileError: for layers that contradict each other, or where nothing decides.
    """
    block_format = BLOCK_FORMATS[storage_dtype]
    swizzled, row_major = block_format.swizzled_name, block_format.row_major_name
    evidence = find_layout_evidence(files, storage_dtype, layers, markers)
    if len(evidence) == 2:
        raise FileError(
            f"{files.path}: the scales of {evidence[True]} lie in tiles as ComfyUI has them, those of "
            f"{evidence[False]} in rows as ModelOpt has them; a file has one maker, so this one cannot be "
            "read"
        )
    if True in evidence:
        return swizzled
    if False in evidence:
        return row_major
    if quant_format in (swizzled, row_major):
        return quant_format
    if is_modelopt(files):
        return row_major
    raise FileError(
        f"{files.path}: {count_noun(len(layers), 'weight', 'are')} {storage_dtype} (first: "
        f"{next(iter(layers))}) by ComfyUI or by ModelOpt, and neither shapes nor markers show which; set "
        f"model.quant_format={swizzled} or model.quant_format={row_major}, for a text encoder "
        f"clip={swizzled} or clip={row_major} (quant_format in a program)"
    )


def find_layout_evidence(
    files: TensorFiles,
    storage_dtype: str,
    layers: Mapping[str, BlockScaledLayer],
    markers: Mapping[str, Marker],
) -> dict[bool, str]:
    """Find the layers that show how block scales lie: those with a marker, or a shape of one layout alone.

    Args:
        files: the checkpoint.
        storage_dtype: mxfp8 or nvfp4.
        layers: all that have it.
        markers: of the layers that have one.

    Returns:
        Whether scales lie in tiles -> the first layer that shows it.

    Raises:
        FileError: for a marker that the shape of the scales contradicts.
    """
    evidence: dict[bool, str] = {}
    for name, layer in layers.items():
        scale_key = layer.part_keys["scale"]
        layouts = find_layouts(files[layer.key], files[scale_key], storage_dtype)
        marker = markers.get(name)
        if marker is not None and True not in layouts:
            raise FileError(
                f"{marker.location} says {marker.format_name!r}, whose scales lie in tiles, and {scale_key} "
                "has the shape of scales in rows; they contradict each other, so the weight cannot be read"
            )
        if marker is not None or len(layouts) == 1:
            evidence.setdefault(layouts[0], name)
    return evidence
