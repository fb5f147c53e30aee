"""The loops over a model's Linears: planning, quantizing, binding to a backend, assembling."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from support.compare import assert_close
from support.helpers import NEVER_FLOAT, TinyModel, randn, to_int8
from torch import nn

from int8run.backends import float_comparison
from int8run.backends.auto import AutoBackend, LayerChoice
from int8run.backends.float_comparison import FloatComparison
from int8run.backends.onednn import OneDnn
from int8run.backends.reference import Reference
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.errors import BackendError, ConfigError
from int8run.layers.assemble import assemble_int8_model, copy_sharing_tensors
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import Int8Settings, LayerPlan, plan_layers
from int8run.models.family import ModelFamily
from int8run.outlier.base import LayerStatistics
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.ptq.quantize import (
    build_int8_layers,
    check_outlier_method,
    keep_faster_layers,
    quantize_layers,
)
from int8run.quant.rounding import AbsMax
from int8run.quant.weight import QuantizedWeight, sqnr_db

FAMILY = ModelFamily("test")
LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]


class Doubling(Reference):
    """A backend that can be told from the reference by its result."""

    name: ClassVar[str] = "doubling"

    def linear(self, *args, **options):
        return 2 * super().linear(*args, **options)


def found_in(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def plain_layers(model, plans):
    """Each layer quantized as it is, when it is asked for."""
    return quantize_layers(model, plans, methods={}, rounding=AbsMax(), statistics={})


def test_the_plan_names_each_linear_once_with_its_reason():
    plans = plan_layers(TinyModel(), lambda name: f"{name} is an embedder" if name == "proj_in" else None)

    assert [p.name for p in plans] == LINEARS
    assert [p.skip_reason for p in plans] == ["proj_in is an embedder", *[None] * 5]
    assert (plans[1].in_features, plans[1].out_features) == (64, 96)


def test_an_int8_model_is_close_to_its_float_model():
    model, x = TinyModel(), randn(9, 7)
    int8, plans = to_int8(model)

    assert list(found_in(int8)) == LINEARS
    assert_close("INT8 model", int8(x), model(x), 0.03)

    for plan in plans:
        assert (plan.outlier, plan.outlier_skip_reason, plan.rounding) == ("none", "", "absmax")
        assert (plan.backend_asked, plan.backend_used) == ("reference", "reference")
        assert 30 < plan.measured["weight_sqnr_db"] < 60
        # each row has its own largest weight, at least
        assert 1 / plan.in_features <= plan.measured["saturated_share"] < 0.3


def test_kept_layers_stay_the_very_same_tensors():
    model = TinyModel()
    int8, _ = to_int8(model, keep_float=("proj_in", "proj_out"))

    assert list(found_in(int8)) == LINEARS[1:-1]
    assert (
        int8.proj_in.weight is model.proj_in.weight and int8.blocks[0][0].weight is model.blocks[0][0].weight
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_rejected(value):
    model = TinyModel()
    model.blocks[1][3].weight[2, 5] = value
    with pytest.raises(
        ConfigError, match=r"^blocks\.1\.3: the weight holds NaN or infinity .* check the checkpoint$"
    ):
        to_int8(model)


def test_a_method_that_cannot_take_a_layer_leaves_it_to_none(caplog):
    model, x = TinyModel(), randn(9, 7)
    int8, plans = to_int8(model, outlier=ConvRot())
    by_64, by_16 = "convrot group_size=64", "convrot group_size=16"

    assert [p.outlier for p in plans] == ["none", by_64, by_16, by_64, by_16, by_64]
    assert [p.outlier_skip_reason for p in plans] == ["in_features=7 is not a multiple of 4", *[""] * 5]
    assert caplog.messages == [
        "outlier=convrot cannot take 1 of 6 layers (1 × in_features=7 is not a multiple of 4); "
        "these are plain INT8"
    ]
    assert_close("INT8 model", int8(x), model(x), 0.03)


def test_layers_that_a_method_cannot_take_are_counted_in_one_line(caplog):
    plans = [LayerPlan(str(width), width, 8, None) for width in (64, 96, 128, 96, 7, 256)]
    check_outlier_method(QuaRot(64), plans)

    assert [bool(p.outlier_skip_reason) for p in plans] == [False, True, False, True, True, False]
    assert caplog.messages == [
        "outlier=quarot cannot take 3 of 6 layers (2 × in_features=96 is not a multiple of 64; "
        "1 × in_features=7 is not a multiple of 64); these are plain INT8"
    ]


def test_nothing_is_said_where_a_method_takes_every_layer(caplog):
    plans = plan_layers(TinyModel(), lambda name: None)
    # what an earlier check noted is forgotten
    plans[0].outlier_skip_reason = "another method"
    check_outlier_method(SmoothQuant(), plans)

    assert not caplog.messages and not any(p.outlier_skip_reason for p in plans)


def test_a_method_that_can_take_no_layer_is_rejected():
    message = (
        r"^outlier=quarot can take none of the 6 layers \(1 × in_features=7 is not a multiple of 128; "
        r"3 × in_features=64 .*; "
        r"2 × in_features=96 is not a multiple of 128\); choose another outlier=$"
    )
    with pytest.raises(ConfigError, match=message):
        to_int8(TinyModel(), outlier=QuaRot())


class TenOfEach(AbsMax):
    """A rounding that wants what the layer multiplied, and keeps it."""

    name: ClassVar[str] = "ten"
    needs_calibration: ClassVar[bool] = True

    def __init__(self):
        self.given = []

    def round_weight(self, weight, inputs):
        self.given.append(inputs)
        return QuantizedWeight(torch.full_like(weight, 10).to(torch.int8), torch.ones(len(weight), 1))


def statistics_of(model, names):
    """Seeded, as if a calibration had reached these layers: 2 inputs of 3 tokens each."""
    return {
        name: LayerStatistics(randn(2, 3, k, seed=k), torch.ones(k), torch.ones(k))
        for name in names
        for k in [model.get_submodule(name).in_features]
    }


@pytest.mark.parametrize("outlier", [None, HadaNorm(32)], ids=["none", "hadanorm"])
def test_the_rounding_makes_the_integers_from_what_the_layer_multiplies(outlier):
    model, rounding = TinyModel(), TenOfEach()
    statistics = statistics_of(model, LINEARS)
    int8, plans = to_int8(
        model, outlier=outlier, keep_float=("proj_in",), rounding=rounding, statistics=statistics
    )
    layers = found_in(int8)
    for name, given in zip(LINEARS[1:], rounding.given, strict=True):
        assert (layers[name].packed == 10).all() and (layers[name].scale == 1).all()
        expected = layers[name].transform.round_input(statistics[name].sample).reshape(6, -1)
        assert given.dtype == torch.float32 and torch.equal(given, expected)

    assert [p.rounding for p in plans] == ["", *["ten"] * 5]


@pytest.mark.parametrize(
    ("outlier", "rounding"), [(SmoothQuant(), AbsMax()), (None, TenOfEach())], ids=["a method", "a rounding"]
)
def test_a_layer_that_the_calibration_never_reached_is_rejected_where_one_is_needed(outlier, rounding):
    model = TinyModel()
    statistics = statistics_of(model, [name for name in LINEARS if name != "blocks.1.3"])
    message = (
        r"^blocks\.1\.3: the calibration never reached it; "
        r"keep the layer float, or take other calibration\.prompts$"
    )
    with pytest.raises(ConfigError, match=message):
        to_int8(model, outlier=outlier, rounding=rounding, statistics=statistics)
    # the layer kept float, nothing is missing
    to_int8(model, outlier=outlier, rounding=rounding, statistics=statistics, keep_float=("blocks.1.3",))


def test_without_a_need_for_it_a_calibration_may_miss_layers():
    _, plans = to_int8(TinyModel(), statistics={})
    assert all(p.outlier == "none" for p in plans)


def test_each_layer_may_have_a_method_of_its_own():
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    methods = {"blocks.0.1": ConvRot(16), "blocks.1.1": QuaRot(64), "proj_out": SmoothQuant(0.75)}
    layers = quantize_layers(
        model, plans, methods=methods, rounding=AbsMax(), statistics=statistics_of(model, ["proj_out"])
    )

    assert [layer.transform.method for _, layer in layers] == [
        "none",
        "convrot",
        "none",
        "quarot",
        "none",
        "smoothquant",
    ]

    labels = [
        "none",
        "convrot group_size=16",
        "none",
        "quarot group_size=64",
        "none",
        "smoothquant alpha=0.75",
    ]

    assert [p.outlier for p in plans] == labels


def test_one_matrix_serves_all_layers_of_a_kind():
    model = TinyModel()
    int8, _ = to_int8(model, outlier=ConvRot(16), keep_float=("proj_in",))

    assert len({layer.transform.matrix.data_ptr() for layer in found_in(int8).values()}) == 1

    plans = plan_layers(model, lambda name: None)[1:]
    mixed = {
        p.name: method
        for p, method in zip(
            plans, [ConvRot(16), QuaRot(16), ConvRot(4), QuaRot(16), ConvRot(16)], strict=True
        )
    }
    layers = quantize_layers(model, plans, methods=mixed, rounding=AbsMax(), statistics={})
    made = build_int8_layers(
        model, layers, backend=Reference(), settings=NEVER_FLOAT, rows=dict.fromkeys(mixed, 8)
    )
    a, b, c, d, e = (layer.transform.matrix for layer in made.values())

    assert a is e and b is d and len({id(m) for m in (a, b, c)}) == 3
    # of the same size, but another matrix
    assert not torch.equal(a, b)


def test_layers_that_read_the_same_tensor_are_found_by_block():
    names = ["a.0.q", "a.0.k", "a.1.q", "a.1.k", "a.1.v", "q", "b.0.kk", "a.0.out"]
    groups = group_by_shared_input(names, [["q", "k", "v"], ["out", "absent"]])
    assert groups == [["a.0.q", "a.0.k"], ["a.1.q", "a.1.k", "a.1.v"], ["a.0.out"], ["q"], ["b.0.kk"]]


def test_a_layer_stands_in_one_group_only():
    groups = group_by_shared_input(["a.q", "a.k", "a.v"], [["q", "k"], ["k", "v"]])
    assert groups == [["a.q", "a.k"], ["a.v"]]


def test_a_group_whose_layers_were_all_taken_is_left_out():
    # `q` finds the blocks a.attn and a, and the first of them takes the layer
    groups = group_by_shared_input(["a.attn.q", "a.attn.k"], [["q", "attn.q"]])
    assert groups == [["a.attn.q"], ["a.attn.k"]]


def test_a_layer_that_stays_float_after_all_forgets_what_it_was_to_be():
    _, plans = to_int8(TinyModel())
    plans[2].skip("the budget")
    assert plans[2] == LayerPlan(LINEARS[2], 96, 64, "the budget")


def test_layers_come_one_at_a_time():
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    model.proj_out.weight.fill_(float("nan"))
    # the damaged last layer is met only when it is asked for
    layers = plain_layers(model, plans)

    assert [next(layers)[0].name for _ in range(5)] == LINEARS[:5]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (OneDnn(), "backend 'onednn' cannot run here: needs a CPU with avx512_vnni"),
        (TorchIntMM(), "backend 'torch_int_mm' cannot run here: needs a CPU with avx512_vnni"),
        (AutoBackend({"onednn": OneDnn()}), "backend=auto has no candidate for cpu: onednn: needs a CPU"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_what_the_limits_reject_is_rejected(backend, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with pytest.raises(BackendError, match=reason):
        to_int8(TinyModel(), backend)


def test_each_layer_is_reported_when_it_is_made():
    model, seen = TinyModel(), []
    plans = plan_layers(model, lambda name: None)
    layers = plain_layers(model, plans)
    made = build_int8_layers(
        model,
        layers,
        backend=Reference(),
        settings=NEVER_FLOAT,
        rows=dict.fromkeys(LINEARS, 8),
        on_layer=seen.append,
    )

    assert seen == list(made.values()) and list(made) == LINEARS


def test_auto_measures_with_the_rows_of_the_run(tmp_path):
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    table = tmp_path / "table.json"
    backend = AutoBackend({"reference": Reference(), "torch_int_mm": TorchIntMM()}, 1, str(table))
    made = build_int8_layers(
        model,
        plain_layers(model, plans),
        backend=backend,
        settings=NEVER_FLOAT,
        rows=dict.fromkeys(LINEARS, 5),
    )

    assert all(
        p.backend_asked == "auto" and p.backend_used == made[p.name].backend.name != "auto" for p in plans
    )
    assert "5x64x96" in table.read_text()


class Chooser:
    """Stands for a `BackendChooser` that found this ratio in every layer, and up to 6 rows float faster."""

    def __init__(self, speedup: float | None):
        self.speedup = speedup

    def choose_layer(self, shape, layout=None):
        failures = {"triton": "RuntimeError: Failed to find C compiler"}
        return LayerChoice(Reference(), FloatComparison(self.speedup), failures=failures)

    def measured_float_rows(self, in_features, out_features):
        return 6


def build_with_auto(monkeypatch, speedup, **settings):
    model, backend = TinyModel(), AutoBackend({})
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    monkeypatch.setattr(AutoBackend, "make_chooser", lambda *args, times_float: Chooser(speedup))
    plans = plan_layers(model, lambda name: None)
    made = build_int8_layers(
        model,
        plain_layers(model, plans),
        backend=backend,
        settings=Int8Settings(**settings),
        rows=dict.fromkeys(LINEARS, 5),
    )
    return plans, made


def test_layers_that_are_faster_in_float_stay_float(monkeypatch):
    plans, made = build_with_auto(monkeypatch, 0.5)
    assert list(made) == LINEARS and all(plan.skip_reason is None for plan in plans)
    plans[0].skip("a quality budget")  # comes first

    assert keep_faster_layers(plans, made) == {}
    assert [plan.is_float_by_choice for plan in plans] == [False, *[True] * 5]
    assert plans[1].skip_reason == "float is 2.00 times as fast as reference at 5 rows here"
    assert (plans[1].speedup, plans[1].backends_left_out) == (
        0.5,
        "triton: RuntimeError: Failed to find C compiler",
    )
    assert plans[1].backend_used == "" and not plans[1].measured


def test_layers_that_are_faster_in_int8_or_wanted_for_their_memory_are_int8(monkeypatch):
    for speedup, settings in ((1.5, {}), (None, {}), (0.5, {"only_if_faster": False})):
        plans, made = build_with_auto(monkeypatch, speedup, **settings)
        assert keep_faster_layers(plans, made) == made
        assert {plan.speedup for plan in plans} == {speedup}


def test_what_was_measured_at_the_rows_of_the_run_decides_about_the_float_fallback(monkeypatch):
    # float was faster up to 6 rows in some other run
    assert {p.backend_used for p in build_with_auto(monkeypatch, 1.5)[0]} == {"reference"}
    assert {p.backend_used for p in build_with_auto(monkeypatch, None)[0]} == {"float_fallback"}
    asked = build_with_auto(monkeypatch, 1.5, max_rows=8)[0]
    assert {p.backend_used for p in asked} == {"float_fallback"}
    # a ratio that an earlier run measured changes nothing where this one does not ask for it
    for speedup in (1.5, None):
        unasked = build_with_auto(monkeypatch, speedup, only_if_faster=False)[0]
        assert {p.backend_used for p in unasked} == {"float_fallback"}


def test_layers_in_another_dtype_than_the_first_parameter():
    # diffusers keeps some modules of a half-precision model in float32
    model, x = TinyModel(dtype=torch.bfloat16), randn(4, 7)
    model.proj_in.float()
    int8, _ = to_int8(model, settings=Int8Settings(small_batch_fallback="always"), keep_float=("proj_in",))
    h = model.proj_in(x).bfloat16()

    assert_close("bfloat16 block", int8.blocks[0](h), model.blocks[0](h), 0.03)


def test_a_copy_shares_every_tensor_and_nothing_else():
    model, x = TinyModel(), randn(9, 7)
    model.register_buffer("table", randn(3, seed=5))
    before = model(x)
    copy = copy_sharing_tensors(model)
    pairs = zip([*model.parameters(), *model.buffers()], [*copy.parameters(), *copy.buffers()], strict=True)

    assert all(a is b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not {id(m) for m in model.modules()} & {id(m) for m in copy.modules()}

    copy.blocks[0][1] = nn.Identity()
    copy.proj_out = nn.Identity()

    assert torch.equal(model(x), before)


def test_assembling_leaves_the_original_untouched():
    model, x = TinyModel(), randn(9, 7)
    before = model(x)
    int8, _ = to_int8(model)

    assert not torch.equal(int8(x), before)
    assert torch.equal(model(x), before) and not found_in(model)


def test_the_same_layers_can_be_assembled_more_than_once():
    model, x = TinyModel(), randn(9, 7)
    plans = plan_layers(model, lambda name: None)
    made = build_int8_layers(
        model,
        plain_layers(model, plans),
        backend=Reference(),
        settings=NEVER_FLOAT,
        rows=dict.fromkeys(LINEARS, 8),
    )
    every, few = (
        assemble_int8_model(model, made, FAMILY),
        assemble_int8_model(model, {"proj_out": made["proj_out"]}, FAMILY),
    )

    assert list(found_in(every)) == LINEARS and list(found_in(few)) == ["proj_out"]
    # the modules are copies, since a group that shares may differ; the tensors are not
    assert (
        every.proj_out is not few.proj_out
        and every.proj_out.packed is few.proj_out.packed is made["proj_out"].packed
    )
    assert_close("one layer", few(x), model(x), 0.02)
    assert_close("every layer", every(x), to_int8(model)[0](x), 0)


def test_the_family_says_who_shares_an_input():
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    made = build_int8_layers(
        model,
        plain_layers(model, plans),
        backend=Reference(),
        settings=NEVER_FLOAT,
        rows=dict.fromkeys(LINEARS, 8),
    )
    shared = assemble_int8_model(model, made, replace(FAMILY, same_input=[["1", "3"]]))

    assert shared.blocks[0][1].shared is shared.blocks[0][3].shared is not None
    # neither the layers that were given nor another assembly know of it
    assert all(layer.shared is None for layer in made.values())
    assert all(layer.shared is None for layer in found_in(assemble_int8_model(model, made, FAMILY)).values())


def test_two_backends_in_one_process():
    model = TinyModel()
    # built one after the other, asked afterwards: the second must not have changed the first
    built = [(to_int8(model, backend)[0], backend) for backend in (Reference(), Doubling())]
    for int8, backend in built:
        assert {layer.backend for layer in found_in(int8).values()} == {backend}
    h = randn(5, 64)

    assert torch.equal(2 * built[0][0].proj_out(h), built[1][0].proj_out(h))


@pytest.mark.parametrize(
    ("fallback", "params", "rows", "float_rows"),
    [
        ("only_small_layers", 100, 16, 16),
        ("only_small_layers", 101, 16, 0),
        ("only_small_layers", 100, 17, 0),
        ("always", 101, 16, 16),
        ("always", 101, 17, 0),
        ("never", 1, 1, 0),
    ],
)
def test_float_rows(fallback, params, rows, float_rows):
    assert (
        Int8Settings(small_batch_fallback=fallback, max_rows=16, small_layer_params=100).choose_float_rows(
            params, rows
        )
        == float_rows
    )


def test_the_fallback_setting_reaches_the_layers():
    int8, _ = to_int8(TinyModel(), settings=Int8Settings(max_rows=9, small_layer_params=64 * 12))
    assert {name: layer.float_rows for name, layer in found_in(int8).items()} == {
        name: 9 if name in ("proj_in", "proj_out") else 0 for name in LINEARS
    }


def test_settings_are_checked():
    with pytest.raises(
        ConfigError,
        match=r"int8\.small_batch_fallback is 'alway'; did you mean 'always'\? choose from always, never",
    ):
        Int8Settings(small_batch_fallback="alway")
    for rows in (-1, 4097, True, "16"):
        with pytest.raises(
            ConfigError, match=rf"int8\.max_rows is {rows!r}; allowed is a whole number from 0 to 4096"
        ):
            Int8Settings(max_rows=rows)


@pytest.mark.parametrize(
    ("reference", "approximation", "db"),
    [
        ([3.0, 4.0], [3.0, 4.5], 20.0),
        ([10.0, 0.0], [9.0, 0.0], 20.0),
        ([1.0, 1.0], [1.0, 1.0], float("inf")),
        ([1.0], [0.0], 0.0),
    ],
)
def test_sqnr(reference, approximation, db):
    assert sqnr_db(torch.tensor(reference), torch.tensor(approximation)) == pytest.approx(db)


def test_sqnr_is_counted_in_float64():
    reference = torch.full((1000,), 300.0, dtype=torch.float16)
    # the sum of squares is past float16
    assert sqnr_db(reference, reference * 0 + 270) == pytest.approx(20.0)
