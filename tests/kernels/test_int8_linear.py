"""The INT8 linear layer: the exact product, the scales and the bias."""

import pytest
import torch
from support.helpers import full_range, randn

from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("k", [1, 7, 130, 1040, 16385])
def test_accumulation_is_exact_over_the_full_range(k):
    q, qdata = full_range(3, k), full_range(5, k, seed=1)
    exact = q.long() @ qdata.long().T

    assert torch.equal(int8_linear(q, torch.ones(3, 1), qdata, torch.ones(5), None), exact.float())


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sum_at_large_k_is_exact(sign):
    k = 16385
    q, qdata = torch.full((1, k), 127 * sign, dtype=torch.int8), torch.full((2, k), 127, dtype=torch.int8)
    y = int8_linear(q, torch.ones(1, 1), qdata, torch.ones(2), None)

    # 264273665 is past float32's whole numbers: rounded once, not once per product
    assert y.tolist() == [[torch.tensor(sign * k * 127 * 127, dtype=torch.float32).item()] * 2]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (2, 9, 8)])
def test_rows_and_columns_have_their_own_scales_and_bias(m, n, k):
    q, qdata = full_range(m, k), full_range(n, k, seed=1)
    # powers of two keep the arithmetic exact
    x_scale, w_scale, bias = 2.0 ** -torch.arange(m)[:, None], 2.0 ** torch.arange(n), torch.arange(n).float()
    y = int8_linear(q, x_scale, qdata, w_scale, bias)

    for i in range(m):
        for j in range(n):
            total = sum(a * b for a, b in zip(q[i].tolist(), qdata[j].tolist(), strict=True))
            assert y[i, j].item() == total * 2.0**-i * 2.0**j + j


def test_no_bias_equals_a_zero_bias():
    q, qdata, x_scale, w_scale = (
        full_range(3, 11),
        full_range(4, 11, seed=1),
        randn(3, 1).abs(),
        randn(4, seed=1).abs(),
    )
    assert torch.equal(
        int8_linear(q, x_scale, qdata, w_scale, None), int8_linear(q, x_scale, qdata, w_scale, torch.zeros(4))
    )


def test_whole_numbers_are_exact():
    x, weight = full_range(5, 33).float(), full_range(6, 33, seed=1).float()
    x[:, 0], weight[:, 0] = 127, -127
    (q, x_scale), (qdata, w_scale) = quantize_rowwise(x), quantize_rowwise(weight)

    assert torch.equal(int8_linear(q, x_scale, qdata, w_scale[:, 0], None), x @ weight.T)
