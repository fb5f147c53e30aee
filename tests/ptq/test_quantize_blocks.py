"""What INT8 does inside a block: shared inputs, moved GELUs, errors by layer, strengths that change."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import FluxTransformer2DModel
from support.compare import assert_close
from support.helpers import CPU, NEVER_FLOAT, TinyModel, on_int8, randn, shipped, to_int8, usable
from torch import nn

from int8run.backends.base import Limits
from int8run.backends.reference import Reference
from int8run.errors import BackendError, ConfigError
from int8run.generate.capture import check_finite
from int8run.layers.fusion import defer_gelu, share_inputs
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import Int8Settings, plan_layers
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.lora import LoRA
from int8run.metrics.layers import measure_layer_outputs
from int8run.models.family import DeferredGelu
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.ptq.quantize import check_backend

FLUX = shipped("model_type")["flux"]
ABLE = [
    pytest.param(backend, id=name) for name, backend in shipped("backend").items() if usable(backend, CPU)
]
ALWAYS_FLOAT = Int8Settings(small_batch_fallback="always", max_rows=4096)
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# where the GELU's result goes, and the column that it starts at: a single block's proj_out reads the
# attention's 32 first
DEFERRED = {f"{DOUBLE}.ff.net.2": 0, f"{DOUBLE}.ff_context.net.2": 0, f"{SINGLE}.proj_out": 32}


@dataclass(frozen=True)
class Fusing(Reference):
    """A backend for which a GELU inside the quantization is free."""

    name: ClassVar[str] = "fusing"
    limits: ClassVar[Limits] = Limits(fuses_gelu=True)


@pytest.fixture(scope="module")
def flux():
    """diffusers' own class, one double and one single block, and the arguments of a call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    # 3 x 7 image tokens: rows that are no multiple of anything
    call = {
        "hidden_states": randn(1, 21, 8),
        "encoder_hidden_states": randn(1, 5, 16, seed=1),
        "pooled_projections": randn(1, 16, seed=2),
        "timestep": torch.tensor([0.7]),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(7.0)),
    }
    return model.eval().requires_grad_(False), call


def int8(
    model, backend=None, deferred=True, outlier=None, settings=NEVER_FLOAT, why_float=FLUX.find_skip_reason
):
    """The INT8 model as a run builds it, and its plan; `deferred`: with sharing and moved GELUs."""
    keep = tuple(p.name for p in plan_layers(model, why_float) if p.skip_reason is not None)
    copy, plans = to_int8(model, backend or Fusing(), outlier, settings, keep)
    if deferred:
        share_inputs(copy, FLUX.same_input)
        for gelu in FLUX.deferred_gelu:
            defer_gelu(copy, gelu)
    return copy, plans


def run(model, call):
    return model(**call, return_dict=False)[0]


def gelu_from(model):
    """The layers that apply a GELU, with its first column."""
    return {
        name: m.gelu_from
        for name, m in model.named_modules()
        if isinstance(m, Int8Linear) and m.gelu_from is not None
    }


