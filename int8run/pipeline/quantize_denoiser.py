"""From a float denoiser to an INT8 one, step by step.

build.py calls `quantize_denoiser`, and caches and saves what it returns. `quantize_` of api.py uses the two
checks. The loops over single layers are in ptq/.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.errors import ConfigError
from int8run.export.save_denoiser import find_fused_layers
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.capture import capture_layers, check_finite
from int8run.layers.assemble import assemble_int8_model
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.plan import Int8Settings, LayerPlan
from int8run.lora.stack import LoraStack
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.pipeline.load import LoadedModel, SkeletonLinear
from int8run.pipeline.prequantized import PrequantizedLayers, read_prequantized_layers
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics
from int8run.ptq.layer_costs import TransformCosts
from int8run.ptq.mixed_precision import MixedPrecisionResult, MixedPrecisionSearch
from int8run.ptq.quantize import build_int8_layers, check_backend, check_outlier_method, quantize_layers
from int8run.quant.rounding import Rounding
from int8run.report.console import Progress


@dataclass(frozen=True)
class QuantizationSettings:
    """What decides how the layers of a denoiser become INT8.

    Args:
        outlier: the method, or `auto`.
        rounding: of the weights.
        backend: of the layers.
        int8: when a layer computes in float all the same.
        calibration: which images the float model generates where something is fitted to it.
        quality_db: keep sensitive layers float until this is reached; None: no search,
            only the layers that the family excludes stay float.
        dtype: of the float model.
        has_fused_layers: whether the layers will be saved under their original names, which have some of them
            as one layer. These get one outlier method.
    """

    outlier: OutlierMethod | AutoOutlier
    rounding: Rounding
    backend: Backend
    int8: Int8Settings
    calibration: CalibrationSettings
    quality_db: float | None
    dtype: torch.dtype
    has_fused_layers: bool

    @property
    def is_fitted(self) -> bool:
        """Whether layers that are quantized here are fitted to activations."""
        return self.outlier.needs_calibration or self.rounding.needs_calibration


@dataclass(frozen=True)
class CalibrationData:
    """What the float model computed for the calibration images.

    Args:
        calls: arguments of the denoiser at some timesteps of each image.
        statistics: of the inputs of each layer that is fitted to them.
    """

    calls: Sequence[Mapping[str, Any]] = ()
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedDenoiser:
    """An INT8 denoiser.

    Args:
        denoiser: a copy of the module tree that shares every float tensor with the float model.
        layers: the INT8 layers in it, by name.
        mixed_precision: what keeping layers float for `quality_db` brought; None where nothing was asked for.
    """

    denoiser: nn.Module
    layers: Mapping[str, Int8Linear]
    mixed_precision: MixedPrecisionResult | None


# -- the whole -------------------------------------------------------------------------------------


def quantize_denoiser(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    rows: Mapping[str, int],
    prequantized: PrequantizedLayers | None,
    loras: LoraStack,
    progress: Progress,
) -> QuantizedDenoiser:
    """Make the INT8 denoiser of a model.

    Args:
        loaded: the model, whose denoiser stays as it is.
        plans: of every Linear; what was done with each layer is noted there.
        settings: how layers become INT8.
        rows: that each layer which becomes INT8 sees in one step, by name.
        prequantized: layers that exist already; None: all are quantized here.
        loras: adds baked LoRAs to the weights that are read.
        progress: of each step.

    Raises:
        ConfigError: when no layer becomes INT8, or the float model computes NaN.
        BackendError: when the backend cannot run here or cannot take a layer.
        FileError: when a layer of `prequantized` does not fit.
    """
    chosen = select_int8_plans(plans)
    if not chosen:
        raise ConfigError(
            f"{loaded.source.denoisers[0].class_name}: no layer became INT8 "
            f"({describe_skip_reasons(plans)}); choose another model_type= or set int8.enable=false"
        )
    check_backend(settings.backend, loaded.device, chosen)
    existing: Mapping[str, object] = prequantized.layers if prequantized is not None else {}
    new = [plan for plan in chosen if plan.name not in existing]
    methods: Mapping[str, OutlierMethod] = {}
    if new and not isinstance(settings.outlier, AutoOutlier):
        methods = choose_fixed_method(new, settings.outlier)
    needs_search = settings.quality_db is not None and not (prequantized and prequantized.is_cached)

    groups = group_by_shared_input([plan.name for plan in new], loaded.family.same_input)
    data = calibrate(loaded, new, settings, groups=groups, needs_search=needs_search, progress=progress)
    if new and isinstance(settings.outlier, AutoOutlier):
        methods = choose_methods_by_error(
            loaded, new, settings, rows=rows, groups=groups, statistics=data.statistics, progress=progress
        )

    def read_weight(name: str) -> Tensor:
        return loras.merge_weight(name, loaded.read_weight(name))

    quantized: Iterable[tuple[LayerPlan, QuantizedLayer]] = quantize_layers(
        loaded.denoiser,
        new,
        methods=methods,
        rounding=settings.rounding,
        statistics=data.statistics,
        read=read_weight,
    )
    if prequantized is not None:
        old = [plan for plan in chosen if plan.name in existing]
        quantized = chain(read_prequantized_layers(loaded, old, prequantized, read_weight), quantized)
    label = "Quantizing layers" if new else "Loading INT8 layers"
    with progress.track_loop(label, len(chosen)) as advance:
        layers = build_int8_layers(
            loaded.denoiser,
            quantized,
            backend=settings.backend,
            settings=settings.int8,
            rows=rows,
            on_layer=lambda plan: advance(1),
            device=loaded.device,
        )

    if needs_search:
        return search_mixed_precision(
            loaded, chosen, settings, layers=layers, rows=rows, calls=data.calls, progress=progress
        )
    return QuantizedDenoiser(
        denoiser=assemble_int8_model(loaded.denoiser, layers, loaded.family),
        layers=layers,
        mixed_precision=None if prequantized is None else read_mixed_precision(prequantized),
    )


# -- the steps -------------------------------------------------------------------------------------


def select_int8_plans(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers that become INT8."""
    return [plan for plan in plans if plan.skip_reason is None]


