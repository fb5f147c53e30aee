"""Which outlier method each layer gets: the one of the settings, or with `outlier=auto` the best of several.

quantize_denoiser.py calls `choose_methods` after the calibration; api.py has no calibration and calls
`choose_fixed_method`. How candidates are compared is decided in outlier/auto.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from int8run.export.save_denoiser import find_fused_layers
from int8run.layers.int8_conv import get_layer
from int8run.layers.plan import LayerPlan
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.pipeline.layer_selection import SelectedLayers
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.ptq.conv_costs import ConvCosts
from int8run.ptq.layer_costs import TransformCosts
from int8run.ptq.quantize import check_outlier_method
from int8run.report.console import Progress


def choose_methods(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    statistics: Mapping[str, LayerStatistics],
    progress: Progress,
) -> dict[str, OutlierMethod]:
    """The outlier method of each layer that is quantized here, by name; a layer without one is left out.

    Args:
        loaded: the float model.
        layers: why a layer gets no method is noted in its plan.
        settings: how layers become INT8.
        statistics: of the layers that the calibration reached.
        progress: of the comparison of methods.
    """
    if isinstance(settings.outlier, AutoOutlier):
        return choose_methods_by_error(loaded, layers, settings, statistics=statistics, progress=progress)
    return assign_method(layers.new, settings.outlier)


def choose_fixed_method(plans: Sequence[LayerPlan], outlier: OutlierMethod) -> dict[str, OutlierMethod]:
    """The one outlier method for every layer that it can take.

    Raises:
        ConfigError: when it can take none.
    """
    check_outlier_method(outlier, plans)
    return assign_method(plans, outlier)


def assign_method(plans: Sequence[LayerPlan], outlier: OutlierMethod) -> dict[str, OutlierMethod]:
    """One outlier method for every layer whose plan has no reason against it (`check_outlier_method`)."""
    return {plan.name: outlier for plan in plans if not plan.outlier_skip_reason}


def choose_methods_by_error(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    statistics: Mapping[str, LayerStatistics],
    progress: Progress,
) -> dict[str, OutlierMethod]:
    """`outlier=auto`: for each layer the method with the least error on its own activations.

    Args:
        loaded: the float model.
        layers: why a layer gets no method is noted in its plan.
        settings: how layers become INT8; their method is `auto`.
        statistics: of the layers that the calibration reached.
        progress: of the comparison.
    """
    auto = settings.outlier
    assert isinstance(auto, AutoOutlier)
    scores = score_layers(loaded, layers, settings, auto, statistics=statistics, progress=progress)
    fused = list_fused_layers(loaded.denoiser) if settings.has_fused_layers else []
    # a convolution shares nothing with other layers
    groups = [*layers.groups, *([plan.name] for plan in layers.new_convolutions)]
    chosen = auto.choose_methods(scores, select_names(groups, scores), select_names(fused, scores))
    methods = {}
    for plan in layers.new:
        candidate = chosen.get(plan.name)
        if candidate is not None:
            methods[plan.name] = auto.candidates[candidate]
        elif plan.name in scores:
            plan.outlier_skip_reason = "no candidate of outlier=auto takes it at that cost"
        else:
            plan.outlier_skip_reason = "not seen in the calibration"
    return methods


def score_layers(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    auto: AutoOutlier,
    *,
    statistics: Mapping[str, LayerStatistics],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Output SQNR in dB of every affordable candidate, by layer; layers without statistics are left out.

    Args:
        loaded: the float model.
        layers: those that are quantized here are scored.
        settings: the backend and the dtype that costs are measured with.
        auto: has the candidates.
        statistics: of the layers that the calibration reached.
        progress: of the comparison.
    """
    costs = TransformCosts(settings.backend, loaded.device, settings.dtype)
    conv_costs = ConvCosts(settings.backend, loaded.device, settings.dtype)
    # layers that read the same tensor share the time of its transform
    num_sharing = {name: len(group) for group in layers.groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.track_loop("Comparing outlier methods", len(layers.new)) as advance:
        for plan in layers.new:
            seen = statistics.get(plan.name)
            if seen is not None and plan.is_linear:
                shape = (layers.rows[plan.name], plan.in_features, plan.out_features)  # M, K, N
                layout = settings.int8.get_layout(plan.bits)
                cost = partial(costs.get_ratio, shape=shape, sharing=num_sharing[plan.name], layout=layout)
                weight = loaded.read_weight(plan.name)  # [N, K]
                scores[plan.name] = auto.score_candidates(weight, seen, cost, layout)
            elif seen is not None and plan.name in layers.conv_inputs:
                scores[plan.name] = score_convolution(
                    loaded, plan, auto, statistics=seen, costs=conv_costs, layers=layers
                )
            advance(1)
    return scores


def score_convolution(
    loaded: LoadedModel,
    plan: LayerPlan,
    auto: AutoOutlier,
    *,
    statistics: LayerStatistics,
    costs: ConvCosts,
    layers: SelectedLayers,
) -> dict[str, float]:
    """Output SQNR in dB of every affordable candidate of a convolution.

    Args:
        loaded: the float model.
        plan: of the convolution.
        auto: has the candidates.
        statistics: patches that the calibration saw.
        costs: what a rotation costs.
        layers: the shape of what it gets in one step.
    """
    conv = get_layer(loaded.denoiser, plan.name)
    assert not isinstance(conv, nn.Linear)
    cost = partial(costs.get_transform_ratio, conv=conv, input_shape=layers.conv_inputs[plan.name])
    weight = loaded.read_weight(plan.name).flatten(1)  # [N, K]
    return auto.score_conv_candidates(weight, statistics, taps=plan.taps, cost=cost)


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
