"""The definition of the INT8 convolution, beside float convolutions and sums that are written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.helpers import full_range, randn

from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, rotate_groups
from int8run.kernels.int8_conv.reference import GroupNorm, int8_conv, normalize, quantize_pixels
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise


def quantize_outputs(weight):
    """A float weight as int8, with a scale for each output channel."""
    q, scale = quantize_rowwise(weight.flatten(1))
    return q.view(weight.shape), scale[:, 0]


def measure_sqnr(expected, y):
    error = (expected.double() - y.double()).square().mean()
    return 10 * torch.log10(expected.double().square().mean() / error).item()


def test_pixels_come_back_within_half_a_step_of_their_own_scale():
    x = F.silu(randn(2, 13, 5, 4))
    x[0, :, 2, 3] *= 1000
    pixels = quantize_pixels(x)

    error = (pixels.q * pixels.scale + pixels.center - x).abs()
    assert (error <= 0.501 * pixels.scale).all()
    reached = pixels.q.flatten(2)
    assert (reached.amin(1) == -127).all()
    assert (reached.amax(1) == 127).all()


def test_a_pixel_of_one_value_is_exact():
    x = randn(2, 1, 3, 3)
    pixels = quantize_pixels(x)

    assert torch.equal(pixels.q * pixels.scale + pixels.center, x)


def test_sums_are_those_of_the_formula():
    x, qdata = randn(1, 3, 4, 3), full_range(2, 27).view(2, 3, 3, 3)
    w_scale, bias = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -3.0])
    y = int8_conv(x, qdata, w_scale, bias, stride=(2, 1), padding=1)

    assert y.shape == (1, 2, 2, 3)
    pixels = quantize_pixels(x)
    for channel, row, column in itertools.product(range(2), range(2), range(3)):
        total = 0.0
        for i, j in itertools.product(range(3), range(3)):
            from_row, from_column = 2 * row - 1 + i, column - 1 + j
            if not (0 <= from_row < 4 and 0 <= from_column < 3):
                continue
            weights = qdata[channel, :, i, j].long()
            product = (pixels.q[0, :, from_row, from_column].long() * weights).sum().item()
            total += pixels.scale[0, 0, from_row, from_column].item() * product
            total += pixels.center[0, 0, from_row, from_column].item() * weights.sum().item()
        expected = total * w_scale[channel].item() + bias[channel].item()
        assert y[0, channel, row, column].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 64, 9, 7), (1, 1), {}),
        ((2, 64, 9, 7), (3, 3), {"padding": 1}),
        ((1, 64, 9, 7), (3, 3), {"padding": 1, "stride": 2}),
        ((1, 64, 9, 7), (3, 3), {"padding": 1, "groups": 4}),
        ((1, 64, 3, 5, 6), (3, 3, 3), {"padding": 1}),
        ((1, 64, 3, 5, 6), (3, 1, 1), {"padding": (1, 0, 0)}),
        ((1, 64, 1, 1), (3, 3), {"padding": 1}),
    ],
    ids=str,
)
def test_it_is_near_the_float_convolution(shape, kernel, options):
    x = F.silu(randn(*shape))
    weight = randn(32, shape[1] // options.get("groups", 1), *kernel, seed=1)
    expected = (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, **options)
    y = int8_conv(x, *quantize_outputs(weight), None, **options)

    assert y.shape == expected.shape
    assert measure_sqnr(expected, y) > 35


def test_silu_and_rotation_come_before_rounding():
    rotation = Rotation(regular_hadamard(16))
    x, weight = randn(1, 32, 5, 5), randn(8, 32, 3, 3, seed=1)
    rotated = rotate_groups(weight.movedim(1, -1), rotation.matrix).movedim(-1, 1)
    y = int8_conv(x, *quantize_outputs(rotated), None, padding=1, rotation=rotation, silu=True)

    assert measure_sqnr(F.conv2d(F.silu(x), weight, padding=1), y) > 35


@pytest.mark.parametrize("shape", [(2, 12, 5, 4), (2, 12, 3, 2, 2)], ids=str)
def test_a_norm_is_torchs(shape):
    x, weight, bias = 3 * randn(*shape) + 100, randn(12, seed=1), randn(12, seed=2)

    for given in ((weight, bias), (None, None)):
        expected = F.group_norm(x.double(), 3, *(None if each is None else each.double() for each in given))
        made = normalize(x, GroupNorm(3, *given, 1e-5))
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)


def test_norm_and_silu_come_before_rounding():
    x, weight = 2 * randn(1, 32, 5, 5) + 1, randn(8, 32, 3, 3, seed=1)
    norm = GroupNorm(4, 1 + randn(32, seed=2), randn(32, seed=3), 1e-5)
    y = int8_conv(x, *quantize_outputs(weight), None, padding=1, norm=norm, silu=True)

    normed = F.group_norm(x, 4, norm.weight, norm.bias)
    assert measure_sqnr(F.conv2d(F.silu(normed), weight, padding=1), y) > 35


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_no_number_stays_with_the_pixels_that_meet_it(value):
    x = randn(1, 8, 5, 5)
    x[0, 3, 1, 1] = value
    y = int8_conv(x, *quantize_outputs(randn(4, 8, 3, 3)), None, padding=1)

    meets = torch.zeros(5, 5, dtype=torch.bool)
    meets[:3, :3] = True
    assert (y.isfinite() == ~meets).all()


def test_the_largest_numbers_of_float32_do_not_overflow():
    x = 3e38 * torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
    pixels = quantize_pixels(x)

    torch.testing.assert_close(pixels.q * pixels.scale + pixels.center, x, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_result_has_the_dtype_of_the_input(dtype):
    x, (qdata, w_scale) = randn(1, 8, 4, 4, dtype=dtype), quantize_outputs(randn(4, 8, 3, 3))
    y = int8_conv(x, qdata, w_scale, randn(4))

    assert y.dtype == dtype
    assert torch.equal(y, int8_conv(x.float(), qdata, w_scale, randn(4)).to(dtype))


def test_an_empty_batch_gives_an_empty_result():
    assert int8_conv(randn(0, 8, 4, 4), full_range(4, 8)[..., None, None], torch.ones(4), None).shape == (
        0,
        4,
        4,
        4,
    )


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 4, 4), {"dilation": 2}, "no dilation"),
        ((1, 7, 4, 4), {}, "7 channels in 1 groups do not fit"),
        ((1, 8, 4, 4), {"groups": 3}, "8 channels in 3 groups do not fit"),
        ((8, 4, 4), {}, r"not \[8, 4, 4\]"),
        ((1, 8, 2, 4), {}, "smaller than the kernel"),
        ((1, 8, 4, 4), {"stride": 0}, "stride is 1 or more"),
        ((1, 8, 4, 4), {"padding": (1, 1, 1)}, "one number or 2"),
    ],
    ids=str,
)
def test_what_is_no_such_convolution_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        int8_conv(randn(*shape), full_range(4, 72).view(4, 8, 3, 3), torch.ones(4), None, **options)