def describe_skip_reasons(plans: Sequence[LayerPlan]) -> str:
    """Why the layers of a denoiser stay float, with the number of layers for each reason."""
    reasons = Counter(plan.skip_reason for plan in plans if plan.skip_reason is not None)
    counts = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return counts or "it has no Linear at all"


def choose_fixed_method(plans: Sequence[LayerPlan], outlier: OutlierMethod) -> dict[str, OutlierMethod]:
    """The one outlier method for every layer that it can take.

    Raises:
        ConfigError: when it can take none.
    """
    check_outlier_method(outlier, plans)
    return {plan.name: outlier for plan in plans if not plan.outlier_skip_reason}


def calibrate(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    groups: Sequence[Sequence[str]],
    needs_search: bool,
    progress: Progress,
) -> CalibrationData:
    """Let the float model generate the calibration images, where anything needs them.

    Args:
        plans: of the layers that are quantized here.
        groups: names of layers that read the same tensor.
        needs_search: whether a mixed precision search follows, which needs the calls alone.
    """
    needs_statistics = bool(plans) and settings.is_fitted
    if not needs_statistics and not needs_search:
        return CalibrationData()
    calls = capture_calibration_calls(
        loaded.pipe,
        loaded.component,
        loaded.denoiser,
        calibration=settings.calibration,
        sampling=loaded.sampling,
        progress=progress,
    )
    if not needs_statistics:
        return CalibrationData(calls)
    statistics = collect_layer_statistics(
        loaded.denoiser, plans, groups=groups, calls=calls, calibration=settings.calibration
    )
    return CalibrationData(calls, statistics)


