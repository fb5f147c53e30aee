"""Outlier methods of convolutions: which take which, and what they do to weights and channels."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import randn
from torch import nn

from int8run.backends.convolution import read_geometry
from int8run.checkpoints.layer import CheckpointLayer
from int8run.errors import ConfigError, FileError
from int8run.kernels.hadamard.reference import rotate_groups
from int8run.kernels.int8_conv.reference import int8_conv
from int8run.layers.plan import CONV, LayerPlan
from int8run.outlier.auto import AutoOutlier, compute_conv_outputs
from int8run.outlier.base import LayerStatistics, find_channel_obstacle, fit_convolution
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.pipeline.prequantized import PrequantizedLayers, check_outlier_methods
from int8run.ptq.calibration import extract_patches
from int8run.ptq.quantize import check_outlier_method
from int8run.quant.weight import quantize_weight

FOR_LINEARS = "is for Linears alone"


@pytest.mark.parametrize("method", [ConvRot(16), QuaRot(8)], ids=["convrot", "quarot"])
def test_rotated_channels_and_a_rotated_weight_leave_a_convolution_as_it_was(method):
    weight, x = randn(5, 16, 3, 2, seed=1), randn(2, 16, 6, 6, seed=2)

    transform = fit_convolution(method, weight.flatten(1), taps=6)

    rotated = transform.transform_weight(weight.flatten(1))
    rotated_x = rotate_groups(x.movedim(1, -1), transform.rotation.matrix).movedim(-1, 1)
    torch.testing.assert_close(
        F.conv2d(rotated_x, rotated.view_as(weight)), F.conv2d(x, weight), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(rotated, weight.flatten(1), atol=0.1)
    torch.testing.assert_close(transform.restore_weight(rotated), weight.flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "channels", "reason"),
    [
        (NoOutlier(), 7, None),
        (ConvRot(), 320, None),
        (ConvRot(), 30, "channels=30 is not a multiple of 4"),
        (QuaRot(), 640, None),
        (QuaRot(), 320, "channels=320 is not a multiple of 128"),
        (HadaNorm(), 256, f"outlier=hadanorm {FOR_LINEARS}"),
        (SmoothQuant(), 256, f"outlier=smoothquant {FOR_LINEARS}"),
    ],
)
def test_a_method_says_why_it_does_not_take_a_convolution(method, channels, reason):
    assert find_channel_obstacle(method, channels) == reason


def make_conv_plan(channels, taps=9):
    return LayerPlan("conv", channels * taps, 8, None, kind=CONV, taps=taps)


def test_a_convolution_counts_by_its_channels_and_not_by_its_columns():
    plans = [make_conv_plan(6, taps=4), make_conv_plan(64)]

    check_outlier_method(ConvRot(), plans)

    # 24 columns would be a multiple of 4
    assert [plan.outlier_skip_reason for plan in plans] == ["channels=6 is not a multiple of 4", ""]


def test_a_method_that_takes_neither_linears_nor_convolutions_is_an_error():
    plans = [LayerPlan("linear", 7, 8, None), make_conv_plan(6)]

    with pytest.raises(ConfigError, match=r"convrot can take none of the 2 layers .*1 × channels=6 is not"):
        check_outlier_method(ConvRot(), plans)


def make_file(**layer_facts):
    layer = CheckpointLayer(
        name="conv",
        storage_dtype="int8",
        shape=(8, 64, 3, 3),
        rows=8,
        columns=576,
        label="file's",
        **layer_facts,
    )
    return PrequantizedLayers(SimpleNamespace(parts={}), {"conv": layer}, provenance={})


def test_a_file_from_before_convolutions_had_methods_is_read_as_it_was():
    plan = make_conv_plan(64)

    check_outlier_methods(make_file(), [plan], ConvRot())

    assert plan.outlier_skip_reason == "the file has it without a method"


def test_a_file_with_another_method_of_a_convolution_is_refused():
    rotated = {"outlier_method": "convrot", "outlier_settings": {"group_size": 64}}
    check_outlier_methods(make_file(**rotated), [make_conv_plan(64)], ConvRot(256))

    with pytest.raises(FileError, match=r"contradicts outlier=convrot in 1 of 1 layers \(conv has"):
        check_outlier_methods(make_file(**rotated), [make_conv_plan(64)], ConvRot(16))


# -- outlier=auto --------------------------------------------------------------------------------------------

AUTO = AutoOutlier(
    {"plain": NoOutlier(), "rotated": ConvRot(16), "scaled": SmoothQuant()}, max_cost=None, tolerance_db=0.1
)


def collect_patches(conv, x):
    """All patches of an input, as a calibration keeps them."""
    geometry = read_geometry(conv)
    positions = torch.arange(math.prod(geometry.compute_output_size(x.shape[2:])))
    sample = extract_patches(x, geometry, positions)
    return LayerStatistics(sample, sample.abs().amax((0, 1)), conv.weight.detach().flatten(1).abs().amax(0))


CONVOLUTIONS = {
    "images": (nn.Conv2d(16, 6, 3, padding=1), (2, 16, 5, 6)),
    "stride": (nn.Conv2d(16, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 16, 5, 6)),
    "groups": (nn.Conv2d(32, 6, 3, groups=2), (1, 32, 5, 6)),
    "videos": (nn.Conv3d(16, 6, (2, 3, 3), padding=(1, 1, 0)), (1, 16, 3, 4, 5)),
}


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_the_error_of_a_method_is_that_of_the_int8_convolution(conv, shape, rotated):
    x, weight = randn(*shape), conv.weight.detach().flatten(1)
    taps = math.prod(conv.kernel_size)
    transform = fit_convolution(ConvRot(16) if rotated else NoOutlier(), weight, taps)
    made = quantize_weight(transform.transform_weight(weight))

    exact, rounded = compute_conv_outputs(weight, transform, collect_patches(conv, x).sample)

    settings = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    expected = int8_conv(
        x, made.qdata.view_as(conv.weight), made.scale[:, 0], None, rotation=transform.rotation, **settings
    )
    float_output = conv(x) - conv.bias.view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(exact, float_output.flatten(2).mT.flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rounded, expected.flatten(2).mT.flatten(0, 1), rtol=1e-4, atol=1e-4)


def score(x, conv, auto=AUTO, cost=lambda transform: 1.0):
    weight = conv.weight.detach().flatten(1)
    return auto.score_conv_candidates(weight, collect_patches(conv, x), taps=9, cost=cost)


def test_auto_rotates_a_convolution_where_channels_differ_and_no_other():
    flat = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    spiked = flat.clone()
    spiked[:, 3] *= 60
    weight = randn(6, 16, 3, 3)
    weight[:, 3] /= 60  # so that the channel counts like the others

    for x, best in ((flat, "plain"), (spiked, "rotated")):
        conv = nn.Conv2d(16, 6, 3, padding=1)
        conv.weight.data = weight if best == "rotated" else randn(6, 16, 3, 3)
        scores = score(x, conv)
        assert scores.keys() == {"plain", "rotated"}, "smoothquant is for Linears alone"
        assert AUTO.choose_methods({"conv": scores}, [["conv"]]) == {"conv": best}


def test_auto_leaves_out_a_rotation_that_costs_too_much():
    dear = replace(AUTO, max_cost=0.1)

    scores = score(randn(1, 16, 5, 5), nn.Conv2d(16, 6, 3), dear, lambda transform: 1 + transform.group_size)

    assert scores.keys() == {"plain"}
