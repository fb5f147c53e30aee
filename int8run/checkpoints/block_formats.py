"""Facts about mxfp8 and nvfp4: dtypes, block sizes, and the names of their two layouts.

`block_scaled` checks and reads layers by them, `block_layout` finds out in which order the scales stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.kernels.dequantize.reference import MXFP8_BLOCK, NVFP4_BLOCK
from int8run.quant.block_encoding import SCALE_TILE

NVFP4, MXFP8 = "nvfp4", "mxfp8"


@dataclass(frozen=True)
class BlockFormat:
    """What all weights in mxfp8, or all in nvfp4, have in common.

    Args:
        qdata_dtype: of the weight in the file, by safetensors' name.
        values_per_byte: numbers of the weight in one byte.
        scale_dtypes: that the block scales may have.
        first_invalid_byte: from this byte on, scales are NaN or negative.
        block_size: numbers of a row that share a scale.
        padding_multiple: what N and K are padded to.
        swizzled_name: format name of a layer whose scales lie in tiles, as ComfyUI writes them.
        row_major_name: format name of a layer whose scales lie in rows.
        required_parts: what for -> name of the tensor, of those that must stand beside the weight.
    """

    qdata_dtype: str
    values_per_byte: int
    scale_dtypes: tuple[str, ...]
    first_invalid_byte: int
    block_size: int
    padding_multiple: int
    swizzled_name: str
    row_major_name: str
    required_parts: Mapping[str, str]

    def count_columns(self, info: TensorInfo) -> int:
        """K of a weight in the file, with its padding."""
        return info.shape[1] * self.values_per_byte

    def get_padded_shape(self, info: TensorInfo) -> tuple[int, int]:
        """N and K of a weight in the file, with their padding."""
        return info.shape[0], self.count_columns(info)


BLOCK_FORMATS = {
    NVFP4: BlockFormat(
        qdata_dtype="U8",
        values_per_byte=2,
        scale_dtypes=("F8_E4M3", "U8"),
        first_invalid_byte=0x7F,
        block_size=NVFP4_BLOCK,
        padding_multiple=16,
        swizzled_name="nvfp4",
        row_major_name="nvfp4_modelopt",
        required_parts={"scale": "weight_scale", "global": "weight_scale_2"},
    ),
    MXFP8: BlockFormat(
        qdata_dtype="F8_E4M3",
        values_per_byte=1,
        scale_dtypes=("U8", "F8_E8M0"),
        first_invalid_byte=0xFF,
        block_size=MXFP8_BLOCK,
        padding_multiple=32,
        swizzled_name="mxfp8",
        row_major_name="mxfp8_rows",
        required_parts={"scale": "weight_scale"},
    ),
}


SWIZZLED_NAMES = {block_format.swizzled_name for block_format in BLOCK_FORMATS.values()}


FORMATS_BY_NAME = {
    **{block_format.swizzled_name: block_format for block_format in BLOCK_FORMATS.values()},
    **{block_format.row_major_name: block_format for block_format in BLOCK_FORMATS.values()},
}


TILE_ROWS, TILE_COLUMNS = SCALE_TILE