def choose_methods_by_error(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    rows: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    statistics: Mapping[str, LayerStatistics],
    progress: Progress,
) -> dict[str, OutlierMethod]:
    """`outlier=auto`: for each layer the method with the least error on its own activations.

    Args:
        plans: of the layers that are quantized here; why a layer gets no method is noted there.
        rows: that each layer sees in one step, by name.
        groups: names of layers that read the same tensor.
        statistics: of the layers that the calibration reached.
    """
    auto = settings.outlier
    assert isinstance(auto, AutoOutlier)
    costs = TransformCosts(settings.backend, loaded.device, settings.dtype)
    group_sizes = {name: len(group) for group in groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.track_loop("Comparing outlier methods", len(plans)) as advance:
        for plan in plans:
            if plan.name in statistics:
                shape = (rows[plan.name], plan.in_features, plan.out_features)
                cost = partial(costs.get_ratio, shape=shape, sharing=group_sizes[plan.name])
                weight = loaded.read_weight(plan.name)
                scores[plan.name] = auto.score_candidates(weight, statistics[plan.name], cost)
            advance(1)
    fused = list_fused_layers(loaded.denoiser) if settings.has_fused_layers else []
    chosen = auto.choose_methods(scores, select_names(groups, scores), select_names(fused, scores))
    methods = {}
    for plan in plans:
        candidate = chosen.get(plan.name)
        if candidate is not None:
            methods[plan.name] = auto.candidates[candidate]
        elif plan.name in scores:
            plan.outlier_skip_reason = "no candidate of outlier=auto takes it at that cost"
        else:
            plan.outlier_skip_reason = "not seen in the calibration"
    return methods


def list_fused_layers(denoiser: nn.Module) -> list[list[str]]:
    """Names of the Linears that are one layer under the original names; of two denoisers those of each."""
    fused = []
    for prefix, part in split_denoiser(denoiser).items():
        fused += [[prefix + name for name in names] for names in find_fused_layers(part)]
    return fused


def select_names(groups: Iterable[Sequence[str]], known: Mapping[str, object]) -> list[list[str]]:
    """The names of each group that are known, without groups of which none is."""
    selected = [[name for name in group if name in known] for group in groups]
    return [group for group in selected if group]


def search_mixed_precision(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    layers: Mapping[str, Int8Linear],
    rows: Mapping[str, int],
    calls: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> QuantizedDenoiser:
    """Keep the most sensitive layers float until `quality_db` is met.

    Args:
        plans: of the INT8 layers; those that stay float are noted there.
        layers: the INT8 layers, by name.
        rows: that each layer sees in one step, by name.
        calls: arguments of the denoiser at some timesteps of the calibration images.

    Raises:
        ConfigError: when only the float model meets it.
    """

    def assemble(names: Sequence[str]) -> nn.Module:
        return assemble_int8_model(loaded.denoiser, {name: layers[name] for name in names}, loaded.family)

    search = MixedPrecisionSearch(
        float_denoiser=loaded.denoiser,
        layers=layers,
        macs={plan.name: rows[plan.name] * plan.in_features * plan.out_features for plan in plans},
        assemble=assemble,
        pipe=loaded.pipe,
        component=loaded.component,
        samples=settings.calibration.samples,
        sampling=loaded.sampling,
        calls=calls,
        target_db=settings.quality_db or 0.0,
        progress=progress,
    )
    denoiser, result = search.run()
    for plan in plans:
        if plan.name in result.kept:
            share = result.kept[plan.name]
            plan.skip(f"quality budget: alone it makes {share:.1%} of all layers' error")
    int8_layers = {plan.name: layers[plan.name] for plan in plans if plan.skip_reason is None}
    return QuantizedDenoiser(denoiser, int8_layers, result)


def read_mixed_precision(prequantized: PrequantizedLayers) -> MixedPrecisionResult | None:
    """What the search of an earlier run brought, where the layers are that run's; else None."""
    facts = prequantized.provenance.get("budget")
    if not prequantized.is_cached or not facts:
        return None
    return MixedPrecisionResult(**facts)


def count_layer_rows(
    denoiser: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Rows that each planned layer gets in the last call that reaches it; 1 where no call does.

    Args:
        denoiser: the float model, or a copy with SkeletonLinears.
        plans: of the layers.
        calls: arguments of the denoiser.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    rows = {plan.name: 1 for plan in plans}
    computes_values = not any(isinstance(module, SkeletonLinear) for module in denoiser.modules())

    def count_rows(name: str, x: Tensor, y: Tensor) -> None:
        rows[name] = x.numel() // x.shape[-1]  # [..., K] -> M
        if computes_values:
            check_finite(name, x, "the first step")

    for call in calls:
        capture_layers(denoiser, call, list(rows), count_rows)
    return rows
