"""What a rotation or a LoRA branch costs a convolution: measured once for each shape, and remembered."""

import pytest
import torch
from support.helpers import CPU, randn
from torch import nn

from int8run.backends.autotune_cache import read_entries
from int8run.backends.convolution import ReferenceConv
from int8run.backends.reference import Reference
from int8run.layers.int8_conv import DeferredSteps, Int8Conv
from int8run.layers.int8_linear import QuantizedLayer
from int8run.outlier.base import OutlierTransform, fit_convolution
from int8run.outlier.convrot import ConvRot
from int8run.ptq import conv_costs, layer_costs
from int8run.ptq.conv_costs import ConvCosts
from int8run.quant.weight import quantize_weight

INPUT = (1, 16, 5, 5)
CONV = nn.Conv2d(16, 6, 3, padding=1)
ROTATED = fit_convolution(ConvRot(16), CONV.weight.flatten(1), taps=9)


class WithTable(Reference):
    """The definition, with a file of its own for measured choices."""

    def __init__(self, table):
        self.table = table


@pytest.fixture
def table(tmp_path):
    return tmp_path / "choices.json"


@pytest.fixture
def timed(monkeypatch):
    """Pairs of layers that were timed; the changed one takes one and a half times as long."""
    seen = []

    def in_turns(calls, device, rounds):
        (plain, x), (changed, _) = ((call.func, call.args[0]) for call in calls)
        assert tuple(x.shape) == INPUT and changed(x).shape == plain(x).shape
        assert not torch.equal(changed(x), plain(x))
        seen.append((plain, changed))
        return [[2.0] * rounds, [3.0] * rounds]

    monkeypatch.setattr(layer_costs, "time_in_turns", in_turns)
    return seen


def build_layer():
    quantized = QuantizedLayer(
        quantize_weight(CONV.weight.detach().flatten(1)), OutlierTransform(), CONV.bias
    )
    return Int8Conv(quantized, ReferenceConv(), CONV, torch.float32)


def test_a_rotation_is_measured_once_and_kept_for_later_runs(table, timed, monkeypatch):
    quantized = []

    def count(weight):
        quantized.append(weight.shape)
        return quantize_weight(weight)

    monkeypatch.setattr(conv_costs, "quantize_weight", count)
    for _ in range(2):
        costs = ConvCosts(WithTable(str(table)), CPU, torch.float32)
        assert costs.get_transform_ratio(ROTATED, CONV, INPUT) == 1.5

    assert len(timed) == len(quantized) == 1
    (key,) = read_entries(table)
    assert "cost of regular rotation of 16 | convolution 3x3 stride 1 padding (1, 1) | 1x16x5x5 -> 6" in key
    assert costs.get_transform_ratio(OutlierTransform(), CONV, INPUT) == 1.0, "nothing costs nothing"


def test_where_the_definition_stands_in_for_kernels_nothing_is_timed(table, timed):
    backend = WithTable(str(table))
    backend.name = "auto"
    costs = ConvCosts(backend, CPU, torch.float32)
    costs.conv_backend = ReferenceConv()

    assert costs.get_transform_ratio(ROTATED, CONV, INPUT) == 1.0
    assert costs.get_branch_ratio(build_layer(), 2, INPUT) == 1.0
    assert timed == []


def test_a_branch_is_measured_beside_a_copy_and_the_layer_stays_as_it_is(table, timed):
    layer = build_layer()
    expected = layer(randn(*INPUT))
    costs = ConvCosts(WithTable(str(table)), CPU, torch.float32)

    ratios = [costs.get_branch_ratio(layer, rank, INPUT) for rank in (2, 2, 4)]

    assert ratios == [1.5] * 3 and len(timed) == 2
    assert layer.adapter is None and torch.equal(layer(randn(*INPUT)), expected)
    assert [changed.adapter.lora_A.shape[0] for _, changed in timed] == [2, 4]


def test_a_layer_that_computes_the_norm_before_it_is_measured_by_itself(table, timed):
    layer = build_layer()
    costs = ConvCosts(WithTable(str(table)), CPU, torch.float32)
    costs.get_branch_ratio(layer, 2, INPUT)
    layer.deferred = DeferredSteps(nn.GroupNorm(4, 16))

    for _ in range(2):
        costs.get_branch_ratio(layer, 2, INPUT)

    assert len(timed) == 2
    assert any(key.endswith("| after GroupNorm, SiLU") for key in read_entries(table))
