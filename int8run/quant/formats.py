"""The formats that weights of text encoders are written in, by the names of `clip=`: from float numbers to codes and scales.

The definitions are those of ComfyUI's comfy-kitchen and comfy-quants, and of convert_to_quant where these have none. Everything is
computed in float32 and rounded to the nearest, ties to even. `kernels/dequantize` is the way back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.errors import check_choice
from int8run.kernels.dequantize.reference import E2M1, MXFP8_BLOCK, NVFP4_BLOCK
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY
from int8run.quant.packed_weight import PackedWeight, round_up

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# which numbers share a scale; "" has none, BLOCK is mxfp8's and nvfp4's, whose scales have few bits themselves
TENSOR, ROW, GRID, BLOCK3D, BLOCK = "tensor", "row", "grid", "block3d", "block"
ROTATION_GROUP_SIZES = (256, 64, 16)
SCALE_TILE = (128, 4)  # rows and columns of scales in one of cuBLAS's tiles
CHUNK_ELEMENTS = 2**20  # weights that are worked on at a time


class QdataRange(NamedTuple):
    """What codes of one dtype take.

    Args:
        largest: number.
        smallest_scale: so that no scale is 0.
        scale_of_zeros: the scale where all numbers are 0.
    """

    max_value: float
    min_scale: float
    zero_scale: float


QDATA_RANGES = {
    torch.int8: QdataRange(INT8_MAX, TINY, TINY),
    E4M3: QdataRange(448, 1e-12, 1),
    E5M2: QdataRange(57344, 1e-12, 1),
}


@dataclass(frozen=True)
class WeightFormat:
    """One way to write a weight in few bits.

    Args:
        name: of `clip=`.
        codes: dtype of the codes; of nvfp4, two to a byte, uint8.
        granularity: which numbers share a scale.
        block: numbers of a row that do, in granularities with blocks.
        marker: the word for it in a `comfy_quant` marker; a plain cast has none.
        rotated: whether groups of columns are rotated before, by whoever calls `quantize`.
        otherwise: name of the format that takes the shapes that this one refuses.
        read_only: files have it, nothing is written in it.
    """

    name: str
    qdata_dtype: torch.dtype
    granularity: str
    block_size: int = 0
    marker_format: str = ""
    is_rotated: bool = False
    fallback: str | None = None
    is_read_only: bool = False

    @property
    def storage_dtype(self) -> str:
        """int8, fp8, mxfp8 or nvfp4, as `PackedWeight` has it."""
        if self.granularity == BLOCK:
            return "nvfp4" if self.qdata_dtype == torch.uint8 else "mxfp8"
        return "int8" if self.qdata_dtype == torch.int8 else "fp8"

    def get_rotation_group_size(self, columns: int) -> int:
        """How many columns are rotated together: the largest group that divides them; 0: none."""
        return next((group for group in ROTATION_GROUP_SIZES if self.is_rotated and columns % group == 0), 0)

    def unsupported_reason(self, rows: int, columns: int) -> str | None:
        """Why it cannot take a weight of this shape; None when it can."""
        if self.is_read_only:
            return f"{self.name} is read and never written"
        if self.is_rotated and not self.get_rotation_group_size(columns):
            return f"{self.name} rotates groups of {', '.join(map(str, ROTATION_GROUP_SIZES))} columns; none of them divides {columns}"
        if self.granularity == GRID and (rows % self.block_size or columns % self.block_size):
            return f"{self.name} has blocks of {self.block_size} x {self.block_size}; they do not divide {rows} x {columns}"
        if self.granularity == BLOCK3D and columns % self.block_size:
            return f"{self.name} has blocks of {self.block_size} columns; they do not divide {columns}"
        return None

    def get_padded_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """N and K of the numbers that are stored."""
        if self.granularity != BLOCK:
            return rows, columns
        return round_up(rows, self.block_size), round_up(columns, self.block_size)

    def get_qdata_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the tensor that holds the codes."""
        rows, columns = self.get_padded_shape(rows, columns)
        return (rows, columns // 2) if self.qdata_dtype == torch.uint8 else (rows, columns)

    def get_scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """Of the tensor that holds the scales; None: there is none."""
        if self.granularity == ROW:
            # int8 products and look-ups broadcast [N, 1]; readers of fp8 expect [N]
            return (rows, 1) if self.qdata_dtype == torch.int8 else (rows,)
        if self.granularity == GRID:
            return rows // self.block_size, columns // self.block_size
        if self.granularity == BLOCK3D:
            return rows, columns // self.block_size, 1
        if self.granularity == BLOCK:
            rows, columns = self.get_padded_shape(rows, columns)
            return round_up(rows, SCALE_TILE[0]), round_up(columns // self.block_size, SCALE_TILE[1])
        return () if self.granularity == TENSOR else None

    def quantize(self, weight: Tensor) -> PackedWeight:
        """Codes and scales of a weight. Every scale of int8 and fp8, and nvfp4's global one, is finite and above 0.

        Args:
            weight: finite numbers [N, K] of any float dtype, rotated already where the format rotates.

        Raises:
            ValueError: for a shape that it refuses, an empty weight, or NaN or infinity in it.
        """
        shape = (weight.shape[0], weight.shape[1])
        reason = self.unsupported_reason(*shape) or (None if weight.numel() else "it is empty")
        if reason:
            raise ValueError(f"a weight [{shape[0]}, {shape[1]}] cannot be quantized: {reason}")
        padded = self.get_padded_shape(*shape)
        weight = weight.detach()
        if padded != shape:
            weight = F.pad(weight, (0, padded[1] - shape[1], 0, padded[0] - shape[0]))
        return {"mxfp8": quantize_mxfp8, "nvfp4": quantize_nvfp4}.get(self.storage_dtype, quantize_scaled)(
            self, weight, shape
        )


FORMATS: Mapping[str, WeightFormat] = {
    form.name: form
    for form in (
        WeightFormat("int8_tensorwise", torch.int8, TENSOR, marker_format="int8_tensorwise"),
        WeightFormat("int8_rowwise", torch.int8, ROW, marker_format="int8_tensorwise"),
        WeightFormat(
            "int8_convrot",
            torch.int8,
            ROW,
            marker_format="int8_tensorwise",
            is_rotated=True,
            fallback="int8_rowwise",
        ),
        WeightFormat("int8_blockwise", torch.int8, GRID, 128, "int8_blockwise", fallback="int8_rowwise"),
        WeightFormat("int8_block3d", torch.int8, BLOCK3D, 128, "int8_blockwise", fallback="int8_rowwise"),
        WeightFormat("float8_e4m3fn", E4M3, TENSOR, marker_format="float8_e4m3fn"),
        WeightFormat("float8_e5m2", E5M2, TENSOR, marker_format="float8_e5m2"),
        WeightFormat("float8_e4m3fn_cast", E4M3, ""),
        WeightFormat("float8_e5m2_cast", E5M2, ""),
        WeightFormat("float8_e4m3fn_rowwise", E4M3, ROW, marker_format="float8_e4m3fn_rowwise"),
        WeightFormat(
            "float8_e4m3fn_blockwise",
            E4M3,
            GRID,
            64,
            "float8_e4m3fn_blockwise",
            fallback="float8_e4m3fn_rowwise",
        ),
        WeightFormat(
            "float8_e4m3fn_block3d",
            E4M3,
            BLOCK3D,
            64,
            "float8_e4m3fn_block3d",
            fallback="float8_e4m3fn_rowwise",
        ),
        WeightFormat("mxfp8", E4M3, BLOCK, MXFP8_BLOCK, "mxfp8"),
        WeightFormat("nvfp4", torch.uint8, BLOCK, NVFP4_BLOCK, "nvfp4"),
        WeightFormat("mxfp8_rows", E4M3, BLOCK, MXFP8_BLOCK, fallback="mxfp8", is_read_only=True),
        WeightFormat("nvfp4_modelopt", torch.uint8, BLOCK, NVFP4_BLOCK, fallback="nvfp4", is_read_only=True),
    )
}


def choose_format(name: str, rows: int, columns: int) -> WeightFormat:
    """The format of that name, or the one that takes its place for a weight of this shape; `Format.refuse` tells why.

    Raises:
        ConfigError: for a name that is none of FORMATS.
    """
    check_choice("format", name, FORMATS)
    form = FORMATS[name]
    return (
        FORMATS[form.fallback]
        if form.fallback is not None and form.unsupported_reason(rows, columns)
        else form
    )


def quantize_scaled(form: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """int8 and fp8: `scale = absmax / largest code` for each set of numbers that share one; a plain cast has none."""
    codes, stored = QDATA_RANGES[form.qdata_dtype], form.get_scale_shape(*shape)
    height = form.block_size if form.granularity == GRID else 1
    absmax = compute_block_absmax(weight, height, form.block_size or shape[1])  # [N / height, K / width]
    if form.granularity == TENSOR:
        absmax = absmax.amax().expand_as(absmax)
    scale = (absmax / codes.max_value).clamp(min=codes.min_scale).masked_fill(absmax == 0, codes.zero_scale)
    if stored is None:
        return PackedWeight(
            encode_blocks(weight, torch.ones_like(scale), 1, partial(round_to_dtype, dtype=form.qdata_dtype)),
            None,
            shape,
        )
    qdata = encode_blocks(weight, scale, height, partial(round_to_dtype, dtype=form.qdata_dtype))
    return PackedWeight(
        qdata, scale.flatten()[: prod(stored)].reshape(stored).clone(), shape, block_size=form.block_size
    )


def quantize_mxfp8(form: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """mxfp8: scales are powers of 2, as large as the largest number of a block needs."""
    absmax = compute_block_absmax(weight, 1, form.block_size)
    # torch's float32 logarithm on purpose: just above a power of 2 it is rounded down to it, and so do comfy-kitchen's kernels
    exponent = (absmax / QDATA_RANGES[form.qdata_dtype].max_value).log2().ceil() + 127
    exponent = exponent.clamp(min=0).to(torch.uint8)  # 2**-127 is the smallest scale
    scale = exponent.view(torch.float8_e8m0fnu).float().masked_fill(absmax == 0, 0)
    qdata = encode_blocks(weight, scale, 1, partial(round_to_dtype, dtype=form.qdata_dtype))
    return PackedWeight(qdata, swizzle_scales(exponent), shape)


def quantize_nvfp4(form: WeightFormat, weight: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """nvfp4: the scale of a block is an e4m3 number times one global scale, at which the largest block has 448."""
    largest = max(E2M1)
    absmax = compute_block_absmax(weight, 1, form.block_size)
    global_scale = (absmax.amax() / (largest * QDATA_RANGES[E4M3].max_value)).clamp(min=TINY)
    scale = (absmax / largest / global_scale).to(E4M3)
    qdata = encode_blocks(weight, global_scale * scale.float(), 1, pack_e2m1_pairs)
    return PackedWeight(qdata, swizzle_scales(scale.view(torch.uint8)).view(E4M3), shape, global_scale)


def compute_block_absmax(weight: Tensor, height: int, width: int) -> Tensor:
    """The largest magnitude in each block of a weight [N, K]. Returns float32 [N / height, K / width].

    Raises:
        ValueError: where a number is NaN or infinite.
    """
    blocks = (height, weight.shape[1] // width, width)
    # in the weight's own dtype, which is exact
    parts = [
        part.reshape(-1, *blocks).abs().amax((1, 3)).float() for part in split_into_chunks(weight, height)
    ]
    absmax = torch.cat(parts)
    if not absmax.isfinite().all():
        raise ValueError(f"a weight {list(weight.shape)} with NaN or infinity cannot be quantized")
    return absmax


def encode_blocks(weight: Tensor, scale: Tensor, height: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Every number divided by its scale, and what `encode` makes of that. Numbers whose scale is 0 become 0.

    Args:
        weight: [N, K].
        scale: float32 [N / height, K / width].
        encode: from float32 [n, height, K / width, width], which it may overwrite, to codes of the same shape or of narrower blocks.
    """
    parts = []
    at = 0
    for part in split_into_chunks(weight, height):
        s = scale[at : at + len(part) // height, None, :, None]
        at += len(s)
        divided = part.float().reshape(len(s), height, scale.shape[1], -1) / s
        parts.append(encode(divided.masked_fill_(s == 0, 0)).reshape(len(part), -1))
    return torch.cat(parts)


def split_into_chunks(weight: Tensor, height: int) -> tuple[Tensor, ...]:
    """Whole rows of blocks that stay in the cache. Temporaries are as large as a piece."""
    return weight.split(height * max(1, CHUNK_ELEMENTS // (height * weight.shape[1])))


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest codes; what is larger than the largest becomes that. x: float32, overwritten."""
    largest = QDATA_RANGES[dtype].max_value
    x = x.round_() if dtype == torch.int8 else x
    return x.clamp_(-largest, largest).to(dtype)


def pack_e2m1_pairs(x: Tensor) -> Tensor:
    """Numbers as sign, two bits of exponent and one of mantissa; even columns in the high half of a byte.

    Args:
        x: float32 [..., C].

    Returns:
        uint8 [..., C / 2].
    """
    magnitude = x.abs().clamp_(max=max(E2M1))
    # codes count the numbers of E2M1: up to 2 they are 0.5 apart, up to 4 they are 1 apart, then 2
    fine, middle, coarse = (2 * magnitude).round_(), magnitude.round() + 2, (magnitude / 2).round_() + 4
    codes = torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse))
    codes = codes.to(torch.uint8) | x.signbit().to(torch.uint8) << 3
    return codes[..., ::2] << 4 | codes[..., 1::2]


def swizzle_scales(scale: Tensor) -> Tensor:
    """Scales in cuBLAS's tiles, as `swizzled_offsets` says; what is padded is 0.

    Args:
        scale: uint8 [rows, columns].

    Returns:
        uint8 [rows up to a multiple of 128, columns up to a multiple of 4].
    """
    rows, columns = (round_up(size, tile) for size, tile in zip(scale.shape, SCALE_TILE, strict=True))
    padded = F.pad(scale, (0, columns - scale.shape[1], 0, rows - scale.shape[0]))
    # the four quarters of a tile's rows lie side by side
    return padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns)
