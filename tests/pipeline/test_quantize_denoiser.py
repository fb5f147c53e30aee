"""From a float denoiser to an INT8 one: what a checkpoint may contradict, the quality budget, and what a
transform costs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import CPU, NEVER_FLOAT, TinyModel, randn, shipped
from support.tiny_pipeline import random_pipeline
from text_encoders.files import make_encoder_file
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend
from int8run.backends.autotune_cache import read_entries
from int8run.backends.base import Limits
from int8run.backends.reference import Reference
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.errors import ConfigError, FileError
from int8run.export.save_denoiser import keep_own_names, write_tensors
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.generate import Generation, generate
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.layers.assemble import assemble_int8_model
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.lora.config import Adapter, LoraSettings
from int8run.models.family import DeferredGelu, ModelFamily
from int8run.models.sampling import Sampling
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.smoothquant import SmoothQuant
from int8run.pipeline.checkpoint_paths import resolve_checkpoint_paths
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.layer_selection import SelectedLayers
from int8run.pipeline.outlier_choice import choose_fixed_method, choose_methods_by_error
from int8run.pipeline.prequantized import (
    PrequantizedLayers,
    PrequantizedRequest,
    apply_to_plans,
    find_prequantized,
    get_layer_facts,
)
from int8run.pipeline.provenance import list_baked_loras
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.read_prequantized import read_prequantized_layers
from int8run.ptq import layer_costs as costs_module
from int8run.ptq import mixed_precision as budgets
from int8run.ptq.calibration import capture_calibration_calls
from int8run.ptq.layer_costs import TransformCosts
from int8run.ptq.mixed_precision import (
    MixedPrecisionResult,
    MixedPrecisionSearch,
    measure_layer_sensitivities,
)
from int8run.ptq.quantize import build_int8_layers, quantize_layers
from int8run.quant.rounding import AbsMax, Mse
from int8run.quant.weight import quantize_weight
from int8run.report.console import Progress
from int8run.utils.disk_cache import DiskCache

pytestmark = pytest.mark.usefixtures("one_thread")

LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]
QUIET = Progress(enabled=False)
AUTO = AutoOutlier({"none": NoOutlier()})


def planned(model: nn.Module, keep_float: Sequence[str] = ()) -> list[LayerPlan]:
    return plan_layers(model, lambda name: "kept by the test" if name in keep_float else None)


def opened(path: Path, model: nn.Module) -> PrequantizedLayers:
    """A file of INT8 layers for this model."""
    weights = DenoiserWeights({"": FileWeights(path, model, is_partial=True)})
    return PrequantizedLayers(weights, weights.find_int8_layers(), weights.read_provenance())


def saved(
    model: nn.Module,
    method: OutlierMethod,
    path: Path,
    keep_float: Sequence[str] = (),
    note: dict[str, object] | None = None,
) -> tuple[PrequantizedLayers, list[LayerPlan]]:
    """INT8 layers of the model in a file, opened, and the plan that they were made by."""
    plans = planned(model, keep_float)
    chosen = [p for p in plans if p.skip_reason is None]
    methods = {p.name: method for p in chosen if method.unsupported_reason(p.in_features) is None}
    seen = {p.name: statistics(p.in_features, seed=n) for n, p in enumerate(chosen)}
    write_layers(
        path,
        quantize_layers(model, chosen, methods=methods, rounding=AbsMax(), statistics=seen),
        {"rounding": "absmax"} if note is None else note,
    )
    return opened(path, model), plans


def write_layers(path: Path, layers: Any, note: dict[str, object]) -> None:
    """A file of these layers alone."""
    made = {plan.name: Int8Linear(layer, Reference(), torch.float32) for plan, layer in layers}
    write_tensors(path, keep_own_names(f"{name}.weight" for name in made), made, {}, note)


def follow_by(
    taken: PrequantizedLayers, plans: list[LayerPlan], outlier: OutlierMethod | AutoOutlier
) -> None:
    apply_to_plans(taken, plans, outlier)


def layers_of(
    model: nn.Module, plans: list[LayerPlan], taken: PrequantizedLayers
) -> list[tuple[LayerPlan, Any]]:
    """What is taken for this model, compared with its weights."""
    loaded: Any = SimpleNamespace(denoiser=model, device=CPU, checkpoint=None)
    return list(read_prequantized_layers(loaded, plans, taken, lambda name: model.get_submodule(name).weight))


def statistics(width: int, seed: int) -> LayerStatistics:
    sample = randn(2, 8, width, seed=seed)
    return LayerStatistics(sample, sample.abs().amax((0, 1)), torch.ones(width))


# -- int8.checkpoint -----------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_method_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), NoOutlier(), tmp_path / "m.safetensors", keep_float=["proj_out"])
    # proj_in is too narrow to be rotated: plain is what outlier=convrot would have made of it
    message = (
        r"m\.safetensors contradicts outlier=convrot in 4 of 5 "
        r"layers \(blocks\.0\.1 has '.*', not 'convrot 64'\); "
    )
    with pytest.raises(FileError, match=message):
        follow_by(taken, planned(TinyModel()), ConvRot())


def test_the_same_method_with_other_settings_is_a_contradiction(tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), ConvRot(16), tmp_path / "m.safetensors")
    message = (
        r"contradicts outlier=convrot in 5 of 6 layers \(blocks\.0\.1 "
        r"has '.*convrot.* 16', not 'convrot 4'\); set outlier="
    )
    with pytest.raises(FileError, match=message):
        follow_by(taken, planned(TinyModel()), ConvRot(4))
    with pytest.raises(FileError, match=r"contradicts outlier=smoothquant in 6 of 6 layers"):
        follow_by(taken, planned(TinyModel()), SmoothQuant(0.5))
    # blocks.0.3 and blocks.1.3 have 96 inputs, which 64 does not divide
    with pytest.raises(FileError, match="contradicts outlier=convrot in 3 of 6 layers"):
        follow_by(taken, planned(TinyModel()), ConvRot(64))


@pytest.mark.parametrize("asked", [ConvRot(16), AUTO, NoOutlier()], ids=["the same", "auto", "none"])
def test_what_the_file_has_is_taken(asked: OutlierMethod | AutoOutlier, tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), ConvRot(16), tmp_path / "m.safetensors")
    plans = planned(TinyModel())
    follow_by(taken, plans, asked)
    assert [p.skip_reason for p in plans] == [None] * 6
    assert [bool(p.outlier_skip_reason) for p in plans] == [asked == ConvRot(16), *[False] * 5]
    layers_of(TinyModel(), plans, taken)
    assert [p.outlier for p in plans] == ["none", *["convrot group_size=16"] * 5]
    assert {p.rounding for p in plans} == {"absmax"}


def test_layers_that_are_float_in_the_file_stay_float(tmp_path: Path) -> None:
    taken, _ = saved(
        TinyModel(), NoOutlier(), tmp_path / "m.safetensors", keep_float=["blocks.0.1", "proj_out"]
    )
    plans = planned(TinyModel(), keep_float=["proj_in", "proj_out"])
    follow_by(taken, plans, NoOutlier())
    # the file decides; a reason that was there before says more than that
    assert [p.skip_reason for p in plans] == [None, "float in the file", None, None, None, "kept by the test"]


def test_the_file_itself_says_best_why_a_layer_is_float(tmp_path: Path) -> None:
    note = {"kept_float": {"proj_out": "budget", "blocks.0.1": 3, "gone": "x"}}
    taken, _ = saved(
        TinyModel(), NoOutlier(), tmp_path / "m.safetensors", keep_float=["blocks.0.1", "proj_out"], note=note
    )
    plans = planned(TinyModel(), keep_float=["proj_out"])
    follow_by(taken, plans, NoOutlier())
    assert [p.skip_reason for p in plans] == [None, "3", None, None, None, "budget"]
    taken, _ = saved(
        TinyModel(),
        NoOutlier(),
        tmp_path / "m.safetensors",
        keep_float=["proj_out"],
        note={"kept_float": [], "layers": "x"},
    )
    plans = planned(TinyModel())
    follow_by(taken, plans, NoOutlier())
    assert plans[5].skip_reason == "float in the file" and get_layer_facts(taken.provenance, "layers") == {}
    layers_of(TinyModel(), plans[:5], taken)


def test_a_file_of_int8run_itself_is_not_compared_and_may_contradict(tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), ConvRot(16), tmp_path / "m.safetensors")
    cached, plans = replace(taken, is_cached=True), planned(TinyModel())
    follow_by(cached, plans, SmoothQuant(0.5))
    loaded: Any = SimpleNamespace(denoiser=TinyModel(), device=CPU, checkpoint=None)
    list(read_prequantized_layers(loaded, plans, cached, lambda name: pytest.fail("a float weight was read")))


def test_the_models_own_integers_are_not_compared_with_themselves(tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), ConvRot(16), tmp_path / "m.safetensors")
    plans = planned(TinyModel())
    loaded: Any = SimpleNamespace(denoiser=TinyModel(), device=CPU, checkpoint=taken.weights)
    list(read_prequantized_layers(loaded, plans, taken, lambda name: pytest.fail("a float weight was read")))


# -- where the layers come from ------------------------------------------------------------------------------


def found(
    request: PrequantizedRequest, weights: Any = None, names: Sequence[str] = ("transformer",)
) -> PrequantizedLayers | None:
    """What is found for the small model."""
    loaded: Any = SimpleNamespace(
        denoiser=TinyModel(),
        device=CPU,
        checkpoint=weights,
        source=SimpleNamespace(denoisers=[SimpleNamespace(component=n) for n in names]),
    )
    return find_prequantized(loaded, planned(TinyModel()), request)


def make_request(
    checkpoint: Any = None,
    cache: DiskCache | None = None,
    key: str | None = None,
    baked_loras: Sequence[Any] = (),
) -> PrequantizedRequest:
    return PrequantizedRequest(
        checkpoint=checkpoint,
        outlier=NoOutlier(),
        baked_loras=list(baked_loras),
        cache=cache or DiskCache(None, 0),
        cache_key=key,
    )


def test_a_checkpoint_goes_before_the_models_own_file_and_that_before_the_cache(tmp_path: Path) -> None:
    note: dict[str, object] = {"rounding": "absmax", "layers": {name: {} for name in LINEARS}}
    one, _ = saved(TinyModel(), NoOutlier(), tmp_path / "one.safetensors", note=note)
    two, _ = saved(TinyModel(), ConvRot(), tmp_path / "two.safetensors")
    cache = DiskCache(str(tmp_path / "cache"))
    cache.put("int8", "k", 1, lambda path: path.write_bytes((tmp_path / "one.safetensors").read_bytes()))
    given = found(make_request(str(tmp_path / "two.safetensors"), cache, "k"), one.weights)
    assert given is not None and given.source == str(tmp_path / "two.safetensors") and not given.is_cached
    own = found(make_request(cache=cache, key="k"), two.weights)
    assert own is not None and own.weights is two.weights and not own.is_cached
    kept = found(make_request(cache=cache, key="k"))
    assert (
        kept is not None
        and kept.is_cached
        and kept.source == str(tmp_path / "cache" / "int8" / "k.safetensors")
    )
    assert found(make_request(cache=cache, key="other")) is None
    assert found(make_request(cache=cache, key=None)) is None


def test_settings_name_what_a_given_checkpoint_leaves_open(tmp_path: Path) -> None:
    """INT8 rows by SDNQ, which says in its config alone that they are not rotated."""
    tensors = {}
    for name, module in TinyModel().named_modules():
        if isinstance(module, nn.Linear):
            quantized = quantize_weight(module.weight.detach())
            tensors[f"{name}.weight"] = quantized.qdata
            tensors[f"{name}.scale"] = quantized.scale
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)

    with pytest.raises(FileError, match=r"model.sdnq=none or model.sdnq=hadamard"):
        found(make_request(str(path)))
    for words in ({"sdnq": "none"}, {"quant_format": "int8_rowwise"}):
        given = found(replace(make_request(str(path)), declared=DeclaredFormat(**words)))
        assert given is not None and given.layers


def test_a_file_of_floats_alone_holds_nothing_to_take(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "m.safetensors",
        keep_own_names(["proj_in.weight"]),
        {},
        {"proj_in.weight": randn(64, 7)},
        {},
    )
    with pytest.raises(
        FileError,
        match=r"m\.safetensors holds no INT8 layer that can be used as it is; set model\.location to it, or",
    ):
        found(make_request(str(tmp_path / "m.safetensors")))


def test_a_text_encoder_is_named_with_the_setting_that_takes_it(tmp_path: Path) -> None:
    path = make_encoder_file("t5").write(tmp_path / "t5.safetensors")

    with pytest.raises(FileError, match=r"is a text encoder \(t5\), .* set clip=auto clip\.path="):
        found(make_request(str(path)))


def test_a_file_for_each_denoiser_or_a_folder_of_both(tmp_path: Path) -> None:
    two = ["transformer", "transformer_2"]
    assert resolve_checkpoint_paths({"transformer_2": "~/b", "transformer": "a"}, two) == {
        "transformer_2": Path("~/b").expanduser(),
        "transformer": Path("a"),
    }
    with pytest.raises(
        ConfigError, match=r"^int8\.checkpoint names transformer; the model has transformer, transformer_2$"
    ):
        resolve_checkpoint_paths({"transformer": "a"}, two)
    message = (
        r"x is one file, the model has 2 denoisers; set "
        r"'int8\.checkpoint=\{transformer: <file>, transformer_2: <file>\}'$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve_checkpoint_paths("x", two)
    for name in two:
        (tmp_path / name).mkdir()
    assert resolve_checkpoint_paths(str(tmp_path), two) == {name: tmp_path / name for name in two}
    assert resolve_checkpoint_paths(str(tmp_path), two[:1]) == {"transformer": tmp_path / "transformer"}
    assert resolve_checkpoint_paths("x", two[:1]) == {"transformer": Path("x")}


@pytest.mark.parametrize("name", shipped("outlier"))
def test_the_layers_of_a_file_are_those_that_were_written(name: str, tmp_path: Path) -> None:
    method = shipped("outlier")[name]
    taken, made = saved(TinyModel(), method, tmp_path / "m.safetensors")
    plans = planned(TinyModel())
    follow_by(taken, plans, method)
    assert [plan.name for plan, _ in layers_of(TinyModel(), plans, taken)] == LINEARS
    assert [(p.outlier, p.rounding) for p in plans] == [(p.outlier, p.rounding) for p in made]
    assert [p.measured for p in plans] == [pytest.approx(p.measured, rel=1e-6) for p in made]


def test_the_bias_comes_from_the_float_model(tmp_path: Path) -> None:
    taken, _ = saved(TinyModel(), NoOutlier(), tmp_path / "m.safetensors")
    model = TinyModel()
    plans = planned(model)
    for plan, layer in layers_of(model, plans, taken):
        assert layer.bias is model.get_submodule(plan.name).bias


def test_a_checkpoint_of_another_models_weights_is_refused(tmp_path: Path) -> None:
    taken, plans = saved(TinyModel(), ConvRot(), tmp_path / "m.safetensors")
    message = (
        r"m\.safetensors: proj_in does not hold this model's weight \(SQNR "
        r"-\d\.\d dB, at least 15 expected\); it was made from another"
    )
    with pytest.raises(FileError, match=message):
        layers_of(TinyModel(seed=1), plans, taken)


def test_one_layer_of_another_weight_is_found(tmp_path: Path) -> None:
    taken, plans = saved(TinyModel(), ConvRot(), tmp_path / "m.safetensors")
    other = TinyModel()
    other.blocks[1][3].weight.mul_(1.3)
    with pytest.raises(FileError, match=r"blocks\.1\.3 does not hold this model's weight \(SQNR 1\d\.\d dB"):
        layers_of(other, plans, taken)


def test_a_float_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    taken, plans = saved(TinyModel(), NoOutlier(), tmp_path / "m.safetensors")
    damaged = TinyModel()
    damaged.blocks[0][1].weight[2, 3] = float("nan")
    with pytest.raises(ConfigError, match=r"^blocks\.0\.1: the weight holds NaN or infinity"):
        layers_of(damaged, plans, taken)


def test_a_column_that_the_input_hardly_uses_does_not_make_a_weight_look_wrong(tmp_path: Path) -> None:
    # undone, the factor of such a column would multiply its rounding error by thousands
    model, plans = TinyModel(), planned(TinyModel(), LINEARS[1:])
    seen = LayerStatistics(randn(2, 8, 7), torch.tensor([1e-4, 1, 1, 1, 1, 1, 1.0]), torch.ones(7))
    ((_, layer),) = quantize_layers(
        model,
        plans[:1],
        methods={"proj_in": SmoothQuant(1.0)},
        rounding=AbsMax(),
        statistics={"proj_in": seen},
    )
    write_layers(tmp_path / "m.safetensors", [(plans[0], layer)], {})
    again = planned(model)
    ((plan, _),) = layers_of(model, again[:1], opened(tmp_path / "m.safetensors", model))
    assert (
        plan.measured["weight_sqnr_db"] == pytest.approx(plans[0].measured["weight_sqnr_db"], rel=1e-6)
        and plan.measured["weight_sqnr_db"] > 30
    )


@pytest.mark.slow
def test_a_wide_layer_with_a_huge_weight_in_each_row_is_recognised(tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(16384, 4, bias=False)) for _ in range(2))
    for seed, made in enumerate((model, other)):
        made[0].weight.data = randn(4, 16384, seed=seed) * 0.02
        made[0].weight.data[:, 0] = 4 * (-1) ** seed
    taken, plans = saved(model, NoOutlier(), tmp_path / "m.safetensors")
    assert plans[0].measured["weight_sqnr_db"] < 15, "what the check asks for elsewhere"
    layers_of(model, plans, taken)
    with pytest.raises(
        FileError, match=r"0 does not hold this model's weight \(SQNR -\d\.\d dB, at least [56] expected\)"
    ):
        layers_of(other, plans, taken)


def test_other_loras_in_the_weights_are_a_contradiction(tmp_path: Path) -> None:
    place, ink = tmp_path / "m.safetensors", [["ink", 0.1]]
    saved(TinyModel(), NoOutlier(), place, note={"loras": [["ink", 0.1]]})
    assert found(make_request(str(place), baked_loras=ink)) is not None
    message = (
        r"m\.safetensors was made with ink 0\.1 baked in, this run "
        r"bakes no LoRA; for LoRAs on top of it set lora\.mode=dynamic"
    )
    with pytest.raises(FileError, match=message):
        found(make_request(str(place)))
    saved(TinyModel(), NoOutlier(), place, note={"loras": []})
    with pytest.raises(
        FileError,
        match=r"was made with no LoRA baked in, this run bakes ink "
        r"0\.1; for LoRAs on top of it set lora\.mode=dynamic or",
    ):
        found(make_request(str(place), baked_loras=ink))
    save_file(load_file(place), place)  # of another program, which says nothing
    assert found(make_request(str(place), baked_loras=ink)) is not None


def test_only_baked_loras_with_a_strength_count() -> None:
    adapters = [
        Adapter(name="ink", path="ink", strength=0),
        Adapter(name="gloss", path="gloss", strength=0.5),
    ]

    assert list_baked_loras(LoraSettings(adapters, mode="bake")) == [["gloss", 0.5]]
    assert list_baked_loras(LoraSettings(adapters, mode="dynamic")) == []


# -- which method a layer gets -------------------------------------------------------------------------------


def chosen_for(
    outlier: OutlierMethod | AutoOutlier,
    seen: dict[str, LayerStatistics],
    folder: Path,
    groups: Sequence[Sequence[str]] = (),
) -> tuple[dict[str, OutlierMethod], list[LayerPlan]]:
    """The method of each layer of the small model, and the plan."""
    model = TinyModel()
    plans = planned(model)
    backend = AutoBackend({"reference": Reference()}, 1, str(folder / "t.json"))
    settings = QuantizationSettings(
        outlier=outlier,
        rounding=AbsMax(),
        backend=backend,
        int8=NEVER_FLOAT,
        calibration=CALIBRATION,
        quality_db=None,
        dtype=torch.float32,
        needs_calibration=False,
        has_fused_layers=False,
    )
    loaded: Any = SimpleNamespace(
        denoiser=model, device=CPU, read_weight=lambda name: model.get_submodule(name).weight
    )
    if not isinstance(outlier, AutoOutlier):
        return choose_fixed_method(plans, outlier), plans
    methods = choose_methods_by_error(
        loaded,
        SelectedLayers(
            plans=plans,
            new=plans,
            existing=[],
            rows=dict.fromkeys(LINEARS, 4),
            groups=groups or [[name] for name in LINEARS],
        ),
        settings,
        statistics=seen,
        progress=QUIET,
    )
    return methods, plans


def test_a_method_that_was_asked_for_goes_to_all_layers_that_take_it(tmp_path: Path) -> None:
    methods, plans = chosen_for(ConvRot(), {}, tmp_path)

    assert methods == dict.fromkeys(LINEARS[1:], ConvRot())  # proj_in is too narrow for it
    assert [bool(plan.outlier_skip_reason) for plan in plans] == [True, *[False] * 5]


def test_layers_for_which_no_method_is_found_say_why(tmp_path: Path, timed: list[str]) -> None:
    # half a second more than a plain layer's one is too much for max_cost
    seen = {p.name: statistics(p.in_features, seed=1) for p in planned(TinyModel()) if p.name != "proj_out"}
    methods, plans = chosen_for(AutoOutlier({"convrot": ConvRot()}, max_cost=0.1), seen, tmp_path)
    assert methods == {} and [p.outlier_skip_reason for p in plans] == [
        *["no candidate of outlier=auto takes it at that cost"] * 5,
        "not seen in the calibration",
    ]
    assert (
        "convrot" not in (known := (tmp_path / "t.json").read_text())
        and "rotation of 64 | reference | 4x64x96" in known
    )
    methods, plans = chosen_for(AutoOutlier({"convrot": ConvRot()}, max_cost=0.5), seen, tmp_path)
    # proj_in is too narrow for it
    assert list(methods) == LINEARS[1:5] and [bool(p.outlier_skip_reason) for p in plans] == [
        True,
        *[False] * 4,
        True,
    ]


def test_layers_that_share_their_input_share_the_cost_of_its_treatment(
    tmp_path: Path, timed: list[str]
) -> None:
    seen = {p.name: statistics(p.in_features, seed=1) for p in planned(TinyModel())}
    together = ["blocks.0.1", "blocks.1.1", "proj_out"]
    groups = [together, *([name] for name in LINEARS if name not in together)]
    # half a second is a sixth of three plain layers
    for max_cost, expected in ((0.17, together), (0.16, [])):
        methods, _ = chosen_for(
            AutoOutlier({"convrot": ConvRot()}, max_cost=max_cost), seen, tmp_path, groups
        )
        assert list(methods) == expected


# -- one set of layers, several models -----------------------------------------------------------------------


class FusesGelu(Reference):
    """The definition, as a backend that takes a GELU before the layer."""

    limits = Limits(fuses_gelu=True)


FAMILY = ModelFamily("test", same_input=[["q", "k"]], deferred_gelu=[DeferredGelu("act", "up", "down")])


class Attention(nn.Module):
    """Two blocks of layers that share an input, and a GELU between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def block():
            return nn.ModuleDict(
                {
                    "q": nn.Linear(8, 8),
                    "k": nn.Linear(8, 8),
                    "up": nn.Linear(8, 16),
                    "act": nn.GELU("tanh"),
                    "down": nn.Linear(16, 8),
                }
            )

        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b["q"](x) * b["k"](x).tanh()
            x = x + b["down"](b["act"](b["up"](x)))
        return x


