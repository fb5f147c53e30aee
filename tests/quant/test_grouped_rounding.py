"""Weights of 4 and 6 bits: their errors, their scales, and what cannot be rounded to them."""

import pytest
import torch
from support.helpers import randn, shipped

from int8run.errors import ConfigError
from int8run.kernels.grouped_weight.reference import unpack_codes
from int8run.outlier.convrot import ConvRot
from int8run.quant.codebook import FIXED_LEVELS, choose_codebook, fit_codebook
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight, find_layout, list_neighbors
from int8run.quant.rounding import AbsMax, Gptq, Mse, round_to_bits

ROUNDINGS = shipped("rounding")
LAYOUTS = [GroupLayout(4), GroupLayout(6), GroupLayout(4, 4), GroupLayout(4, 32), GroupLayout(6, 64)]


def make_rotated(rows=256, columns=512, seed=0):
    weight = randn(rows, columns, seed=seed)
    return ConvRot(256).fit(weight).transform_weight(weight)


def compute_relative_error(approximation, exact):
    return ((approximation - exact).norm() / exact.norm()).item()


def round_weight(rounding, weight, layout, inputs=None):
    if inputs is None:
        inputs = randn(64, weight.shape[1], seed=9)
    return rounding.round_groups(weight, inputs, layout)


# --- errors


@pytest.mark.parametrize(
    ("rounding", "bits", "least", "most"),
    [
        (AbsMax(), 4, 0.071, 0.074),  # comfy-kitchen's own: 0.073
        (Mse(), 4, 0.069, 0.072),
        (AbsMax(), 6, 0.019, 0.022),
        (Mse(), 6, 0.019, 0.021),
    ],
)
def test_the_error_of_normal_weights_is_known(rounding, bits, least, most):
    weight = make_rotated()
    error = compute_relative_error(round_weight(rounding, weight, GroupLayout(bits)).dequantize(), weight)

    assert least < error < most


@pytest.mark.parametrize("bits", [4, 6])
def test_gptq_has_the_least_error_in_the_output(bits):
    weight, x = make_rotated(), randn(1024, 512, seed=1) @ randn(512, 512, seed=2)
    fitted, judged = x[:512], x[512:]

    def measure(rounding):
        rounded = round_weight(rounding, weight, GroupLayout(bits), fitted).dequantize()
        return compute_relative_error(judged @ rounded.T, judged @ weight.T)

    assert measure(Gptq()) < 0.95 * measure(Mse())
    assert measure(Mse()) < measure(AbsMax())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_and_scales_have_their_shapes_and_ranges(name, layout):
    weight = make_rotated(rows=6, columns=128 + 128)
    before = weight.clone()
    rounded = round_weight(ROUNDINGS[name], weight, layout)

    assert torch.equal(weight, before)
    assert rounded.shape == (6, 256)
    assert rounded.group_size == layout.group_size
    assert rounded.group_scale.dtype == torch.float8_e4m3fn
    assert rounded.scale.shape == (6, 1) and (rounded.scale > 0).all()
    codes = unpack_codes(rounded.codes, layout.bits)
    assert codes.max() < 2**layout.bits
    assert rounded.decode().qdata.abs().max() <= 127
    assert compute_relative_error(rounded.dequantize(), weight) < 0.12
    if layout.bits == 6:
        assert rounded.codebook is None and codes.min() >= 1


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("bits", [4, 6])
def test_rows_of_zeros_and_of_any_size_are_rounded(name, bits):
    weight = torch.cat(
        [torch.zeros(1, 64), 1e-12 * randn(1, 64), 1e12 * randn(1, 64), torch.full((1, 64), 0.3)]
    )
    rounded = round_weight(ROUNDINGS[name], weight, GroupLayout(bits))

    found = rounded.dequantize()
    assert found.isfinite().all()
    for row, exact in zip(found[1:], weight[1:], strict=True):
        assert compute_relative_error(row, exact) < 0.12


@pytest.mark.parametrize("bits", [4, 6])
def test_a_larger_search_is_never_worse_for_a_group(bits):
    weight = make_rotated(rows=64)

    def measure_groups(rounding):
        difference = round_weight(rounding, weight, GroupLayout(bits)).dequantize() - weight
        return difference.unflatten(1, (-1, 16)).square().sum(2)

    # to within the rounding of the sums
    assert (measure_groups(Mse()) <= measure_groups(AbsMax()) * (1 + 1e-4)).all()


# --- levels


def test_normal_weights_have_the_fixed_levels_and_others_their_own():
    normal = randn(64, 256)
    heavy = randn(64, 256).pow(5)

    assert choose_codebook(normal, 16).tolist() == pytest.approx(FIXED_LEVELS)

    fitted = choose_codebook(heavy, 16)
    assert (fitted.diff() >= 0).all()
    assert not torch.allclose(fitted, torch.tensor(FIXED_LEVELS), atol=0.01)


def test_fitted_levels_have_less_error_than_the_fixed_ones():
    numbers = randn(4096).pow(5)
    numbers = numbers / numbers.abs().max()

    def measure(levels):
        return (numbers[:, None] - levels).abs().amin(1).square().mean()

    assert measure(fit_codebook(numbers)) < 0.1 * measure(torch.tensor(FIXED_LEVELS))


def test_neighbors_of_a_scale_are_the_next_floats():
    scale = torch.tensor([[1.0, 448.0, 0.0]]).to(torch.float8_e4m3fn)

    below, above = (neighbor.float().tolist()[0] for neighbor in list_neighbors(scale, 1))

    assert below[:2] == [0.9375, 416.0] and below[2] == 0
    assert above[:2] == [1.125, 448.0] and above[2] == 2**-9


# --- what cannot be


@pytest.mark.parametrize("bits", [5, 3, 8, 0])
def test_other_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"int8.bits is {bits}; weights in groups have 4 or 6 bits"):
        GroupLayout(bits)


@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, 3), (4, 12), (4, 24), (6, 8), (6, 24), (4, 0), (4, 1.5)]
)
def test_other_group_sizes_are_refused(bits, group_size):
    with pytest.raises(ConfigError, match=r"int8\.group_size is"):
        GroupLayout(bits, group_size)


@pytest.mark.parametrize(
    ("layout", "in_features", "reason"),
    [
        (GroupLayout(4), 63, "4 bits need in_features in multiples of 16, not 63"),
        (GroupLayout(4), 72, "4 bits need in_features in multiples of 16, not 72"),
        (GroupLayout(6), 48, "6 bits need in_features in multiples of 32, not 48"),
        (GroupLayout(4, 64), 96, "4 bits need in_features in multiples of 64, not 96"),
        (GroupLayout(4, 4), 16, None),
        (GroupLayout(6, 32), 64, None),
    ],
)
def test_widths_that_do_not_divide_have_a_reason(layout, in_features, reason):
    assert layout.find_obstacle(in_features) == reason


def test_a_rounding_without_groups_says_so():
    class Rows:
        name = "rows"
        needs_calibration = False

        def round_weight(self, weight, inputs):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"rounding=rows makes weights of 8 bits alone; for int8\.bits=4"):
        round_to_bits(Rows(), randn(4, 32), None, GroupLayout(4))


def test_a_weight_of_a_file_may_have_one_group_for_a_whole_row():
    weight = draw_grouped_weight(2, 8192, GroupLayout(4, 8192), torch.Generator().manual_seed(0))

    assert find_layout(weight) == GroupLayout(4, 8192)
    assert find_layout(weight.decode()) is None
