"""Per-row int8: the definition's own properties."""

import pytest
import torch
from support.helpers import randn

from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(1, 1), (3, 7), (5, 8), (17, 130), (2, 3, 33), (13,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_is_absmax_over_127(shape):
    x = randn(*shape)
    q, scale = quantize_rowwise(x)

    assert q.shape == x.shape
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(scale, x.abs().amax(dim=-1, keepdim=True) / 127)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_half_a_step(shape):
    x = randn(*shape)
    q, scale = quantize_rowwise(x)

    # x / scale is itself rounded to float32
    assert ((x - q * scale).abs() <= scale * (0.5 + 127 * 2**-23)).all()


def test_ties_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5]])
    q, _ = quantize_rowwise(x)

    assert q.tolist() == [[127, 0, 2, 2, 126, 0, -2, -2, -126]]


def test_zero_rows_stay_zero_and_do_not_affect_others():
    x = randn(3, 9)
    alone = quantize_rowwise(x[[0, 2]])
    x[1] = 0
    q, scale = quantize_rowwise(x)

    assert (q[1] == 0).all()
    assert scale[1].isfinite()
    assert scale[1] > 0
    assert torch.equal(q[[0, 2]], alone[0])
    assert torch.equal(scale[[0, 2]], alone[1])


def test_the_largest_entry_becomes_127_and_minus_128_never_occurs():
    # many rows, because x / scale passes 127 by a rounding in some of them only
    x = -randn(4096, 3).abs()
    q, _ = quantize_rowwise(x)

    assert (q.amin(dim=-1) == -127).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = randn(6, 21, dtype=dtype)
    for got, expected in zip(quantize_rowwise(x), quantize_rowwise(x.float()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("peak", [65504.0, 6e-8], ids=["largest", "smallest"])
def test_float16_extremes_are_quantized(peak):
    q, scale = quantize_rowwise(torch.tensor([[peak, -peak, 0.0]], dtype=torch.float16))
    assert q.tolist() == [[127, -127, 0]]
    assert scale.isfinite().all()
