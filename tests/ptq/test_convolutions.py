"""`int8.convolutions=auto`: which convolutions stay float, by times and failures that are faked."""

import pytest
import torch
from support.helpers import CPU
from torch import nn

from int8run.backends import float_comparison
from int8run.backends.convolution import ReferenceConv
from int8run.backends.reference import Reference
from int8run.errors import BackendError
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import CONV, Int8Settings, LayerPlan
from int8run.outlier.none import NoOutlier
from int8run.ptq import convolutions
from int8run.ptq.convolutions import ConvolutionBinder
from int8run.quant.weight import quantize_weight

INPUT = (1, 4, 5, 5)
STEADY_FLOAT, FAST, SLOW = [1.0, 1.1, 1.0], [0.5, 0.5, 0.6], [2.0, 2.1, 2.0]
SCATTERED = [1.0, 50.0, 60.0]


class NamedAuto(Reference):
    """The definition, with a file of its own for measured choices."""

    def __init__(self, table):
        self.table = table


def bind(tmp_path) -> LayerPlan:
    """The plan of one convolution after it was bound."""
    conv = nn.Conv2d(4, 6, 3)
    transform = NoOutlier().fit(conv.weight.flatten(1))
    layer = QuantizedLayer(quantize_weight(conv.weight.detach().flatten(1)), transform, conv.bias)
    plan = LayerPlan(name="conv", in_features=36, out_features=6, skip_reason=None, kind=CONV)
    settings = Int8Settings(convolutions="auto")
    binder = ConvolutionBinder(NamedAuto(str(tmp_path / "choices.json")), CPU, settings, {"conv": INPUT})
    binder.bind(plan, layer, conv)
    return plan


@pytest.mark.parametrize(
    ("int8_seconds", "speedup", "reason"),
    [
        (FAST, 2.0, ""),
        (SLOW, 0.5, "float is 2.00 times as fast as reference for [1, 4, 5, 5] here"),
        (SCATTERED, None, ""),
    ],
    ids=["faster", "slower", "scattered"],
)
def test_a_convolution_stays_float_where_steady_times_say_so(
    tmp_path, monkeypatch, int8_seconds, speedup, reason
):
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    monkeypatch.setattr(
        float_comparison, "time_in_turns", lambda calls, device, rounds: [STEADY_FLOAT, int8_seconds]
    )

    plan = bind(tmp_path)

    assert (plan.speedup, plan.float_reason) == (speedup, reason)


def test_where_the_definition_stands_in_for_kernels_convolutions_stay_float_untimed(tmp_path, monkeypatch):
    monkeypatch.setattr(float_comparison, "time_in_turns", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(NamedAuto, "name", "auto")
    monkeypatch.setattr(convolutions, "choose_conv_backend", lambda *_: ReferenceConv())

    assert bind(tmp_path).float_reason == "only the slow definition computes INT8 convolutions on cpu"


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(float_comparison, "time_in_turns", lambda calls, device, rounds: [STEADY_FLOAT, SLOW])
    bind(tmp_path)
    monkeypatch.setattr(float_comparison, "time_in_turns", lambda calls, device, rounds: [STEADY_FLOAT, FAST])

    assert bind(tmp_path).speedup == 0.5


def test_a_convolution_whose_kernels_cannot_run_stays_float(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise BackendError("the kernels cannot be built")

    monkeypatch.setattr(ReferenceConv, "convolve", fail)

    plan = bind(tmp_path)

    assert plan.float_reason == "reference cannot run it here: the kernels cannot be built"
    assert "the INT8 convolution conv stays float" in caplog.text


def test_random_inputs_leave_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    bind_seeded = bind(tmp_path)

    assert bind_seeded.speedup is not None or bind_seeded.float_reason == ""
    conv_draws = torch.get_rng_state()
    torch.set_rng_state(before)
    nn.Conv2d(4, 6, 3)  # the only draws are those of the float layer's own weights
    assert torch.equal(conv_draws, torch.get_rng_state())
