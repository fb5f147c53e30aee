"""Codes of 4 and 6 bits: their layout in bytes, and the int8 numbers that they stand for."""

import pytest
import torch

from int8run.kernels.grouped_weight.layout import (
    build_decode_table,
    count_span_columns,
    pack_pieces,
    pack_scales,
    unpack_pieces,
    unpack_scales,
)
from int8run.kernels.grouped_weight.reference import (
    compute_levels,
    count_row_bytes,
    decode_grouped_weight,
    pack_codes,
    unpack_codes,
)


@pytest.mark.parametrize("bits", [4, 6])
def test_codes_come_back_out_of_their_bytes(bits):
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)

    packed = pack_codes(codes, bits)

    assert packed.dtype == torch.int8
    assert packed.shape == (5, count_row_bytes(64, bits))
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_even_columns_are_in_the_low_nibble():
    packed = pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), bits=4)

    assert packed.view(torch.uint8).tolist() == [[0x21, 0x0F]]


def test_the_upper_two_bits_of_six_follow_the_nibbles():
    # 0b01_0010, 0b11_1111, 0b10_0000, 0b00_0101
    packed = pack_codes(torch.tensor([[0x12, 0x3F, 0x20, 0x05]], dtype=torch.uint8), bits=6)

    assert packed.view(torch.uint8).tolist() == [[0xF2, 0x50, 0b00_10_11_01]]


def test_levels_are_integers_about_zero_or_those_of_the_codebook():
    codebook = torch.linspace(-1, 1, 16)

    assert compute_levels(4).tolist() == list(range(-8, 8))
    assert compute_levels(6).tolist() == list(range(-32, 32))
    assert torch.equal(compute_levels(4, codebook), codebook)


def test_a_code_is_level_times_group_scale_rounded_to_even_and_clamped():
    codes = torch.tensor([[0, 7, 9, 15] * 2], dtype=torch.uint8)
    group_scale = torch.tensor([[2.5, 100.0]])

    decoded = decode_grouped_weight(pack_codes(codes, 4), group_scale, bits=4)

    # levels -8, -1, 1, 7: times 2.5 with ties to even, times 100 clamped
    assert decoded.tolist() == [[-20, -2, 2, 18, -127, -100, 100, 127]]


def test_scales_of_a_byte_decode_as_their_float_values():
    codes = torch.randint(0, 16, (3, 32), dtype=torch.uint8)
    group_scale = torch.rand(3, 2).mul(16).to(torch.float8_e4m3fn)
    packed = pack_codes(codes, 4)

    of_bytes = decode_grouped_weight(packed, group_scale, bits=4)

    assert torch.equal(of_bytes, decode_grouped_weight(packed, group_scale.float(), bits=4))


@pytest.mark.parametrize("columns", [16, 64, 160, 256])
@pytest.mark.parametrize("bits", [4, 6])
def test_codes_come_back_out_of_pieces(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)

    packed = pack_pieces(codes, bits)

    spans = -(-columns // count_span_columns(bits))
    assert packed.shape == (3, count_row_bytes(spans * count_span_columns(bits), bits))
    assert torch.equal(unpack_pieces(packed, bits, columns), codes)


def test_the_nibbles_of_a_byte_are_32_columns_apart():
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    codes[:, 32:] = 15 - codes[:, 32:]

    packed = pack_pieces(codes, bits=4)

    assert packed[0, :16].tolist() == [c | (15 - c) << 4 for c in range(16)]


def test_the_upper_bits_of_four_pieces_share_a_byte_behind_the_nibbles():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    # in the second span, the column 5 of each piece
    codes[0, [133, 165, 197, 229]] = torch.tensor([0x1F, 0x20, 0x31, 0x02], dtype=torch.uint8)

    packed = pack_pieces(codes, bits=6)[0]

    assert packed.shape == (192,)
    assert packed[64 + 5] == 0x0F and packed[64 + 32 + 5] == 0x21
    assert packed[128 + 32 + 5] == 0b00_11_10_01


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_scales_come_back_out_of_their_layout(dtype):
    group_scale = torch.rand(6, 4).mul(16).to(dtype)

    packed = pack_scales(group_scale, bits=4, codebook=None)

    assert torch.equal(unpack_scales(packed, bits=4, rows=6).float(), group_scale.float())


@pytest.mark.parametrize(("bits", "codebook"), [(4, None), (4, torch.linspace(-1, 1, 16)), (6, None)])
def test_the_table_has_the_number_of_each_scale_and_code(bits, codebook):
    table = build_decode_table(bits, codebook)

    assert table.shape == (256, 2**bits)
    for scale in (0.0, 0.5, 9.0, 448.0):
        byte = torch.tensor(scale).to(torch.float8_e4m3fn).view(torch.uint8).item()
        products = compute_levels(bits, codebook) * scale
        assert torch.equal(table[byte], products.round().clamp(-127, 127).to(torch.int8))