def test_counts_in_a_flux_transformer(flux):
    model, _ = int8(flux[0], deferred=False)

    # q, k, v of the image, of the text, and of the single block with proj_mlp
    assert share_inputs(model, FLUX.same_input) == 2 + 2 + 3

    groups = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear) and module.shared is not None:
            groups.setdefault(id(module.shared), []).append(name)

    assert sorted(map(sorted, groups.values())) == [
        [f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"],
        [f"{DOUBLE}.attn.add_k_proj", f"{DOUBLE}.attn.add_q_proj", f"{DOUBLE}.attn.add_v_proj"],
        [f"{DOUBLE}.attn.to_k", f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_v"],
    ]
    assert [defer_gelu(model, gelu) for gelu in FLUX.deferred_gelu] == [1, 1, 1]
    assert gelu_from(model) == DEFERRED
    # a second time there is nothing left to move
    assert [defer_gelu(model, gelu) for gelu in FLUX.deferred_gelu] == [0, 0, 0]


@pytest.mark.parametrize("outlier", [None, ConvRot(), HadaNorm(16)], ids=["none", "convrot", "hadanorm"])
@pytest.mark.parametrize("backend", ABLE)
def test_the_model_computes_what_it_did(flux, backend, outlier):
    model, call = flux
    before, _ = int8(model, backend, False, outlier)
    after, _ = int8(model, backend, True, outlier)
    expected = run(before, call)

    # a polynomial for the GELU and a rotation in another order move an integer at a tie now and then: 1e-3 of
    # the output
    assert_close(backend.name, run(after, call), expected, 1e-3 if backend.name == "cpu" else 1e-5)
    assert_close("float model", expected, run(model, call), 0.05)


def test_the_float_model_keeps_its_activations(flux):
    model, call = flux
    before = run(model, call)
    int8(model)

    assert torch.equal(run(model, call), before)


def test_float_rows_apply_the_gelu_themselves(flux):
    model, call = flux
    before, _ = int8(model, deferred=False, settings=ALWAYS_FLOAT)
    after, plans = int8(model, settings=ALWAYS_FLOAT)

    assert gelu_from(after) == DEFERRED and {p.backend_used for p in plans if p.skip_reason is None} == {
        "float_fallback"
    }
    assert_close("fallback", run(after, call), run(before, call), 1e-6)


@pytest.mark.parametrize("kept", list(DEFERRED))
def test_a_gelu_before_a_float_layer_is_left_alone(flux, kept):
    model, call = flux

    def why(name):
        return "kept by the test" if name == kept else FLUX.find_skip_reason(name)

    after, _ = int8(model, why_float=why)

    assert gelu_from(after) == {name: column for name, column in DEFERRED.items() if name != kept}
    assert_close("kept", run(after, call), run(int8(model, deferred=False, why_float=why)[0], call), 1e-5)


@pytest.mark.parametrize("source", [f"{DOUBLE}.ff.net.0.proj", f"{SINGLE}.proj_mlp"])
def test_a_gelu_after_a_float_layer_moves_all_the_same(flux, source):
    model, call = flux

    def why(name):
        return "kept by the test" if name == source else FLUX.find_skip_reason(name)

    after, _ = int8(model, why_float=why)

    assert gelu_from(after) == DEFERRED
    assert_close("source", run(after, call), run(int8(model, deferred=False, why_float=why)[0], call), 1e-5)


FEED_FORWARD = DeferredGelu(activation="ff.act", source="ff.up", into="ff.down")


class FeedForward(nn.Module):
    """Two Linears around an activation, in a block."""

    def __init__(self, activation):
        super().__init__()
        self.ff = nn.ModuleDict({"up": nn.Linear(8, 24), "act": activation, "down": nn.Linear(24, 8)})
        self.requires_grad_(False)

    def forward(self, x):
        return self.ff["down"](self.ff["act"](self.ff["up"](x)))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Identity()], ids=lambda a: type(a).__name__)
def test_only_a_tanh_gelu_moves(activation):
    model, _ = to_int8(nn.Sequential(FeedForward(activation)), Fusing())
    x = randn(5, 8)
    before = model(x)

    assert defer_gelu(model, FEED_FORWARD) == 0 and model[0].ff["act"].__class__ is activation.__class__
    assert torch.equal(model(x), before)


def test_a_tanh_gelu_moves():
    model, _ = to_int8(
        nn.Sequential(FeedForward(nn.GELU(approximate="tanh")), FeedForward(nn.GELU(approximate="tanh"))),
        Fusing(),
    )
    x = randn(5, 8)
    before = model(x)

    assert defer_gelu(model, FEED_FORWARD) == 2 and isinstance(model[1].ff["act"], nn.Identity)
    assert torch.equal(model(x), before)


def test_a_gelu_stays_before_a_layer_that_takes_the_mean_of_its_result():
    model, _ = to_int8(nn.Sequential(FeedForward(nn.GELU(approximate="tanh"))), Fusing(), HadaNorm(8))
    x = randn(2, 5, 8)
    before = model(x)

    assert defer_gelu(model, FEED_FORWARD) == 0 and isinstance(model[0].ff["act"], nn.GELU)
    assert torch.equal(model(x), before)


def test_a_gelu_stays_where_the_backend_would_pay_for_it():
    model, _ = to_int8(nn.Sequential(FeedForward(nn.GELU(approximate="tanh"))), Reference())
    assert defer_gelu(model, FEED_FORWARD) == 0


def test_names_that_a_block_does_not_have_move_nothing():
    model, _ = to_int8(nn.Sequential(FeedForward(nn.GELU(approximate="tanh"))), Fusing())
    for names in (
        ("ff.gone", "ff.up", "ff.down"),
        ("ff.act", "ff.gone", "ff.down"),
        ("ff.act", "ff.up", "ff.gone"),
    ):
        assert defer_gelu(model, DeferredGelu(*names)) == 0


