"""The formats of `clip=`, in which weights of text encoders are written: from floats to few bits and scales.

The definitions are those of ComfyUI's comfy-kitchen and comfy-quants, and of convert_to_quant where these
have none. Everything is computed in float32 and rounded to the nearest, ties to even. `kernels/dequantize` is
the way back, `checkpoints/comfy_formats.py` writes the result into a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.errors import check_choice
from int8run.kernels.dequantize.reference import E2M1, MXFP8_BLOCK, NVFP4_BLOCK
from int8run.kernels.grouped_weight.reference import count_row_bytes
from int8run.kernels.quantize_rowwise.reference import TINY
from int8run.quant.block_encoding import (
    E4M3,
    E5M2,
    QDATA_RANGES,
    SCALE_TILE,
    compute_block_absmax,
    encode_blocks,
    pack_e2m1_pairs,
    round_to_dtype,
    swizzle_scales,
)
from int8run.quant.grouped_rounding import MAKERS_SEARCH, GroupLayout, round_groups
from int8run.quant.grouped_weight import W4A8, W6A8, GroupedWeight
from int8run.quant.packed_weight import PackedWeight, round_up

# which numbers share a scale; "" has no scale, BLOCK is mxfp8's and nvfp4's, whose scales have few bits
# themselves, GROUP that of codes of 4 and 6 bits
TENSOR, ROW, GRID, BLOCK3D, BLOCK, GROUP = "tensor", "row", "grid", "block3d", "block", "group"
ROTATION_GROUP_SIZES = (256, 64, 16)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """One way to write a weight in few bits.

    Args:
        name: of `clip=`.
        qdata_dtype: of the stored numbers; of nvfp4, two in a byte, uint8.
        granularity: which numbers share a scale.
        block_size: columns that share a scale, in granularities with blocks.
        marker_format: the format name in a `comfy_quant` marker; a plain cast has none.
        is_rotated: whether groups of columns are rotated first, by whoever calls `quantize`.
        fallback: name of the format for the shapes that this one cannot hold.
        is_read_only: files have it, nothing is written in it.
        bits: of a stored number, where they are codes; 8: they are not.
    """

    name: str
    qdata_dtype: torch.dtype
    granularity: str
    block_size: int = 0
    marker_format: str = ""
    is_rotated: bool = False
    fallback: str | None = None
    is_read_only: bool = False
    bits: int = 8

    @property
    def storage_dtype(self) -> str:
        """int8, fp8, mxfp8 or nvfp4, as `PackedWeight` has it; w4a8 or w6a8, as `GroupedWeight`."""
        if self.is_grouped:
            return self.name
        if self.granularity == BLOCK:
            return "nvfp4" if self.qdata_dtype == torch.uint8 else "mxfp8"
        return "int8" if self.qdata_dtype == torch.int8 else "fp8"

    @property
    def is_grouped(self) -> bool:
        """Whether numbers are codes of 4 or 6 bits that decode to int8."""
        return self.granularity == GROUP

    @property
    def group_layout(self) -> GroupLayout:
        """How codes are laid out, of a format that has them."""
        return GroupLayout(self.bits, self.block_size)

    def get_rotation_group_size(self, columns: int) -> int:
        """How many columns are rotated together: the largest group that divides them; 0: none."""
        if not self.is_rotated:
            return 0
        return next((size for size in ROTATION_GROUP_SIZES if columns % size == 0), 0)

    def unsupported_reason(self, rows: int, columns: int) -> str | None:
        """Why the format cannot hold a weight of this shape; None when it can."""
        if self.is_read_only:
            return f"{self.name} is read and never written"
        if self.is_rotated and not self.get_rotation_group_size(columns):
            sizes = ", ".join(map(str, ROTATION_GROUP_SIZES))
            return f"{self.name} rotates groups of {sizes} columns; none of them divides {columns}"
        return self._find_cut_blocks(rows, columns)

    def _find_cut_blocks(self, rows: int, columns: int) -> str | None:
        """Why blocks do not divide a weight of this shape; None when they do, or when it is padded."""
        size = self.block_size
        if self.is_grouped:
            obstacle = self.group_layout.find_obstacle(columns)
            return None if obstacle is None else f"{self.name}: {obstacle}"
        if self.granularity == GRID and (rows % size or columns % size):
            return f"{self.name} has blocks of {size} x {size}; they do not divide {rows} x {columns}"
        if self.granularity == BLOCK3D and columns % size:
            return f"{self.name} has blocks of {size} columns; they do not divide {columns}"
        return None

    def get_padded_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """N and K of the numbers that are stored."""
        if self.granularity != BLOCK:
            return rows, columns
        return round_up(rows, self.block_size), round_up(columns, self.block_size)

    def get_qdata_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the tensor that holds the numbers."""
        if self.is_grouped:
            return rows, count_row_bytes(columns, self.bits)
        rows, columns = self.get_padded_shape(rows, columns)
        if self.qdata_dtype == torch.uint8:  # two numbers in a byte
            return rows, columns // 2
        return rows, columns

    def get_scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """The shape of the tensor that holds the scales; None: there is none."""
        if self.granularity == TENSOR:
            return ()
        if self.granularity == ROW:
            # int8 products and look-ups broadcast [N, 1]; readers of fp8 expect [N]
            return (rows, 1) if self.qdata_dtype == torch.int8 else (rows,)
        if self.granularity == GRID:
            return rows // self.block_size, columns // self.block_size
        if self.granularity == BLOCK3D:
            return rows, columns // self.block_size, 1
        if self.is_grouped:
            return rows, columns // self.block_size
        if self.granularity == BLOCK:
            rows, columns = self.get_padded_shape(rows, columns)
            tile_rows, tile_columns = SCALE_TILE
            return round_up(rows, tile_rows), round_up(columns // self.block_size, tile_columns)
        return None

    def quantize(self, weight: Tensor) -> PackedWeight | GroupedWeight:
        """Quantize a weight. Every scale of int8 and fp8, and nvfp4's global one, is finite and above 0.

        Args:
            weight: finite numbers [N, K] of any float dtype, rotated already where the format rotates.

        Raises:
            ValueError: for a shape that the format cannot hold, an empty weight, or NaN or infinity in it.
        """
        rows, columns = weight.shape
        reason = self.unsupported_reason(rows, columns)
        if reason is None and not weight.numel():
            reason = "it is empty"
        if reason is not None:
            raise ValueError(f"a weight [{rows}, {columns}] cannot be quantized: {reason}")

        weight = weight.detach()
        if self.is_grouped:
            return quantize_codes(self, weight)
        padded_rows, padded_columns = self.get_padded_shape(rows, columns)
        if (padded_rows, padded_columns) != (rows, columns):
            weight = F.pad(weight, (0, padded_columns - columns, 0, padded_rows - rows))
        if self.storage_dtype == "mxfp8":
            return quantize_mxfp8(self, weight, (rows, columns))
        if self.storage_dtype == "nvfp4":
            return quantize_nvfp4(self, weight, (rows, columns))
        return quantize_scaled(self, weight, (rows, columns))


ALL_FORMATS = (
    WeightFormat(
        name="int8_tensorwise", qdata_dtype=torch.int8, granularity=TENSOR, marker_format="int8_tensorwise"
    ),
    WeightFormat(
        name="int8_rowwise", qdata_dtype=torch.int8, granularity=ROW, marker_format="int8_tensorwise"
    ),
    WeightFormat(
        name="int8_convrot",
        qdata_dtype=torch.int8,
        granularity=ROW,
        marker_format="int8_tensorwise",
        is_rotated=True,
        fallback="int8_rowwise",
    ),
    WeightFormat(
        name="int8_blockwise",
        qdata_dtype=torch.int8,
        granularity=GRID,
        block_size=128,
        marker_format="int8_blockwise",
        fallback="int8_rowwise",
    ),
    WeightFormat(
        name="int8_block3d",
        qdata_dtype=torch.int8,
        granularity=BLOCK3D,
        block_size=128,
        marker_format="int8_blockwise",
        fallback="int8_rowwise",
    ),
    WeightFormat(name="float8_e4m3fn", qdata_dtype=E4M3, granularity=TENSOR, marker_format="float8_e4m3fn"),
    WeightFormat(name="float8_e5m2", qdata_dtype=E5M2, granularity=TENSOR, marker_format="float8_e5m2"),
    WeightFormat(name="float8_e4m3fn_cast", qdata_dtype=E4M3, granularity=""),
    WeightFormat(name="float8_e5m2_cast", qdata_dtype=E5M2, granularity=""),
    WeightFormat(
        name="float8_e4m3fn_rowwise",
        qdata_dtype=E4M3,
        granularity=ROW,
        marker_format="float8_e4m3fn_rowwise",
    ),
    WeightFormat(
        name="float8_e4m3fn_blockwise",
        qdata_dtype=E4M3,
        granularity=GRID,
        block_size=64,
        marker_format="float8_e4m3fn_blockwise",
        fallback="float8_e4m3fn_rowwise",
    ),
    WeightFormat(
        name="float8_e4m3fn_block3d",
        qdata_dtype=E4M3,
        granularity=BLOCK3D,
        block_size=64,
        marker_format="float8_e4m3fn_block3d",
        fallback="float8_e4m3fn_rowwise",
    ),
    WeightFormat(
        name="mxfp8", qdata_dtype=E4M3, granularity=BLOCK, block_size=MXFP8_BLOCK, marker_format="mxfp8"
    ),
    WeightFormat(
        name="nvfp4",
        qdata_dtype=torch.uint8,
        granularity=BLOCK,
        block_size=NVFP4_BLOCK,
        marker_format="nvfp4",
    ),
    WeightFormat(
        name=W4A8,
        qdata_dtype=torch.int8,
        granularity=GROUP,
        block_size=16,
        marker_format="asym_w4a8_int8",
        is_rotated=True,
        fallback="int8_convrot",
        bits=4,
    ),
    WeightFormat(
        name=W6A8,
        qdata_dtype=torch.int8,
        granularity=GROUP,
        block_size=16,
        marker_format="asym_w4a8_int8",
        is_rotated=True,
        fallback="int8_convrot",
        bits=6,
    ),
    WeightFormat(
        name="mxfp8_rows",
        qdata_dtype=E4M3,
        granularity=BLOCK,
        block_size=MXFP8_BLOCK,
        fallback="mxfp8",
        is_read_only=True,
    ),
    WeightFormat(
        name="nvfp4_modelopt",
        qdata_dtype=torch.uint8,
        granularity=BLOCK,
        block_size=NVFP4_BLOCK,
        fallback="nvfp4",
        is_read_only=True,
    ),
)
FORMATS: Mapping[str, WeightFormat] = {weight_format.name: weight_format for weight_format in ALL_FORMATS}


def choose_format(name: str, rows: int, columns: int) -> WeightFormat:
    """The format of that name, or its fallback where it cannot hold a weight of this shape.

    Raises:
        ConfigError: for a name that is not one of FORMATS.
    """
    check_choice("format", name, FORMATS)
    chosen = FORMATS[name]
    while chosen.fallback is not None and chosen.unsupported_reason(rows, columns):
        chosen = FORMATS[chosen.fallback]
    return chosen


def list_fallbacks(name: str) -> list[str]:
    """The formats that layers may get in place of one, the nearest first."""
    found = []
    fallback = FORMATS[name].fallback
    while fallback is not None:
        found.append(fallback)
        fallback = FORMATS[fallback].fallback
    return found


def quantize_codes(weight_format: WeightFormat, weight: Tensor) -> GroupedWeight:
    """Quantize to codes of 4 or 6 bits with the scales of comfy-kitchen's own quantizer.

    Args:
        weight_format: w4a8 or w6a8.
        weight: float [N, K], rotated already.

    Raises:
        ValueError: for NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight that holds NaN or infinity cannot be quantized")
    layout = weight_format.group_layout
    return round_groups(weight.float(), layout, neighbors=MAKERS_SEARCH[layout.bits])


def quantize_scaled(weight_format: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """Quantize to int8 or fp8: `scale = absmax / largest number` for each set of numbers that share one.

    A plain cast has no scale: its numbers are only clamped and rounded.

    Args:
        weight_format: int8 or fp8.
        weight: float [N, K].
        shape: N and K.
    """
    limits, scale_shape = QDATA_RANGES[weight_format.qdata_dtype], weight_format.get_scale_shape(*shape)
    height = weight_format.block_size if weight_format.granularity == GRID else 1
    width = weight_format.block_size or shape[1]
    absmax = compute_block_absmax(weight, height, width)  # [N / height, K / width]
    if weight_format.granularity == TENSOR:
        absmax = absmax.amax().expand_as(absmax)
    scale = (absmax / limits.max_value).clamp(min=limits.min_scale)
    scale = scale.masked_fill(absmax == 0, limits.zero_scale)

    encode = partial(round_to_dtype, dtype=weight_format.qdata_dtype)
    if scale_shape is None:
        return PackedWeight(encode_blocks(weight, torch.ones_like(scale), 1, encode), None, shape)
    return PackedWeight(
        qdata=encode_blocks(weight, scale, height, encode),
        # one scale for the whole weight was expanded above
        scale=scale.flatten()[: prod(scale_shape)].reshape(scale_shape).clone(),
        shape=shape,
        block_size=weight_format.block_size,
    )


def quantize_mxfp8(weight_format: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """Quantize to mxfp8: scales are powers of 2, as large as the largest number of a block needs.

    Args:
        weight_format: mxfp8.
        weight: float, padded to multiples of 32.
        shape: N and K without padding.
    """
    absmax = compute_block_absmax(weight, 1, weight_format.block_size)  # [N, K / 32]
    # torch's float32 logarithm on purpose: just above a power of 2 it is rounded down to it, and so do
    # comfy-kitchen's kernels
    exponent = (absmax / QDATA_RANGES[weight_format.qdata_dtype].max_value).log2().ceil() + 127
    exponent = exponent.clamp(min=0).to(torch.uint8)  # 2**-127 is the smallest scale
    scale = exponent.view(torch.float8_e8m0fnu).float().masked_fill(absmax == 0, 0)
    qdata = encode_blocks(weight, scale, 1, partial(round_to_dtype, dtype=weight_format.qdata_dtype))
    return PackedWeight(qdata, swizzle_scales(exponent), shape)


def quantize_nvfp4(weight_format: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """Quantize to nvfp4: the scale of a block is an e4m3 number times one global scale.

    The global scale is chosen so that the block with the largest numbers has the largest e4m3 scale, 448.

    Args:
        weight_format: nvfp4.
        weight: float, padded to multiples of 16.
        shape: N and K without padding.
    """
    largest = max(E2M1)
    absmax = compute_block_absmax(weight, 1, weight_format.block_size)  # [N, K / 16]
    global_scale = (absmax.amax() / (largest * QDATA_RANGES[E4M3].max_value)).clamp(min=TINY)
    scale = (absmax / largest / global_scale).to(E4M3)
    qdata = encode_blocks(weight, global_scale * scale.float(), 1, pack_e2m1_pairs)  # [N, K / 2]
    swizzled = swizzle_scales(scale.view(torch.uint8)).view(E4M3)
    return PackedWeight(qdata, swizzled, shape, global_scale)
