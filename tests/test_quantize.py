"""The loops over a model's Linears: planning, quantizing, installing, sharing."""

from typing import ClassVar

import pytest
import torch
from helpers import NEVER_FLOAT, TinyModel, assert_close, randn, to_int8
from torch import nn

from int8run.backends.auto import AutoBackend
from int8run.backends.onednn import OneDnn
from int8run.backends.reference import Reference
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.errors import BackendError, ConfigError
from int8run.layers.linear import Int8Linear
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.quantize import Int8Settings, install, plan_layers, quantized_layers, share_copy, sqnr_db

LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]


class Doubling(Reference):
    """A backend that can be told from the reference by its result."""

    name: ClassVar[str] = "doubling"

    def linear(self, *args):
        return 2 * super().linear(*args)


def int8_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def test_the_plan_names_each_linear_once_with_its_reason():
    plans = plan_layers(TinyModel(), lambda name: f"{name} is an embedder" if name == "proj_in" else None)
    assert [p.name for p in plans] == LINEARS
    assert [p.keep_float for p in plans] == ["proj_in is an embedder", *[None] * 5]
    assert (plans[1].in_features, plans[1].out_features) == (64, 96)


def test_an_int8_model_is_close_to_its_float_model():
    model, x = TinyModel(), randn(9, 7)
    int8, plans = to_int8(model)
    assert list(int8_layers(int8)) == LINEARS
    assert_close("INT8 model", int8(x), model(x), 0.03)
    for plan in plans:
        assert (plan.outlier, plan.backend_asked, plan.backend_used) == ("none", "reference", "reference")
        assert 30 < plan.measured["weight_sqnr_db"] < 60
        # each row has its own largest weight, at least
        assert 1 / plan.in_features <= plan.measured["saturated_share"] < 0.3


def test_kept_layers_stay_the_very_same_tensors():
    model = TinyModel()
    int8, _ = to_int8(model, keep_float=("proj_in", "proj_out"))
    assert list(int8_layers(int8)) == LINEARS[1:-1]
    assert int8.proj_in.weight is model.proj_in.weight and int8.blocks[0][0].weight is model.blocks[0][0].weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = TinyModel()
    model.blocks[1][3].weight[2, 5] = value
    with pytest.raises(ConfigError, match=r"^blocks\.1\.3: the weight holds NaN or infinity .* check the checkpoint$"):
        to_int8(model)


def test_a_method_that_cannot_take_a_layer_leaves_it_to_none(caplog):
    model, x = TinyModel(), randn(9, 7)
    int8, plans = to_int8(model, outlier=ConvRot())
    assert [p.outlier for p in plans] == ["none", *["convrot"] * 5]
    assert "proj_in: convrot cannot take in_features=7; plain INT8" in caplog.text
    assert_close("INT8 model", int8(x), model(x), 0.03)


def test_layers_come_one_at_a_time():
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    model.proj_out.weight.fill_(float("nan"))
    # the damaged last layer is met only when it is asked for
    layers = quantized_layers(model, plans, NoOutlier())
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
def test_install_refuses_what_the_limits_refuse(backend, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with pytest.raises(BackendError, match=reason):
        to_int8(TinyModel(), backend)


def test_install_reports_each_layer():
    model, seen = TinyModel(), []
    plans = plan_layers(model, lambda name: None)
    layers = quantized_layers(model, plans, NoOutlier())
    install(share_copy(model), layers, Reference(), NEVER_FLOAT, dict.fromkeys(LINEARS, 8), lambda p: seen.append(p.name))
    assert seen == LINEARS


def test_auto_measures_with_the_rows_of_the_run(tmp_path):
    model = TinyModel()
    plans = plan_layers(model, lambda name: None)
    table = tmp_path / "table.json"
    backend = AutoBackend({"reference": Reference(), "torch_int_mm": TorchIntMM()}, 1, str(table))
    copy = share_copy(model)
    install(copy, quantized_layers(model, plans, NoOutlier()), backend, NEVER_FLOAT, dict.fromkeys(LINEARS, 5))
    assert all(p.backend_asked == "auto" and p.backend_used == copy.get_submodule(p.name).backend.name != "auto" for p in plans)
    assert "5x64x96" in table.read_text()


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
    copy = share_copy(model)
    pairs = zip([*model.parameters(), *model.buffers()], [*copy.parameters(), *copy.buffers()], strict=True)
    assert all(a is b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not {id(m) for m in model.modules()} & {id(m) for m in copy.modules()}
    copy.blocks[0][1] = nn.Identity()
    copy.proj_out = nn.Identity()
    assert torch.equal(model(x), before)


def test_installing_in_a_copy_leaves_the_original_untouched():
    model, x = TinyModel(), randn(9, 7)
    before = model(x)
    int8, _ = to_int8(model)
    assert not torch.equal(int8(x), before)
    assert torch.equal(model(x), before) and not int8_layers(model)


def test_two_backends_in_one_process():
    model = TinyModel()
    # built one after the other, asked afterwards: the second must not have changed the first
    built = [(to_int8(model, backend)[0], backend) for backend in (Reference(), Doubling())]
    for int8, backend in built:
        assert {layer.backend for layer in int8_layers(int8).values()} == {backend}
    h = randn(5, 64)
    assert torch.equal(2 * built[0][0].proj_out(h), built[1][0].proj_out(h))


@pytest.mark.parametrize(
    ("fallback", "params", "rows", "float_rows"),
    [
        ("only_small_layers", 100, 16, 16), ("only_small_layers", 101, 16, 0), ("only_small_layers", 100, 17, 0),
        ("always", 101, 16, 16), ("always", 101, 17, 0), ("never", 1, 1, 0),
    ],
)  # fmt: skip
def test_float_rows(fallback, params, rows, float_rows):
    assert Int8Settings(small_batch_fallback=fallback, max_rows=16, small_layer_params=100).float_rows(params, rows) == float_rows


def test_the_fallback_setting_reaches_the_layers():
    int8, _ = to_int8(TinyModel(), settings=Int8Settings(max_rows=9, small_layer_params=64 * 12))
    assert {name: layer.float_rows for name, layer in int8_layers(int8).items()} == {
        name: 9 if name in ("proj_in", "proj_out") else 0 for name in LINEARS
    }


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"int8\.small_batch_fallback is 'alway'; did you mean 'always'\? choose from always, never"):
        Int8Settings(small_batch_fallback="alway")
    for rows in (-1, 4097, True, "16"):
        with pytest.raises(ConfigError, match=rf"int8\.max_rows is {rows!r}; allowed is a whole number from 0 to 4096"):
            Int8Settings(max_rows=rows)


@pytest.mark.parametrize(
    ("reference", "approximation", "db"),
    [([3.0, 4.0], [3.0, 4.5], 20.0), ([10.0, 0.0], [9.0, 0.0], 20.0), ([1.0, 1.0], [1.0, 1.0], float("inf")), ([1.0], [0.0], 0.0)],
)
def test_sqnr(reference, approximation, db):
    assert sqnr_db(torch.tensor(reference), torch.tensor(approximation)) == pytest.approx(db)


def test_sqnr_is_counted_in_float64():
    reference = torch.full((1000,), 300.0, dtype=torch.float16)
    # the sum of squares is past float16
    assert sqnr_db(reference, reference * 0 + 270) == pytest.approx(20.0)
