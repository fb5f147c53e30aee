"""Which outlier method each layer gets: the one of the settings, or with `outlier=auto` the best of several.

quantize_denoiser.py calls `choose_methods` after the calibration; api.py has no calibration and calls
`choose_fixed_method`. How candidates are compared is decided in outlier/auto.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from int8run.export.save_denoiser import find_fused_layers
from int8run.layers.plan import CONV, LayerPlan
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod, describe_linear_method
from int8run.pipeline.layer_selection import SelectedLayers
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantization_settings import QuantizationSettings
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
        for plan in layers.new:
            if plan.kind == CONV:
                plan.outlier_skip_reason = describe_linear_method(settings.outlier.name)
        if not layers.new_linears:
            return {}
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
    chosen = auto.choose_methods(scores, select_names(layers.groups, scores), select_names(fused, scores))
    methods = {}
    for plan in layers.new_linears:
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
    # layers that read the same tensor share the time of its transform
    num_sharing = {name: len(group) for group in layers.groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.track_loop("Comparing outlier methods", len(layers.new_linears)) as advance:
        for plan in layers.new_linears:
            if plan.name in statistics:
                shape = (layers.rows[plan.name], plan.in_features, plan.out_features)  # M, K, N
                cost = partial(costs.get_ratio, shape=shape, sharing=num_sharing[plan.name])
                weight = loaded.read_weight(plan.name)  # [N, K]
                scores[plan.name] = auto.score_candidates(weight, statistics[plan.name], cost)
            advance(1)
    return scores


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