def made_of(model: nn.Module, rows: int = 4) -> dict[str, Int8Linear]:
    plans = planned(model)
    layers = quantize_layers(model, plans, methods={}, rounding=AbsMax(), statistics={})
    return build_int8_layers(
        model,
        layers,
        backend=FusesGelu(),
        settings=NEVER_FLOAT,
        rows=dict.fromkeys([p.name for p in plans], rows),
    )


def test_two_models_of_the_same_layers_do_not_see_each_other() -> None:
    model, x = Attention(), randn(2, 4, 8)
    made = made_of(model)
    whole = assemble_int8_model(model, made, FAMILY)
    before = whole(x)
    # without `k` nothing is shared, and without `down` the GELU stays where it was
    part = assemble_int8_model(
        model, {n: m for n, m in made.items() if n not in ("blocks.0.k", "blocks.0.down")}, FAMILY
    )

    def at(target, name):
        return target.get_submodule(f"blocks.{name}")

    assert at(whole, "0.q").shared is at(whole, "0.k").shared is not None and at(part, "0.q").shared is None
    assert at(part, "1.q").shared is not at(whole, "1.q").shared
    assert (at(whole, "0.down").gelu_from, at(whole, "1.down").gelu_from, at(part, "1.down").gelu_from) == (
        0,
        0,
        0,
    )
    assert isinstance(at(whole, "0.act"), nn.Identity) and isinstance(at(part, "0.act"), nn.GELU)
    assert {(m.shared, m.gelu_from, m.adapter) for m in made.values()} == {(None, None, None)}
    branch = LowRankBranch([(randn(2, 8), randn(8, 2))], torch.float32, CPU)
    branch.set_strengths([5.0])
    at(part, "1.q").adapter = branch
    assert not torch.equal(part(x), before) and torch.equal(whole(x), before)
    assert at(whole, "1.q").adapter is None is made["blocks.1.q"].adapter


