"""Which bits each layer gets, why not, and what is said of it."""

import logging

import pytest
import torch
from support.helpers import CPU, randn
from torch import nn

from int8run.backends.auto import AutoBackend, BackendChooser, LayerChoice
from int8run.backends.reference import Reference
from int8run.backends.row_decoder import RowDecoder
from int8run.errors import ConfigError
from int8run.layers.grouped_int8_linear import GroupedInt8Linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.plan import ATTENTION, CONV, Int8Settings, LayerPlan, plan_layers
from int8run.metrics.layers import compute_layer_metrics
from int8run.outlier.base import LayerStatistics, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.ptq.bits import assign_bits
from int8run.ptq.quantize import build_int8_layers, quantize_layers
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight
from int8run.quant.rounding import AbsMax, Gptq, Mse

ABSMAX = AbsMax()
WIDTHS = {"wide": 64, "narrow": 48, "odd": 63}


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(width, 40) for name, width in WIDTHS.items()}).requires_grad_(False)


def make_plans(model, layout):
    plans = plan_layers(model, lambda name: None)
    assign_bits(plans, layout)
    return plans


def build(model, plans, *, rounding=ABSMAX, methods=None, statistics=None):
    settings = Int8Settings(small_batch_fallback="never")
    layers = quantize_layers(
        model, plans, methods=methods or {}, rounding=rounding, statistics=statistics or {}
    )
    rows = dict.fromkeys(WIDTHS, 32)
    return build_int8_layers(model, layers, backend=Reference(), settings=settings, rows=rows, device=CPU)


@pytest.mark.parametrize(
    ("layout", "bits", "words"),
    [
        (
            GroupLayout(4),
            {"wide": 4, "narrow": 4, "odd": 8},
            "1 × 4 bits need in_features in multiples of 16",
        ),
        (
            GroupLayout(6),
            {"wide": 6, "narrow": 8, "odd": 8},
            "1 × 6 bits need in_features in multiples of 32",
        ),
        (GroupLayout(4, 64), {"wide": 4, "narrow": 8, "odd": 8}, "int8.bits=4: 2 of 3 layers have 8 bits"),
    ],
)
def test_layers_that_cannot_have_the_bits_have_8_and_a_reason(layout, bits, words, caplog):
    model = make_model()
    plans = make_plans(model, layout)

    assert {plan.name: plan.bits for plan in plans} == bits
    assert all(bool(plan.bits_reason) == (plan.bits == 8) for plan in plans)
    assert words in caplog.text

    layers = build(model, plans)
    for name, layer in layers.items():
        assert layer.bits == bits[name]
        assert type(layer) is (Int8Linear if bits[name] == 8 else GroupedInt8Linear)
    counts = compute_layer_metrics(plans)
    assert counts["quant/layers_without_their_bits"] == list(bits.values()).count(8)
    assert counts[f"quant/layers_{layout.bits}_bits"] == list(bits.values()).count(layout.bits)


def test_nothing_is_said_or_counted_of_8_bits(caplog):
    plans = make_plans(make_model(), None)

    assert [plan.bits for plan in plans] == [8, 8, 8]
    assert not caplog.records
    assert "quant/layers_4_bits" not in compute_layer_metrics(plans)


def test_convolutions_and_attentions_have_8_bits():
    plans = [
        LayerPlan("conv", 64, 32, None, kind=CONV, taps=1),
        LayerPlan("attention", 64, 64, None, kind=ATTENTION),
    ]
    assign_bits(plans, GroupLayout(4))

    assert [plan.bits for plan in plans] == [8, 8]
    assert plans[0].bits_reason == "convolutions have 8 bits"
    assert plans[1].bits_reason == ""


def test_the_log_says_once_how_layers_are_decoded(caplog):
    model = make_model()
    with caplog.at_level(logging.INFO):
        layers = build(model, make_plans(model, GroupLayout(4)))

    assert all(isinstance(layers[name].multiplier, RowDecoder) for name in ("wide", "narrow"))
    lines = [line for line in caplog.messages if "decoded" in line]
    assert lines == [
        "2 layers of 4 bits on backend reference: decoded to int8 at each call, some rows at a time"
    ]


@pytest.mark.parametrize("rounding", [AbsMax(), Mse(), Gptq()], ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("bits", [4, 6])
def test_the_rounding_makes_the_codes_of_the_transformed_weight(bits, rounding):
    model = make_model()
    plans = [plan for plan in make_plans(model, GroupLayout(bits)) if plan.name == "wide"]
    weight = model["wide"].weight
    sample = randn(2, 32, 64)
    seen = {"wide": LayerStatistics(sample, sample.abs().amax((0, 1)), weight.abs().amax(0))}
    method = ConvRot(64)
    layers = build(model, plans, rounding=rounding, methods={"wide": method}, statistics=seen)

    transform = method.fit(weight)
    inputs = transform.round_input(sample).flatten(0, -2)
    expected = rounding.round_groups(transform.transform_weight(weight), inputs, GroupLayout(bits))
    assert torch.equal(layers["wide"].read_grouped_weight().codes, expected.codes)
    assert plans[0].rounding == rounding.name
    assert plans[0].measured["weight_sqnr_db"] > 15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = make_model()
    model["wide"].weight[3, 5] = value

    with pytest.raises(ConfigError, match="wide: the weight holds NaN or infinity and cannot be quantized"):
        build(model, make_plans(model, GroupLayout(4)))


@pytest.mark.parametrize("bits", [5, "four", True, 4.5, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=r"int8\.bits is .*; choose from 8, 6, 4, auto"):
        Int8Settings(bits=bits)


def test_a_group_size_must_suit_every_number_of_bits():
    Int8Settings(bits=4, group_size=8)
    Int8Settings(bits=8, group_size=8)  # nothing uses it
    with pytest.raises(ConfigError, match=r"int8\.group_size is 8; with int8\.bits=6"):
        Int8Settings(bits="auto", group_size=8)


def test_auto_measures_the_groups_of_the_weight_whatever_the_settings_say(monkeypatch, tmp_path):
    """Layers of files, text encoders' among them, have groups of their own."""
    asked = []

    def choose_layer(self, shape, layout=None):
        asked.append(layout)
        return LayerChoice(Reference())

    monkeypatch.setattr(BackendChooser, "choose_layer", choose_layer)
    model = nn.ModuleDict({"wide": nn.Linear(64, 40)})
    weight = draw_grouped_weight(40, 64, GroupLayout(4, 32), torch.Generator().manual_seed(0))
    build_int8_layers(
        model,
        [(LayerPlan("wide", 64, 40, None), QuantizedLayer(weight, OutlierTransform(), None))],
        backend=AutoBackend({"reference": Reference()}, table=str(tmp_path / "table.json")),
        settings=Int8Settings(small_batch_fallback="never", group_size=16),
        rows={"wide": 32},
        device=CPU,
    )

    assert asked == [GroupLayout(4, 32)]
