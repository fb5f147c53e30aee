"""How a grouped weight lies in memory for the Triton product, and what it looks up.

A step of the product along K must turn bytes into int8 operands without moving numbers between threads. So
the codes of a byte are not neighbors, as in files, but belong to different *pieces* of 32 columns. A span is
what its bytes hold together: two pieces with 4 bits, four with 6 bits.

      columns of a row      0 ... 31   32 ... 63   64 ... 95   96 ... 127   128 ...
                           +---------+-----------+-----------+------------+---------
      4 bits               | piece 0 |  piece 1  |  piece 0  |  piece 1   |   ...
                           +---------+-----------+-----------+------------+---------
                            \ span 0, 32 bytes  / \ span 1, 32 bytes     /

      byte j of span s     bits 0..3  the code of column 64 s + j
                           bits 4..7  the code of column 64 s + 32 + j

With 6 bits the low four bits of each code lie like that (64 bytes for a span of 128 columns: pieces 0 and 1,
then pieces 2 and 3), for all spans of the row; then its upper two bits, 32 bytes for a span:

      byte j of span s     bits 2 p, 2 p + 1  the upper bits of column 128 s + 32 p + j, p = 0..3

A piece is as deep as one int8 tensor-core instruction, and 32 bytes are what memory moves at once. The last
span of a row is padded with zeros; the product multiplies them by zeros.

Scales lie transposed, [K / g, N]: a program needs those of one group for many rows of the weight. Scales of
one byte (e4m3) are not converted at all. There are 256 of them, so that a table has the int8 number of each
scale and each code, and a code is decoded by looking it up. Its bytes stand before the scales:

      +--------------------------------+-----------------------------------+
      |  table, int8 [256, 2 ** bits]  |  scales, e4m3 bits [K / g, N]     |
      +--------------------------------+-----------------------------------+
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.grouped_weight.reference import NIBBLE, decode_grouped_weight, pack_codes
from int8run.kernels.triton_calls import Layout

PIECE = 32  # columns
PIECES = {4: 2, 6: 4}  # bits -> pieces of a span
E4M3_SCALES = 256
GROUP_MULTIPLE = 16  # columns, of larger groups; smaller ones divide it


class PackedCodes(NamedTuple):
    """A weight [N, K] in the layout above.

    Args:
        codes: uint8 [N, bytes], from `pack_pieces`.
        group_scale: float32 or uint8, from `pack_scales`.
        codebook: float32 [16], needed with scales of float32 alone; None: levels are even.
        bits: 4 or 6.
        group: columns that share a scale.
    """

    codes: Tensor
    group_scale: Tensor
    codebook: Tensor | None
    bits: int
    group: int


def count_span_columns(bits: int) -> int:
    """Columns of a span: a step of the product is a multiple of it."""
    return PIECES[bits] * PIECE


def is_supported_group(group: int) -> bool:
    """Whether groups of this many columns end with pieces of the layout, or divide them."""
    return group > 0 and (GROUP_MULTIPLE % group == 0 or group % GROUP_MULTIPLE == 0)


def pack_pieces(codes: Tensor, bits: int) -> Tensor:
    """Codes in the layout above.

    Args:
        codes: uint8 [N, K] in 0 .. 2**bits - 1.
        bits: 4 or 6.

    Returns:
        uint8 [N, K * bits / 8], K rounded up to whole spans.
    """
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % count_span_columns(bits)))
    pieces = padded.view(rows, -1, PIECES[bits], PIECE)
    low = pieces & NIBBLE
    nibbles = low[:, :, 0::2] | (low[:, :, 1::2] << 4)  # [N, spans, pieces / 2, 32]
    if bits == 4:
        return nibbles.flatten(1).contiguous()
    high = pieces >> 4
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return torch.cat([nibbles.flatten(1), pairs.flatten(1)], dim=1)


def unpack_pieces(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_pieces`. columns: K. Returns uint8 [N, K]."""
    rows = packed.shape[0]
    padded = packed.shape[1] * 8 // bits
    nibbles = packed[:, : padded // 2].view(rows, -1, PIECES[bits] // 2, PIECE)
    codes = torch.stack([nibbles & NIBBLE, nibbles >> 4], dim=3)  # [N, spans, pieces / 2, 2, 32]
    codes = codes.view(rows, -1, PIECES[bits], PIECE)
    if bits == 6:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
        pairs = packed[:, padded // 2 :].reshape(rows, -1, 1, PIECE)
        codes = codes | ((pairs >> shifts[:, None]) & 3) << 4
    return codes.reshape(rows, padded)[:, :columns].contiguous()


def build_decode_table(bits: int, codebook: Tensor | None) -> Tensor:
    """The int8 number of each scale of a byte and each code, by the definition: int8 [256, 2**bits]."""
    scales = torch.arange(E4M3_SCALES, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.arange(2**bits, dtype=torch.uint8).expand(E4M3_SCALES, -1)
    levels = None if codebook is None else codebook.cpu()
    return decode_grouped_weight(pack_codes(codes, bits), scales[:, None], bits=bits, codebook=levels)


def pack_scales(group_scale: Tensor, bits: int, codebook: Tensor | None) -> Tensor:
    """Scales in the layout above.

    Args:
        group_scale: float8_e4m3fn or float32 [N, K / g].
        bits: 4 or 6.
        codebook: float32 [16] or None.

    Returns:
        float32 [K / g, N]; of e4m3 uint8, one number after the other: the table, then [K / g, N].
    """
    transposed = group_scale.T.contiguous()
    if transposed.dtype == torch.float32:
        return transposed
    table = build_decode_table(bits, codebook).view(torch.uint8).to(group_scale.device)
    return torch.cat([table.flatten(), transposed.view(torch.uint8).flatten()])


def unpack_scales(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_scales`. rows: N. Returns [N, K / g]."""
    if packed.dtype == torch.float32:
        return packed.T.contiguous()
    scales = packed[E4M3_SCALES * 2**bits :].view(torch.float8_e4m3fn)
    return scales.view(-1, rows).T.contiguous()


def check_groups(
    codes: Layout,
    group_scale: Layout,
    codebook: Layout | None,
    *,
    columns: int,
    bits: int,
    group: int,
) -> None:
    """Check a packed weight [N, columns].

    Raises:
        ValueError: for what the kernel does not take.
    """
    if bits not in PIECES:
        raise ValueError(f"bits must be 4 or 6, not {bits}")
    if not is_supported_group(group) or columns % group:
        raise ValueError(f"group must divide K, {columns}, and be a divisor or a multiple of 16, not {group}")
    rows = codes.shape[0]
    span = count_span_columns(bits)
    row_bytes = -(-columns // span) * span * bits // 8
    if not codes.is_contiguous((rows, row_bytes), torch.uint8):
        raise ValueError(
            f"codes must be contiguous uint8 [N, {row_bytes}], not {codes.dtype} {list(codes.shape)}"
        )
    groups = columns // group
    bytes_of_scales = E4M3_SCALES * 2**bits + groups * rows
    is_float = group_scale.is_contiguous((groups, rows), torch.float32)
    if not is_float and not group_scale.is_contiguous((bytes_of_scales,), torch.uint8):
        raise ValueError(
            f"group_scale must be contiguous float32 [{groups}, {rows}] or uint8 [{bytes_of_scales}], not "
            f"{group_scale.dtype} {list(group_scale.shape)}"
        )
    if codebook is not None and not codebook.is_contiguous((2**bits,), torch.float32):
        raise ValueError(
            f"codebook must be contiguous float32 [{2**bits}], not {codebook.dtype} {list(codebook.shape)}"
        )
