"""Put the INT8 denoiser, and where asked for the INT8 VAE, beside the float ones of a model that is loaded.

`pipeline.build` calls it once the layers are planned and a step is traced. What is made goes into the
BuiltModel that it is given; what is worth keeping, to the cache of layers and to the file of `save=`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from int8run.config.run_spec import RunSpec
from int8run.generate.capture import Call
from int8run.layers.plan import LayerPlan
from int8run.layers.plan_summary import select_int8_plans
from int8run.lora.modes import Overhead
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.controlnets import BuiltControlnet, quantize_controlnets
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.lora_steps import BranchOverhead, note_lora_modes
from int8run.pipeline.prequantized import PrequantizedLayers
from int8run.pipeline.provenance import build_provenance, build_vae_provenance
from int8run.pipeline.quantize_attention import ModelAttentions
from int8run.pipeline.quantize_denoiser import (
    QuantizedDenoiser,
    leave_slow_layers_float,
    quantize_denoiser,
)
from int8run.pipeline.shared_layers import Int8Denoiser
from int8run.pipeline.step_settings import select_origin, select_quantization_settings
from int8run.pipeline.store_layers import cache_layers, save_layers, save_vae
from int8run.pipeline.trace_layers import TracedLayers, trace_layers
from int8run.pipeline.vae import QuantizedVae, count_latent_pixels, quantize_vae, select_vae_rounding
from int8run.ptq.conv_costs import ConvCosts
from int8run.ptq.layer_costs import BranchCosts
from int8run.report.console import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSources:
    """What is decided for the layers of a denoiser before any of them is quantized.

    Args:
        plans: of every Linear, and of the convolutions where they may be INT8.
        prequantized: INT8 layers that exist already.
        cache_key: that INT8 layers made here are cached under; None: they are not.
    """

    plans: list[LayerPlan]
    prequantized: PrequantizedLayers | None
    cache_key: str | None


@dataclass(frozen=True)
class TracedStep:
    """One denoising step.

    Args:
        denoiser: that ran it: the float model, or a copy with zeros for the layers whose weights are not
            read.
        calls: its arguments; of two denoisers those of each.
        controlnet_calls: arguments of each ControlNet, by component.
    """

    denoiser: nn.Module
    calls: Sequence[Mapping[str, Any]]
    controlnet_calls: Mapping[str, Sequence[Call]]


def add_int8_denoiser(
    built: BuiltModel,
    spec: RunSpec,
    loaded: LoadedModel,
    *,
    sources: LayerSources,
    step: TracedStep,
    attentions: ModelAttentions,
    progress: Progress,
) -> None:
    """Quantize the denoiser, and bring the LoRAs to its INT8 layers.

    Args:
        built: gets the INT8 denoiser.
        spec: the settings of the run.
        loaded: the float model.
        sources: what is decided for its layers.
        step: shows how many rows each layer sees.
        attentions: those of the denoiser, planned.
        progress: of each step.
    """
    traced = trace_layers(step.denoiser, select_int8_plans(sources.plans), step.calls)
    settings = select_quantization_settings(spec)
    attentions.choose_on_float_model(loaded, step.denoiser)
    if attentions.is_chosen:
        settings = replace(settings, attentions=attentions.planned)
    quantized = quantize_denoiser(
        loaded,
        sources.plans,
        settings,
        traced=traced,
        prequantized=sources.prequantized,
        loras=built.loras,
        progress=progress,
    )
    store_quantized(spec, loaded, sources, quantized)
    quantized = leave_slow_layers_float(
        loaded, sources.plans, settings, quantized=quantized, loras=built.loras
    )
    attentions.choose_on_int8_model(loaded, quantized.denoiser)
    attentions.report()
    built.denoisers["int8"] = quantized.denoiser
    built.mixed_precision = quantized.mixed_precision
    if built.loras.entries and not spec.lora.is_baked:
        attach_loras(built, spec, traced)


def add_int8_controlnets(
    built: BuiltModel, spec: RunSpec, loaded: LoadedModel, step: TracedStep, progress: Progress
) -> list[BuiltControlnet]:
    """Quantize the ControlNets, after the denoiser.

    Args:
        built: has the INT8 denoiser, whose layers they may share.
        spec: the settings of the run.
        loaded: the float model.
        step: has what they were given.
        progress: of the layers.
    """
    return quantize_controlnets(
        loaded,
        step.controlnet_calls,
        select_quantization_settings(spec),
        denoiser=Int8Denoiser(built.denoisers["int8"], built.plans),
        keeps_float=spec.needs_float_denoiser,
        progress=progress,
    )


def add_int8_vae(spec: RunSpec, loaded: LoadedModel, progress: Progress) -> QuantizedVae:
    """Quantize the VAE, and write it where `save=` asks for files.

    Args:
        spec: the settings of the run.
        loaded: the float model.
        progress: of the layers.
    """
    rows = count_latent_pixels(loaded.pipe, spec.sampling)
    settings = select_quantization_settings(spec)
    vae = quantize_vae(loaded, settings, rows, progress)
    if spec.save is not None:
        rounding = select_vae_rounding(settings).name
        save_vae(spec.save, vae, build_vae_provenance(loaded, vae, spec.model, rounding))
    return vae


def store_quantized(
    spec: RunSpec, loaded: LoadedModel, sources: LayerSources, quantized: QuantizedDenoiser
) -> None:
    """Keep the INT8 layers in the cache, where they are new, and in the file of `save=`."""
    cache_key = sources.cache_key if sources.prequantized is None else None
    if cache_key is None and spec.save is None:
        return
    provenance = build_provenance(
        loaded,
        sources.plans,
        select_origin(spec),
        seed=spec.seed,
        prequantized=sources.prequantized,
        cache=spec.cache,
    )
    if cache_key is not None:
        mixed_precision = None
        if quantized.mixed_precision is not None:
            mixed_precision = asdict(quantized.mixed_precision)
        cache_layers(spec.cache, cache_key, quantized.layers, {**provenance, "budget": mixed_precision})
    if spec.save is not None:  # after the cache, so that nothing is lost where it cannot be written
        save_layers(spec.save, loaded, quantized.layers, provenance)


def attach_loras(built: BuiltModel, spec: RunSpec, traced: TracedLayers) -> None:
    """Bring the LoRAs to the INT8 layers, each by the mode that it can have.

    Args:
        built: has the INT8 denoiser and the stack.
        spec: the settings of the run.
        traced: what each layer gets in one step.
    """
    overhead: Overhead | None = None
    if spec.lora.mode == "auto" and not spec.lora.is_scheduled:
        dtype = getattr(torch, spec.model.dtype)
        overhead = BranchOverhead(
            BranchCosts(spec.backend, built.device, dtype),
            ConvCosts(spec.backend, built.device, dtype),
            traced.rows,
            traced.conv_inputs,
        ).measure
    # weights of int8.checkpoint were not made from the float ones in memory
    has_own_float_weights = "float" in built.denoisers and spec.int8.checkpoint is None
    built.loras.attach(
        built.denoisers["int8"],
        float_weights=has_own_float_weights,
        rounding=spec.rounding,
        scheduled=spec.lora.is_scheduled,
        overhead=overhead,
        max_overhead=spec.lora.max_overhead,
    )
    loras = built.loras
    note_lora_modes(built.plans, loras)
    for warning in loras.sizes.list_large_changes(loras.names, spec.lora.largest_strengths):
        log.warning("%s", warning)
