"""Weights of 4 or 6 bits with a scale for each group of columns, decoded to int8, written to be read.

A code of 4 or 6 bits names a level; level times the scale of its group, rounded, is an int8 number; int8
times the scale of its row is the weight. So the product stays an int8 product of the whole row (W4A8).
The numbers are those of `asym_w4a8_int8` in comfy-kitchen 0.2.40.

A row of K codes is stored as K / 2 bytes with four bits of each code, the even column in the low nibble. With
6 bits, K / 4 bytes with the upper two bits of each code follow, column c at bit 2 (c mod 4) of byte c // 4.
"""

import torch
from torch import Tensor

INT8_MAX = 127
BITS = (4, 6)
NIBBLE = 0x0F


def count_row_bytes(columns: int, bits: int) -> int:
    """Stored bytes of a row of that many codes."""
    return columns * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in as many bits as they need.

    Args:
        codes: uint8 [N, K] in 0 .. 2**bits - 1; K is even, at 6 bits a multiple of 4.
        bits: 4 or 6.

    Returns:
        int8 [N, K * bits / 8].
    """
    low = codes & NIBBLE
    nibbles = low[:, 0::2] | (low[:, 1::2] << 4)
    if bits == 4:
        return nibbles.contiguous().view(torch.int8)
    high = codes >> 4
    pairs = high[:, 0::4] | (high[:, 1::4] << 2) | (high[:, 2::4] << 4) | (high[:, 3::4] << 6)
    return torch.cat([nibbles, pairs], dim=1).view(torch.int8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`. packed: int8 or uint8 [N, K * bits / 8]. Returns uint8 [N, K]."""
    rows, row_bytes = packed.shape
    columns = row_bytes * 8 // bits
    packed = packed.view(torch.uint8)
    nibbles = packed[:, : columns // 2]
    codes = torch.stack([nibbles & NIBBLE, nibbles >> 4], dim=-1).reshape(rows, columns)
    if bits == 4:
        return codes
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    pairs = packed[:, columns // 2 :]  # [N, K / 4]
    high = ((pairs.unsqueeze(-1) >> shifts) & 3).reshape(rows, columns)
    return codes | (high << 4)


def compute_levels(bits: int, codebook: Tensor | None = None) -> Tensor:
    """The level of each code: the codebook's, or the integers about zero. Returns float32 [2**bits]."""
    if codebook is not None:
        return codebook.float()
    count = 2**bits
    codes = torch.arange(count, dtype=torch.float32)
    levels: Tensor = codes - count // 2
    return levels


def decode_grouped_weight(
    packed: Tensor, group_scale: Tensor, *, bits: int, codebook: Tensor | None = None
) -> Tensor:
    """`q[n, k] = round_half_even(level[code[n, k]] * group_scale[n, k // g])`, clamped to -127..127.

    Args:
        packed: from `pack_codes`, [N, K * bits / 8].
        group_scale: float8_e4m3fn or float32 [N, K / g], where g divides K.
        bits: 4 or 6.
        codebook: float32 [2**bits], or None: levels are the integers from -2**(bits - 1) on.

    Returns:
        int8 [N, K].
    """
    codes = unpack_codes(packed, bits)
    rows, columns = codes.shape
    levels = compute_levels(bits, codebook).to(packed.device)
    scale = group_scale.float()
    group_size = columns // scale.shape[1]
    products: Tensor = levels[codes.long()].view(rows, columns // group_size, group_size) * scale.unsqueeze(
        -1
    )
    return products.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).view(rows, columns)