def test_models_of_the_same_layers_share_their_memory() -> None:
    model = Attention()
    made = made_of(model)
    one, two = assemble_int8_model(model, made, FAMILY), assemble_int8_model(model, made, FAMILY)

    def tensors(m):
        return {t.data_ptr() for t in [*m.parameters(), *m.buffers()]}

    assert tensors(one) == tensors(two) and len(tensors(one)) >= 3 * len(made)
    assert not {id(m) for m in one.modules()} & {id(m) for m in two.modules()}


# -- the quality budget --------------------------------------------------------------------------------------


def test_a_budget_says_what_it_paid() -> None:
    budget = MixedPrecisionResult(45, 46.24, 31.06, {"a": 0.6, "b": 0.1}, 1.251, 1.1)
    assert str(budget) == (
        "quality budget 45 dB: 46.2 dB with 2 of the layers and attentions kept float, 31.1 dB "
        "without; a step takes 1.25× the time, the denoiser 1.10× the "
        "memory"
    )
    assert budget.metrics == {
        "budget/asked_db": 45,
        "budget/reached_db": 46.24,
        "budget/without_db": 31.06,
        "budget/layers_kept": 2,
        "budget/step_ratio": 1.251,
        "budget/memory_ratio": 1.1,
    }
    assert (
        str(MixedPrecisionResult(30.5, 41, 41, {}, 1, 1))
        == "quality budget 30.5 dB: met at 41.0 dB with nothing kept for it"
    )


