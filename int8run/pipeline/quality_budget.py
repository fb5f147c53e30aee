"""The quality budget of a denoiser: which layers stay float until it holds, and how many bits others have.

quantize_denoiser.py calls it once all layers are made; the search itself is in ptq/mixed_precision.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from int8run.layers.assemble import assemble_int8_model
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.plan import LayerPlan
from int8run.layers.plan_summary import select_int8_plans
from int8run.pipeline.layer_selection import SelectedLayers
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.offload import set_offload
from int8run.pipeline.prequantized import PrequantizedLayers
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.step_denoisers import share_with_trials
from int8run.ptq.mixed_precision import MixedPrecisionResult, MixedPrecisionSearch
from int8run.ptq.sensitivities import Computed
from int8run.report.console import Progress


@dataclass(frozen=True)
class BoundLayers:
    """Layers that are made, to choose from.

    Args:
        layers: with the bits of the settings, by name; 8 where a budget chooses the bits.
        fewer_bits: with `int8.bits=auto` those with 4 and 6 bits, by bits and name.
        plans_of_fewer: what happened to each of these.
    """

    layers: Mapping[str, Int8Layer]
    fewer_bits: Mapping[int, Mapping[str, Int8Layer]] = field(default_factory=dict)
    plans_of_fewer: Mapping[int, Mapping[str, LayerPlan]] = field(default_factory=dict)

    def get_layer(self, name: str, bits: int | None) -> Int8Layer:
        """The layer of that name with these bits; None: with those of the settings."""
        return self.fewer_bits.get(bits or 0, self.layers)[name]


def search_mixed_precision(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    bound: BoundLayers,
    calls: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> tuple[nn.Module, dict[str, Int8Layer], MixedPrecisionResult]:
    """Keep sensitive layers and attentions float, or give them more bits, until `quality_db` is met.

    Args:
        loaded: the float model.
        layers: those that stay float after all are noted in their plans, and the bits of the others.
        settings: the quality, and the images that it is measured on.
        bound: of all plans.
        calls: arguments of the denoiser at some timesteps of the calibration images.
        progress: of the search.

    Returns:
        The denoiser, its INT8 layers by name, and what the search found.

    Raises:
        ConfigError: when only the float model meets it.
    """
    attentions = settings.attention_layers

    def assemble(chosen: Mapping[str, Computed]) -> nn.Module:
        int8_layers: dict[str, Int8Layer] = {}
        int8_attentions: dict[str, Int8Attention] = {}
        for name, computed in chosen.items():
            if isinstance(computed, Int8Attention):
                int8_attentions[name] = computed
            else:
                int8_layers[name] = computed
        return assemble_int8_model(loaded.denoiser, int8_layers, loaded.family, int8_attentions)

    macs = {attention.plan.name: attention.macs for attention in settings.attentions}
    for plan in layers.plans:
        macs[plan.name] = layers.rows[plan.name] * plan.in_features * plan.out_features
    search = MixedPrecisionSearch(
        float_denoiser=loaded.denoiser,
        layers={**bound.layers, **attentions},
        macs=macs,
        assemble=assemble,
        pipe=loaded.pipe,
        component=loaded.component,
        offload=partial(set_offload, loaded.pipe, loaded.offload, loaded.device),
        samples=settings.calibration.samples,
        sampling=loaded.sampling,
        calls=calls,
        target_db=settings.quality_db or 0.0,
        progress=progress,
        share_steps=share_with_trials(loaded, settings),
        fewer_bits=bound.fewer_bits,
    )
    denoiser, result = search.run()
    note_result(layers.plans, bound, result)
    note_kept_attentions(settings, result)
    still_int8 = {}
    for plan in select_int8_plans(layers.plans):
        still_int8[plan.name] = bound.get_layer(plan.name, result.bits.get(plan.name))
    return denoiser, still_int8, result


def note_result(plans: Sequence[LayerPlan], bound: BoundLayers, result: MixedPrecisionResult) -> None:
    """Write into the plans which layers a budget keeps float, and which bits it gives the others."""
    for plan in plans:
        if plan.name in result.kept:
            plan.skip(describe_budget(result.kept[plan.name]))
            continue
        plans_of_bits = bound.plans_of_fewer.get(result.bits.get(plan.name, 0), {})
        if plan.name in plans_of_bits:
            plan.become(plans_of_bits[plan.name])


def describe_budget(share: float) -> str:
    """Why a quality budget keeps a layer float.

    Args:
        share: of the layer in the sum of all layers' errors, each alone.
    """
    return f"quality budget: alone it makes {share:.1%} of all layers' error"


def note_kept_attentions(settings: QuantizationSettings, result: MixedPrecisionResult) -> None:
    """Keep the attentions float that a quality budget has found to be too sensitive."""
    for attention in settings.attentions:
        share = result.kept.get(attention.plan.name)
        if share is not None and attention.layer is not None:
            attention.leave_float(describe_budget(share))


def is_from_cache(prequantized: PrequantizedLayers | None) -> bool:
    """Whether the layers are those of an earlier run with the same settings, its search included."""
    return prequantized is not None and prequantized.is_cached


def read_mixed_precision(prequantized: PrequantizedLayers | None) -> MixedPrecisionResult | None:
    """What the search of an earlier run brought, where the layers are that run's; else None."""
    if prequantized is None or not prequantized.is_cached:
        return None
    facts = prequantized.provenance.get("budget")
    return MixedPrecisionResult(**facts) if facts else None
