"""What the formats of checkpoints are called: by `clip=`, and in `comfy_quant` markers.

`classify.py` and `classify_int8.py` name layers by these tables, `detect.py` compares names with shapes.
"""

from typing import NamedTuple

from int8run.checkpoints.block_formats import MXFP8, NVFP4
from int8run.checkpoints.layer import FP8, INT8
from int8run.checkpoints.quant_metadata import (
    GROUPED_FORMAT,
    INT8RUN_CONV_FORMAT,
    INT8RUN_FORMAT,
    Marker,
)
from int8run.quant.grouped_weight import W4A8, W6A8


class MarkerFormat(NamedTuple):
    """What the format name in a marker promises."""

    storage_dtypes: tuple[str, ...]
    granularities: tuple[str, ...]


MARKER_FORMATS = {
    "int8_tensorwise": MarkerFormat((INT8,), ("tensor", "row")),
    "int8_axiswise": MarkerFormat((INT8,), ("row",)),
    "int8_blockwise": MarkerFormat((INT8,), ("grid", "block3d", "group")),
    INT8RUN_FORMAT: MarkerFormat((INT8,), ("row",)),
    INT8RUN_CONV_FORMAT: MarkerFormat((INT8,), ("row",)),
    "float8_e4m3fn": MarkerFormat((FP8,), ("tensor", "block3d")),
    "float8_e5m2": MarkerFormat((FP8,), ("tensor",)),
    "float8_e4m3fn_rowwise": MarkerFormat((FP8,), ("row",)),
    "float8_e4m3fn_blockwise": MarkerFormat((FP8,), ("grid",)),
    "float8_e4m3fn_block3d": MarkerFormat((FP8,), ("block3d",)),
    "nvfp4": MarkerFormat((NVFP4,), ("block",)),
    "mxfp8": MarkerFormat((MXFP8,), ("block",)),
    "hybrid_mxfp8": MarkerFormat((MXFP8,), ("block",)),
    GROUPED_FORMAT: MarkerFormat((W4A8, W6A8), ("group",)),
}
LEGACY_GRANULARITIES = ("tensor", "row")  # of INT8 markers that name no format
CONVROT = "int8_convrot"
# dtype in the file and granularity -> the format name of `clip=` for such a layer, where there is one
FORMAT_NAMES = {
    ("I8", "tensor"): "int8_tensorwise",
    ("I8", "row"): "int8_rowwise",
    ("I8", "transposed"): "int8_rowwise",
    ("I8", "grid"): "int8_blockwise",
    ("I8", "block3d"): "int8_block3d",
    ("F8_E4M3", ""): "float8_e4m3fn_cast",
    ("F8_E4M3", "tensor"): "float8_e4m3fn",
    ("F8_E4M3", "row"): "float8_e4m3fn_rowwise",
    ("F8_E4M3", "grid"): "float8_e4m3fn_blockwise",
    ("F8_E4M3", "block3d"): "float8_e4m3fn_block3d",
    ("F8_E5M2", ""): "float8_e5m2_cast",
    ("F8_E5M2", "tensor"): "float8_e5m2",
}


def name_int8_format(granularity: str, group_size: int) -> str:
    """The format name of an INT8 layer, rotated by a regular matrix or not at all; empty: there is none."""
    if group_size:
        return CONVROT if granularity in ("tensor", "row") else ""
    return FORMAT_NAMES.get(("I8", granularity), "")


def promised_granularities(marker: Marker) -> tuple[str, ...]:
    """The granularities that a marker's format name allows."""
    if not marker.format_name:
        return LEGACY_GRANULARITIES
    return MARKER_FORMATS[marker.format_name].granularities


def name_granularity(granularity: str, rows: int, columns: int, marker: Marker | None) -> str:
    """The granularity that a marker means where shapes cannot tell.

    A scale of one number is that of the tensor; of its row, where there is one row; or of its block, where
    there is one block of the size that the marker names.
    """
    if granularity != "tensor" or marker is None:
        return granularity
    promised = promised_granularities(marker)
    if "tensor" in promised and not marker.fields.get("per_row"):
        return granularity
    is_possible = {
        "row": rows == 1,
        "grid": rows == columns == marker.block_size,
        "block3d": rows == 1 and columns == marker.block_size,
    }
    for name in promised:
        if is_possible.get(name):
            return name
    return granularity