CALLS = [{"x": randn(1, 5, 7, seed=n)} for n in range(2)]


def tiny_layers(model: nn.Module) -> dict[str, Int8Linear]:
    plans = planned(model)
    return build_int8_layers(
        model,
        quantize_layers(model, plans, methods={}, rounding=AbsMax(), statistics={}),
        backend=Reference(),
        settings=NEVER_FLOAT,
        rows=dict.fromkeys(LINEARS, 5),
    )


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_error_of_a_layer_is_that_of_the_model_where_it_alone_is_int8() -> None:
    model, seen = TinyModel(), []
    made = tiny_layers(model)
    errors = measure_layer_sensitivities(model, made, CALLS, on_layer=lambda: seen.append(1))
    assert list(errors) == LINEARS and len(seen) == 6
    for name, error in errors.items():
        alone = assemble_int8_model(model, {name: made[name]}, ModelFamily("test"))
        pairs = [(alone(**call)[0], model(**call)[0]) for call in CALLS]
        expected = sum(float((a - b).norm() / b.norm()) ** 2 for a, b in pairs) / len(pairs)
        assert error == pytest.approx(expected, rel=1e-4) and error > 0
    assert hooks(model) == 0


def test_no_hook_is_left_when_a_layer_fails() -> None:
    class Broken(Reference):
        def quantize(self, x: Any, **_: Any) -> Any:
            raise RuntimeError("broken")

    model = TinyModel()
    made = tiny_layers(model)
    made["blocks.1.1"].backend = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        measure_layer_sensitivities(model, made, CALLS, on_layer=lambda: None)
    assert hooks(model) == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten dB for each layer that is float; nothing is generated."""

    def floats(denoiser):
        return sum(isinstance(m, nn.Linear) for m in denoiser.modules())

    monkeypatch.setattr(
        budgets, "generate", lambda pipe, component, denoisers, images, sampling, **_: denoisers
    )
    monkeypatch.setattr(budgets, "measure_latents_db", lambda made, exact: 10.0 * floats(made))
    monkeypatch.setattr(
        budgets, "time_medians", lambda calls, device, rounds: [2.0 + floats(call.func) for call in calls]
    )


def counted_budget(
    asked: float, monkeypatch: pytest.MonkeyPatch, errors: dict[str, float], work: dict[str, int]
) -> tuple[nn.Module, MixedPrecisionResult]:
    model = TinyModel()
    made = tiny_layers(model)
    monkeypatch.setattr(budgets, "measure_layer_sensitivities", lambda *_, **__: errors)
    family = ModelFamily("test")
    return MixedPrecisionSearch(
        float_denoiser=model,
        layers=made,
        macs=work,
        assemble=lambda names: assemble_int8_model(model, {n: made[n] for n in names}, family),
        pipe=SimpleNamespace(device=CPU, register_modules=lambda **parts: None),
        component="",
        offload=lambda: None,
        samples=[],
        sampling=Sampling(),
        calls=CALLS,
        target_db=asked,
        progress=QUIET,
    ).run()


@pytest.mark.parametrize("asked", [0.0, 0.1, 10.0, 10.1, 29.0, 30.0, 40.0, 49.0, 50.0])
@pytest.mark.usefixtures("counted")
def test_no_more_layers_are_kept_than_needed_and_the_worst_per_multiplication_first(
    asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {
        "proj_in": 1.0,
        "blocks.0.1": 8.0,
        "blocks.0.3": 3.0,
        "blocks.1.1": 6.0,
        "blocks.1.3": 3.0,
        "proj_out": 0.5,
    }
    work = {"proj_in": 1, "blocks.0.1": 20, "blocks.0.3": 2, "blocks.1.1": 2, "blocks.1.3": 30, "proj_out": 1}
    order = ["blocks.1.1", "blocks.0.3", "proj_in", "proj_out", "blocks.0.1", "blocks.1.3"]
    target, budget = counted_budget(asked, monkeypatch, errors, work)
    count = math.ceil(asked / 10)
    assert list(budget.kept) == order[:count]
    assert list(budget.kept.values()) == [errors[name] / sum(errors.values()) for name in budget.kept]
    assert (budget.asked_db, budget.reached_db, budget.without_db) == (asked, 10.0 * count, 0.0)
    assert {n for n, m in target.named_modules() if isinstance(m, nn.Linear)} == set(order[:count])
    assert budget.step_ratio == 1 + count / 2 and (budget.memory_ratio > 1) == (count > 0)


@pytest.mark.parametrize("asked", [50.1, 200.0])
@pytest.mark.usefixtures("counted")
def test_a_budget_that_only_the_float_model_meets_names_the_best_that_was_measured(
    asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        rf"^quality_db={asked:g} is met by the float model alone: 50\.0 dB "
        rf"is the most that was measured, with 5 of 6 layers and attentions float; ask"
    )
    with pytest.raises(ConfigError, match=message):
        counted_budget(asked, monkeypatch, dict.fromkeys(LINEARS, 1.0), dict.fromkeys(LINEARS, 1))


@pytest.mark.usefixtures("counted")
def test_a_layer_that_makes_no_error_is_no_reason_to_divide_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _, budget = counted_budget(10.0, monkeypatch, dict.fromkeys(LINEARS, 0.0), dict.fromkeys(LINEARS, 1))
    assert list(budget.kept.values()) == [0.0]


FLUX: ModelFamily = shipped("model_type")["flux"]
SMALL = Sampling(steps=2, height=16, width=16)
CALIBRATION = CalibrationSettings(["a", "b"], num_timesteps=2)
BAD = ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"]


def real_budget(asked: float) -> tuple[Any, nn.Module, MixedPrecisionResult]:
    """The budget on a FluxPipeline in which two layers suffer badly from INT8; and the pipeline."""
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():  # a text encoder in training drops numbers at random
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    denoiser = pipe.transformer
    for block in denoiser.transformer_blocks:
        # a weight that nothing is multiplied with, and that leaves no integers to the others of its row
        block.ff.net[0].proj.weight[0] = block.ff.net[0].proj.bias[0] = 0
        block.ff.net[2].weight[:, 0] = 1000
    plans = [p for p in plan_layers(denoiser, FLUX.find_skip_reason) if p.skip_reason is None]
    rows = {p.name: 64 for p in plans}
    made = build_int8_layers(
        denoiser,
        quantize_layers(denoiser, plans, methods={}, rounding=AbsMax(), statistics={}),
        backend=Reference(),
        settings=NEVER_FLOAT,
        rows=rows,
    )
    calls = capture_calibration_calls(
        pipe, "transformer", denoiser, calibration=CALIBRATION, sampling=SMALL, progress=QUIET
    )
    work = {p.name: rows[p.name] * p.in_features * p.out_features for p in plans}
    target, budget = MixedPrecisionSearch(
        float_denoiser=denoiser,
        layers=made,
        macs=work,
        assemble=lambda names: assemble_int8_model(denoiser, {n: made[n] for n in names}, FLUX),
        pipe=pipe,
        component="transformer",
        offload=lambda: None,
        samples=CALIBRATION.samples,
        sampling=SMALL,
        calls=calls,
        target_db=asked,
        progress=QUIET,
    ).run()
    return SimpleNamespace(pipe=pipe, denoiser=denoiser, layers=len(made)), target, budget


def measured_db(run: Any, target: nn.Module) -> float:
    """The same by hand: last latents of the calibration images."""
    sampling = replace(SMALL, extra={"output_type": "latent"})
    made = generate(run.pipe, "transformer", {"a": run.denoiser, "b": target}, CALIBRATION.samples, sampling)
    pairs = zip(made["a"].trajectories, made["b"].trajectories, strict=True)
    ratios = [float((x[-1] - y[-1]).norm() / x[-1].norm()) for x, y in pairs]
    return -20 * math.log10(sum(ratios) / len(ratios))


def test_the_layers_that_int8_hurts_are_kept_and_what_is_reached_is_measured() -> None:
    run, target, budget = real_budget(50.0)
    assert set(budget.kept) == set(BAD)
    assert all(share > 0.2 for share in budget.kept.values()) and sum(budget.kept.values()) > 0.9
    assert budget.without_db < 40 and budget.reached_db >= 50
    assert measured_db(run, target) == pytest.approx(budget.reached_db, abs=1e-6)
    int8 = {n for n, m in target.named_modules() if isinstance(m, Int8Linear)}
    assert len(int8) == run.layers - 2 and not int8 & set(BAD)
    assert hooks(run.denoiser) == 0 and budget.memory_ratio > 1 and budget.step_ratio > 0


def test_a_low_budget_keeps_nothing_and_looks_at_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        budgets,
        "measure_layer_sensitivities",
        lambda *_, **__: pytest.fail("a budget that is met needs no order of the layers"),
    )
    run, target, budget = real_budget(0.0)
    assert not budget.kept and budget.reached_db == budget.without_db == pytest.approx(
        measured_db(run, target), abs=1e-6
    )
    assert sum(isinstance(m, Int8Linear) for m in target.modules()) == run.layers


@pytest.mark.slow
def test_a_budget_beyond_reach_is_a_setting_that_cannot_work() -> None:
    message = (
        r"^quality_db=200 is met by the float model alone: \d+\.\d dB is "
        r"the most .*, with \d+ of 34 layers and attentions float; ask for less, or try"
    )
    with pytest.raises(ConfigError, match=message):
        real_budget(200.0)


def test_equal_latents_have_no_error() -> None:
    latents = Generation(trajectories=[randn(3, 4), randn(3, 4, seed=1)])
    other = Generation(
        trajectories=[latents.trajectories[0], latents.trajectories[1] * torch.tensor([[9.0], [9.0], [1.2]])]
    )
    assert budgets.measure_latents_db(latents, latents) == math.inf
    # the last latents alone count: 0 and 0.2, mean 0.1
    assert budgets.measure_latents_db(other, latents) == pytest.approx(20.0, abs=1e-4)


# -- what a transform costs ----------------------------------------------------------------------------------


@pytest.fixture
def backend(tmp_path: Path) -> AutoBackend:
    return AutoBackend({"reference": Reference()}, 1, str(tmp_path / "table.json"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed. A plain layer takes one second, any other one and a half."""
    seen: list[str] = []

    def in_turns(calls: Sequence[partial], device: torch.device, rounds: int) -> list[list[float]]:
        for call in calls:
            seen.append(call.func.transform.label)
            assert call.args[0].shape[::2] == (1, call.func.in_features)
        return [[1.0 if call.func.transform.label == "none" else 1.5] * rounds for call in calls]

    monkeypatch.setattr(costs_module, "time_in_turns", in_turns)
    return seen


