"""Every outlier method: exact before rounding, and worth its name after it."""

import pytest
import torch
from helpers import assert_close, full_range, randn, shipped

from int8run.errors import ConfigError
from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier

METHODS = shipped("outlier")
# divided by 256, by a smaller power of 4, by 4 only, by none
WIDTHS = [256, 1024, 384, 1920, 12, 20, 7]
TAKEN = [(name, width) for name, method in METHODS.items() for width in WIDTHS if method.fit(torch.zeros(1, width)) is not None]


@pytest.mark.parametrize(("name", "width"), TAKEN)
def test_the_product_does_not_change_before_rounding(name, width):
    x, weight = randn(3, width), randn(5, width, seed=1)
    transform = METHODS[name].fit(weight)
    product = transform.transform_input(x).double() @ transform.transform_weight(weight).double().T
    assert_close(f"{name} at {width}", product, x.double() @ weight.double().T, 1e-6)


@pytest.mark.parametrize("width", WIDTHS[:-1])
def test_convrot_is_exact_on_whole_numbers(width):
    x, weight = full_range(3, width).float(), full_range(5, width, seed=1).float()
    transform = ConvRot().fit(weight)
    product = transform.transform_input(x).double() @ transform.transform_weight(weight).double().T
    assert torch.equal(product, x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_input_keeps_its_dtype_and_loses_one_rounding(name, dtype):
    x, weight = randn(4, 256, dtype=dtype), randn(5, 256, seed=1)
    transform = METHODS[name].fit(weight)
    moved = transform.transform_input(x)
    assert moved.dtype == dtype
    product = moved.double() @ transform.transform_weight(weight).double().T
    assert_close(f"{name} in {dtype}", product, x.double() @ weight.double().T, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("width", "group"), [(256, 256), (1024, 256), (1920, 64), (384, 64), (48, 16), (20, 4), (12, 4), (18, None), (7, None), (1, None)]
)
def test_convrot_takes_the_largest_power_of_4_that_divides(width, group):
    transform = ConvRot().fit(torch.zeros(2, width))
    assert (transform and transform.group_size) == group


@pytest.mark.parametrize(("asked", "width", "group"), [(1024, 2048, 1024), (1024, 256, 256), (16, 256, 16), (4, 256, 4)])
def test_convrot_group_size_is_the_upper_limit(asked, width, group):
    assert ConvRot(asked).fit(torch.zeros(2, width)).group_size == group


@pytest.mark.parametrize("size", [0, 8, 128, 257, 4096])
def test_convrot_refuses_other_group_sizes(size):
    with pytest.raises(ConfigError, match=rf"outlier\.group_size is {size}; convrot takes 4, 16, 64, 256 or 1024"):
        ConvRot(size)


def rounded_error(method, x, weight):
    transform = method.fit(weight)
    qdata, w_scale = quantize_rowwise(transform.transform_weight(weight))
    q, x_scale = quantize_rowwise(transform.transform_input(x))
    exact = x.double() @ weight.double().T
    error = int8_linear(q, x_scale, qdata, w_scale[:, 0], None).double() - exact
    return (error.pow(2).mean() / exact.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [64, 256, 384])
def test_convrot_beats_none_on_an_outlier_channel(width, seed):
    x, weight = randn(32, width, seed=seed), randn(48, width, seed=seed + 100)
    x[:, 3] *= 100
    # a small column, as trained models have for such a channel; else the product is this one feature
    weight[:, 3] *= 0.01
    plain, rotated = rounded_error(NoOutlier(), x, weight), rounded_error(ConvRot(), x, weight)
    assert rotated < 0.5 * plain
