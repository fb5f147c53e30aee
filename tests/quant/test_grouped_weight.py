"""`GroupedWeight`: what its parts stand for."""

import torch

from int8run.kernels.grouped_weight.reference import pack_codes
from int8run.quant.grouped_weight import GroupedWeight


def make_weight(bits=4, correction=None):
    codes = torch.randint(0, 2**bits, (6, 32), dtype=torch.uint8)
    return GroupedWeight(
        codes=pack_codes(codes, bits),
        group_scale=torch.rand(6, 2) * 10,
        scale=torch.rand(6, 1),
        bits=bits,
        correction=correction,
    )


def test_shape_and_group_size_follow_from_the_tensors():
    weight = make_weight(bits=6)

    assert weight.shape == (6, 32)
    assert weight.group_size == 16


def test_dequantizing_is_decoding_times_the_scale_of_the_row():
    weight = make_weight()

    decoded = weight.decode()

    assert decoded.qdata.dtype == torch.int8
    assert torch.equal(weight.dequantize(), decoded.qdata.float() * weight.scale)


def test_a_correction_shifts_every_column_of_its_group():
    correction = torch.tensor([[1.0] * 6, [2.0] * 6])
    weight = make_weight(correction=correction)

    shift = weight.dequantize() - weight.decode().dequantize()

    assert torch.allclose(shift, torch.cat([torch.ones(6, 16), torch.full((6, 16), 2.0)], dim=1), atol=1e-5)


def test_rows_of_a_weight_are_rows_of_what_it_stands_for():
    weight = make_weight(correction=torch.rand(2, 6))

    assert torch.equal(weight.select_rows(2, 5).dequantize(), weight.dequantize()[2:5])