SHAPE = (3, 16, 8)
ROTATED = ConvRot(16).fit(torch.ones(8, 16))


def test_a_cost_is_measured_once_and_remembered_in_the_table(
    backend: AutoBackend, timed: list[str], tmp_path: Path
) -> None:
    costs = TransformCosts(backend, CPU, torch.float32)
    assert [costs.get_ratio(ROTATED, SHAPE), costs.get_ratio(ConvRot(64).fit(torch.ones(8, 16)), SHAPE)] == [
        1.5,
        1.5,
    ]
    assert timed == ["none", "convrot group_size=16"]
    known = read_entries(tmp_path / "table.json")
    (key,) = [key for key in known if "cost of" in key]
    assert (
        key.endswith(
            "torch.float32 | cost of regular rotation of 16 | reference | 3x16x8".replace("torch.", "")
        )
        and known[key] == "1.5"
    )
    timed.clear()
    assert TransformCosts(backend, CPU, torch.float32).get_ratio(ROTATED, SHAPE) == 1.5 and timed == []
    assert TransformCosts(backend, CPU, torch.bfloat16).get_ratio(ROTATED, SHAPE) == 1.5 and timed, (
        "another dtype is another question"
    )


def test_a_backend_of_ones_own_choice_is_measured_itself(
    monkeypatch: pytest.MonkeyPatch, timed: list[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TransformCosts(Reference(), CPU, torch.float32).get_ratio(ROTATED, SHAPE) == 1.5
    assert "| reference | 3x16x8" in (tmp_path / ".cache" / "int8run" / "backend_choices.json").read_text()


def test_one_transform_serves_all_layers_that_share_it_but_not_with_factors_of_their_own(
    backend: AutoBackend, timed: list[str]
) -> None:
    costs = TransformCosts(backend, CPU, torch.float32)
    assert [costs.get_ratio(ROTATED, SHAPE, sharing) for sharing in (1, 2, 4)] == [1.5, 1.25, 1.125]
    assert [costs.get_ratio(TRANSFORMS["centered"], SHAPE, sharing) for sharing in (1, 4)] == [1.5, 1.5]
    assert costs.get_ratio(OutlierTransform(), SHAPE, 4) == 1.0


def test_nothing_costs_nothing(backend: AutoBackend, timed: list[str]) -> None:
    assert (
        TransformCosts(backend, CPU, torch.float32).get_ratio(OutlierTransform(), SHAPE) == 1.0
        and timed == []
    )


FACTOR = torch.full((16,), 2.0)
TRANSFORMS = {
    "factor": OutlierTransform("a", factor=FACTOR),
    "regular 4": OutlierTransform("a", rotation=Rotation(regular_hadamard(4))),
    "regular 16": OutlierTransform("a", rotation=Rotation(regular_hadamard(16))),
    "sylvester 16": OutlierTransform("a", rotation=Rotation(sylvester_hadamard(16), True)),
    "both": OutlierTransform("a", factor=FACTOR, rotation=Rotation(regular_hadamard(16))),
    "centered": OutlierTransform("a", factor=FACTOR, rotation=Rotation(regular_hadamard(16)), centered=True),
}


def test_transforms_that_do_different_things_are_different_questions(
    backend: AutoBackend, timed: list[str]
) -> None:
    costs = TransformCosts(backend, CPU, torch.float32)
    for transform in TRANSFORMS.values():
        timed.clear()
        costs.get_ratio(transform, SHAPE)
        assert timed, "this one was not measured before"
        timed.clear()
        # other numbers, method and settings: the same work
        again = OutlierTransform(
            "b",
            {"x": 1},
            None if transform.factor is None else transform.factor * 3,
            transform.rotation,
            centered=transform.centered,
        )
        costs.get_ratio(again, SHAPE)
        assert timed == []


def test_a_shape_is_part_of_the_question(backend: AutoBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def in_turns(calls: Sequence[partial], device: torch.device, rounds: int) -> list[list[float]]:
        shapes.extend((call.args[0].shape[1], *call.func.packed.shape[::-1]) for call in calls)
        return [[1.0] * rounds for _ in calls]

    monkeypatch.setattr(costs_module, "time_in_turns", in_turns)
    costs = TransformCosts(backend, CPU, torch.float32)
    for shape in ((3, 16, 8), (4, 16, 8), (3, 32, 8), (3, 16, 9)):
        shapes.clear()
        costs.get_ratio(ROTATED, shape)
        assert set(shapes) == {shape}


def test_times_that_scatter_are_used_once_and_not_remembered(
    backend: AutoBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    times = [1.0] * 3 + [9.0] * 12
    monkeypatch.setattr(costs_module, "time_in_turns", lambda calls, device, rounds: [times, times])
    costs = TransformCosts(backend, CPU, torch.float32)
    assert costs.get_ratio(ROTATED, SHAPE) == costs.get_ratio(ROTATED, SHAPE) == 1.0
    assert caplog.text.count("times scatter by more than twice") == 1
    assert "cost of" not in (tmp_path / "table.json").read_text()


@pytest.mark.parametrize("damage", ["", "fast", "nan", "-1", "0", "inf"])
def test_a_cost_that_somebody_wrote_into_the_table_is_measured_anew(
    damage: str, backend: AutoBackend, timed: list[str], tmp_path: Path
) -> None:
    TransformCosts(backend, CPU, torch.float32).get_ratio(ROTATED, SHAPE)
    table = tmp_path / "table.json"
    table.write_text(table.read_text().replace('"1.5"', json.dumps(damage)))
    timed.clear()
    assert TransformCosts(backend, CPU, torch.float32).get_ratio(ROTATED, SHAPE) == 1.5 and timed


def test_real_layers_can_be_timed(backend: AutoBackend) -> None:
    costs = TransformCosts(backend, CPU, torch.bfloat16)
    assert all(0 < costs.get_ratio(transform, SHAPE) < math.inf for transform in TRANSFORMS.values())


def test_mse_layers_are_close_enough_to_be_recognised(tmp_path: Path) -> None:
    # a rounding that clips must not be taken for another model's weight
    model = TinyModel()
    plans = planned(model)
    write_layers(
        tmp_path / "m.safetensors",
        quantize_layers(model, plans, methods={}, rounding=Mse(smallest=0.1), statistics={}),
        {},
    )
    taken = opened(tmp_path / "m.safetensors", model)
    assert all(plan.measured["weight_sqnr_db"] > 30 for plan, _ in layers_of(model, planned(model), taken))
