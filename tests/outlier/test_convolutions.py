"""Outlier methods of convolutions: which take which, and what they do to weights and channels."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import randn

from int8run.checkpoints.layer import CheckpointLayer
from int8run.errors import ConfigError, FileError
from int8run.kernels.hadamard.reference import rotate_groups
from int8run.layers.plan import CONV, LayerPlan
from int8run.outlier.base import find_channel_obstacle, fit_convolution
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.pipeline.prequantized import PrequantizedLayers, check_outlier_methods
from int8run.ptq.quantize import check_outlier_method

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