def flux_lora(model, rank=3):
    """A LoRA for every Linear of the blocks."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks.0." in name]
    sizes = [model.get_submodule(name).weight.shape for name in names]
    return {
        name: LoraChange(LoRA(randn(rank, k, seed=2 * i), randn(n, rank, seed=2 * i + 1), 0.05))
        for i, (name, (n, k)) in enumerate(zip(names, sizes, strict=True))
    }


@pytest.mark.parametrize("backend", ABLE)
def test_loras_find_their_layers_under_the_old_names(flux, backend):
    model, call = flux
    results = []
    for deferred in (False, True):
        ours, plans = int8(model, backend, deferred)
        expected = [p.name for p in plans if p.skip_reason is None]
        assert f"{DOUBLE}.ff.net.0.proj" in expected
        branches = on_int8(model, ours, [flux_lora(model)])
        assert len(branches.dynamic_layers) == len(expected)
        plain = run(ours, call)
        branches.set_strengths([1.0])
        results.append(run(ours, call))
        branches.set_strengths([0.0])  # the float model is used again
        assert (results[-1] - plain).norm() > 0.05 * plain.norm()

    assert_close(backend.name, results[1], results[0], 1e-3 if backend.name == "cpu" else 1e-5)


@pytest.mark.parametrize("backend", ABLE)
def test_measuring_a_layer_leaves_out_the_gelu_and_the_sharing(flux, backend):
    model, call = flux
    measured = []
    for deferred in (False, True):
        ours, plans = int8(model, backend, deferred)
        measure_layer_outputs(model, ours, [call], plans)
        measured.append({p.name: p.measured["output_sqnr_db"] for p in plans if p.skip_reason is None})

    assert measured[0].keys() == measured[1].keys() and min(measured[0].values()) > 25
    assert measured[1] == pytest.approx(measured[0], abs=0.2)


class Narrow(Reference):
    """Takes few input features only."""

    name: ClassVar[str] = "narrow"
    limits: ClassVar[Limits] = Limits(max_in_features=64)


def test_every_layer_that_a_backend_rejects_is_named_at_once():
    why = "in_features=96 overflows its 32-bit sums, which hold 64"
    message = (
        rf"^backend 'narrow' cannot take 2 layers: blocks\.0\.3: {why}; blocks\.1\.3: {why}; "
        r"backend=auto gives them to another$"
    )
    plans = plan_layers(TinyModel(), lambda name: None)
    with pytest.raises(BackendError, match=message):
        check_backend(Narrow(), CPU, plans)
    check_backend(Narrow(), CPU, [p for p in plans if p.in_features <= 64])


def test_a_device_is_rejected_with_all_reasons_and_what_can_run_there():
    class Elsewhere(Reference):
        name: ClassVar[str] = "elsewhere"
        limits: ClassVar[Limits] = Limits(
            cpu_features=("no_such_feature",), python_packages=("no_such_package",)
        )

    message = (
        r"^backend 'elsewhere' cannot run here: needs a CPU with no_such_feature.*; "
        r"needs the Python package no_such.*\breference\b"
    )
    with pytest.raises(BackendError, match=message):
        check_backend(Elsewhere(), CPU, [])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("n", "k"), [(3, 0), (0, 3)])
def test_an_empty_weight_is_rejected(n, k):
    model = nn.Sequential(nn.Linear(k, n).requires_grad_(False))
    with pytest.raises(
        ConfigError, match=rf"^0: the weight is {n} x {k}, nothing to quantize; keep the layer float$"
    ):
        to_int8(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_are_counted(value):
    x = randn(3, 4)
    check_finite("blocks.0.ff", x, "the first step")
    x[0, 1] = x[2, 3] = value
    message = (
        r"^blocks\.0\.ff: 2 of 12 inputs are NaN or infinite in the first step of the float model; "
        r"check the checkpoint, or try model\."
    )
    with pytest.raises(ConfigError, match=message):
        check_finite("blocks.0.ff", x, "the first step")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ABLE)
def test_a_new_strength_compiles_nothing_anew(flux, backend):
    model, call = flux
    torch._dynamo.reset()
    ours, _ = int8(model, backend)
    branches = on_int8(model, ours, [flux_lora(model)])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    branches.set_strengths([0.0])
    run(compiled, call)
    without = run(ours, call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (1.0, 0.0, -0.5, 0.0):
            branches.set_strengths([strength])
            y, eager = run(compiled, call), run(ours, call)
            assert_close(f"strength {strength}", y, eager, 1e-5)
            assert strength or torch.equal(eager, without)
