"""The few-pass version gives the reference's numbers, bit for bit."""

import pytest
import torch

from int8run.kernels.quantize_rowwise.eager import quantize_rowwise as eager
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 130), (2, 5, 384)], ids=str)
def test_eager_equals_the_reference(shape, dtype, poisoned_memory):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 0, :] = 0  # a row without any signal
    before = x.clone()
    q, scale = eager(x)
    expected, expected_scale = reference(x)

    assert q.dtype == torch.int8
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)

    unsigned, unsigned_scale = eager(x, zero_point=128)

    assert unsigned.dtype == torch.uint8
    assert torch.equal(unsigned.int() - 128, expected.int())
    assert torch.equal(unsigned_scale, scale)
    assert torch.equal(x, before)


def test_ties_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert eager(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]
