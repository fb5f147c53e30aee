"""Blocks of a weight: their largest magnitudes, and their numbers rounded to few bits.

What `quant.formats` writes its formats with; nothing here knows a format by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.dequantize.reference import E2M1
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY
from int8run.quant.packed_weight import round_up

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALE_TILE = (128, 4)  # rows and columns of scales in one of cuBLAS's tiles
CHUNK_ELEMENTS = 2**20  # weights that are quantized at a time, few enough for the cache


@dataclass(frozen=True)
class QdataRange:
    """What a dtype of qdata can hold.

    Args:
        max_value: the largest number.
        min_scale: the smallest scale, so that none is 0.
        zero_scale: the scale where all numbers are 0.
    """

    max_value: float
    min_scale: float
    zero_scale: float


QDATA_RANGES = {
    torch.int8: QdataRange(max_value=INT8_MAX, min_scale=TINY, zero_scale=TINY),
    E4M3: QdataRange(max_value=448, min_scale=1e-12, zero_scale=1),
    E5M2: QdataRange(max_value=57344, min_scale=1e-12, zero_scale=1),
}


def compute_block_absmax(weight: Tensor, height: int, width: int) -> Tensor:
    """The largest magnitude in each block of a weight.

    Args:
        weight: float [N, K].
        height: rows of a block, which divide N.
        width: columns of a block, which divide K.

    Returns:
        float32 [N / height, K / width].

    Raises:
        ValueError: where a number is NaN or infinite.
    """
    chunks = []
    for chunk in split_into_chunks(weight, height):
        blocks = chunk.reshape(-1, height, weight.shape[1] // width, width)
        chunks.append(blocks.abs().amax((1, 3)).float())  # in the weight's own dtype, which is exact
    absmax = torch.cat(chunks)
    if not absmax.isfinite().all():
        raise ValueError(f"a weight {list(weight.shape)} with NaN or infinity cannot be quantized")
    return absmax


def encode_blocks(weight: Tensor, scale: Tensor, height: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Divide every number by its scale and encode the result. Numbers whose scale is 0 become 0.

    Args:
        weight: [N, K].
        scale: float32 [N / height, K / width].
        height: rows of a block.
        encode: from float32 [n, height, K / width, width], which it may overwrite, to qdata of the same shape
            or of narrower blocks.

    Returns:
        qdata [N, K], or narrower.
    """
    chunks = []
    start = 0  # first row of blocks in the chunk
    for chunk in split_into_chunks(weight, height):
        block_rows = len(chunk) // height
        chunk_scale = scale[start : start + block_rows, None, :, None]  # [n, 1, K / width, 1]
        start += block_rows
        divided = chunk.float().reshape(block_rows, height, scale.shape[1], -1) / chunk_scale
        divided.masked_fill_(chunk_scale == 0, 0)
        chunks.append(encode(divided).reshape(len(chunk), -1))
    return torch.cat(chunks)


def split_into_chunks(weight: Tensor, height: int) -> tuple[Tensor, ...]:
    """Split a weight into whole rows of blocks that fit the cache; temporaries are as large as a chunk."""
    block_rows = max(1, CHUNK_ELEMENTS // (height * weight.shape[1]))
    chunks: tuple[Tensor, ...] = weight.split(height * block_rows)
    return chunks


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of a dtype, clamped to its range. x: float32, overwritten."""
    max_value = QDATA_RANGES[dtype].max_value
    if dtype == torch.int8:
        x = x.round_()
    return x.clamp_(-max_value, max_value).to(dtype)


def pack_e2m1_pairs(x: Tensor) -> Tensor:
    """Round to e2m1 and pack pairs, even columns in the high half of a byte.

    A number has a sign, two bits of exponent and one of mantissa.

    Args:
        x: float32 [..., C].

    Returns:
        uint8 [..., C / 2].
    """
    magnitude = x.abs().clamp_(max=max(E2M1))
    # the code of a magnitude is its place in E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Steps are 0.5 up to 2, 1 up to
    # 4, then 2
    fine = (2 * magnitude).round_()
    middle = magnitude.round() + 2
    coarse = (magnitude / 2).round_() + 4
    codes = torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse))
    sign = x.signbit().to(torch.uint8) << 3
    codes = codes.to(torch.uint8) | sign
    return codes[..., ::2] << 4 | codes[..., 1::2]


def swizzle_scales(scale: Tensor) -> Tensor:
    """Lay scales out in cuBLAS's tiles, as `compute_swizzled_offsets` describes; what is padded is 0.

    Args:
        scale: uint8 [rows, columns].

    Returns:
        uint8 [rows up to a multiple of 128, columns up to a multiple of 4].
    """
    tile_rows, tile_columns = SCALE_TILE
    rows, columns = round_up(scale.shape[0], tile_rows), round_up(scale.shape[1], tile_columns)
    padded = F.pad(scale, (0, columns - scale.shape[1], 0, rows - scale.shape[0]))
    # the four quarters of a tile's 128 rows lie side by side:
    # [rows, columns] -> [tiles down, quarter, row in it, tiles across, column in it]
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)
