"""Codes of 4 and 6 bits: their layout in bytes, and the int8 numbers that they stand for."""

import pytest
import torch

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
