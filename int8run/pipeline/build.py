"""Build what a run needs: a pipeline, its float denoiser, the INT8 denoiser beside it, and LoRAs on both.

`tasks.run` calls `build_model`; `process_cache` keeps the last model for jobs with equal settings. This is
the last place that sees the whole RunSpec (`step_settings` makes of it what the steps take): the functions
that it calls take the settings that they use.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.output_path import prepare_output_path
from int8run.config.run_spec import RunSpec
from int8run.generate.capture import capture_step
from int8run.generate.generate import set_components, set_text_encoders
from int8run.generate.prompts import Sample
from int8run.layers.plan import FLOAT, INT8, LayerPlan
from int8run.lora.entries import Entry
from int8run.lora.header_info import LoraHeader
from int8run.lora.match import Matches
from int8run.lora.modes import Overhead
from int8run.lora.stack import LoraStack
from int8run.metrics.layers import count_module_bytes, note_macs_shares
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.given_model import find_text_encoders
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.compile import compile_denoisers
from int8run.pipeline.given_files import check_checkpoint_fits, check_loras_fit
from int8run.pipeline.layer_selection import select_int8_plans, warn_without_convolutions
from int8run.pipeline.load import load_model
from int8run.pipeline.loaded_model import LoadedModel, replace_missing_layers
from int8run.pipeline.lora_steps import bake_loras, measure_overhead, read_entries, report_loras
from int8run.pipeline.offload import set_offload
from int8run.pipeline.prequantized import (
    PrequantizedLayers,
    PrequantizedRequest,
    find_prequantized,
    report_float_attention,
)
from int8run.pipeline.provenance import build_cache_key, build_provenance, list_baked_loras
from int8run.pipeline.quantize_attention import ModelAttentions, count_step, plan_attentions
from int8run.pipeline.quantize_denoiser import (
    QuantizedDenoiser,
    leave_slow_layers_float,
    quantize_denoiser,
    trace_layers,
)
from int8run.pipeline.step_settings import (
    select_attention_settings,
    select_load_settings,
    select_origin,
    select_quantization_settings,
)
from int8run.pipeline.store_layers import cache_layers, save_layers
from int8run.pipeline.text_encoders import QuantizedEncoders, build_encoders
from int8run.pipeline.vae import QuantizedVae, count_latent_pixels, quantize_vae
from int8run.ptq.layer_costs import BranchCosts
from int8run.report.columns import SAME_FILE_LIMITS
from int8run.report.console import Progress
from int8run.utils.plurals import count_noun

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
    """

    denoiser: nn.Module
    calls: Sequence[Mapping[str, Any]]


def build_model(
    spec: RunSpec, probe: Sequence[Sample], headers: Sequence[LoraHeader], progress: Progress
) -> BuiltModel:
    """Load a model, put the LoRAs on it, and quantize it.

    Args:
        spec: the settings of the run.
        probe: samples of one batch; the denoiser's call on them gives real shapes and activations.
        headers: the LoRA files of the stack, in its order.
        progress: of each step.
    """
    entries = read_entries(spec.lora, headers)
    prepare_save(spec)
    loaded = load_model(select_load_settings(spec), progress, partial(check_given_files, spec, entries))
    warn_dequantized_baseline(spec, loaded)
    text_encoders = find_text_encoders(loaded.pipe.components)
    loras = LoraStack(loaded.denoiser, text_encoders, spec.lora.mode, strict=spec.lora.strict, seed=spec.seed)
    matches = loras.match_entries(entries)

    started = time.perf_counter()
    sources = find_layer_sources(spec, loaded, entries, matches)
    with progress.track_step("Loading float layers"):
        # nothing is missing where `load_model` has read the whole float model, as with int8 off
        loaded.fill_weights(except_for=[plan.name for plan in select_int8_plans(sources.plans)])
    load_seconds = loaded.seconds + time.perf_counter() - started

    loras.install(entries, matches, except_for=loaded.skeleton_encoders)
    float_text_encoder_bytes = sum(map(count_module_bytes, text_encoders.values()))
    encoders = install_text_encoders(spec, loaded, matches, progress)
    report_loras(spec.lora, loras)
    if spec.lora.is_baked:
        bake_loras(spec.lora.strengths, loaded, loras, matches)

    step = trace_step(spec, loaded, probe, progress)
    macs, traced = count_step(step.denoiser, step.calls)
    attentions = plan_attentions(loaded, traced, select_attention_settings(spec), step.calls)
    built = BuiltModel(
        pipe=loaded.pipe,
        component=loaded.component,
        family=loaded.family,
        denoisers=select_float_denoisers(spec, loaded.denoiser),
        float_bytes=loaded.float_bytes,
        num_params=sum(parameter.numel() for parameter in loaded.denoiser.parameters()),
        macs=macs,
        scheduler=loaded.scheduler,
        device=loaded.device,
        plans=[*sources.plans, *attentions.plans],
        loras=loras,
        encoders=encoders,
        text_encoders=select_text_encoders(spec, text_encoders, encoders),
        float_text_encoder_bytes=float_text_encoder_bytes,
        text_strengths=[0.0] * len(entries),  # `set_strengths` sets them
        num_dequantized_layers=loaded.num_dequantized_layers,
    )
    note_macs_shares(built.plans, built.macs)

    started = time.perf_counter()
    if spec.int8.enable:
        add_int8_denoiser(
            built, spec, loaded, sources=sources, step=step, attentions=attentions, progress=progress
        )
        if spec.int8.vae == INT8:
            built.vae = add_int8_vae(spec, loaded, progress)
    install_candidate(built, spec)
    built.seconds = {"load": load_seconds, "quantize": time.perf_counter() - started}
    compile_denoisers(built.denoisers, spec.compile, has_hooks=spec.offload != "none")
    return built


def check_given_files(
    spec: RunSpec, entries: Sequence[Entry], build_skeletons: Callable[[], Mapping[str, nn.Module]]
) -> None:
    """Refuse an `int8.checkpoint` or a LoRA that is for another model, before the weights are read.

    Args:
        spec: the settings of the run.
        entries: the LoRAs.
        build_skeletons: the denoisers without weights, by component.
    """
    if spec.int8.checkpoint is None and not entries:
        return
    skeletons = build_skeletons()
    if spec.int8.checkpoint is not None:
        check_checkpoint_fits(spec.int8.checkpoint, skeletons, spec.model)
    check_loras_fit(entries, skeletons)


def prepare_save(spec: RunSpec) -> None:
    """Check that `save=` can be written, before the work whose result it is for.

    Logs what the file will not hold: quantized text encoders, the INT8 VAE, LoRAs that are not baked in.
    """
    if spec.save is None:
        return
    if spec.clip.is_quantized:
        log.info("save= writes the denoiser; task=quantize task.component=text_encoder writes a text encoder")
    if spec.int8.vae == INT8:
        log.info(
            "save= writes the denoiser; the INT8 VAE is not in %s: a run makes it again with int8.vae=int8",
            spec.save,
        )
    if spec.lora.adapters and not spec.lora.is_baked:
        log.warning("%s will hold the model without its LoRAs; lora.mode=bake writes them into it", spec.save)
    prepare_output_path(spec.save)


def warn_dequantized_baseline(spec: RunSpec, loaded: LoadedModel) -> None:
    """Warn of a comparison with a float model that was read from the same quantized file."""
    if spec.metrics.baseline == "none" or not loaded.num_dequantized_layers:
        return
    log.warning(
        "The float model has the quantized numbers of %s in %s: PSNR to float %s",
        spec.model.location,
        count_noun(loaded.num_dequantized_layers, "layer"),
        SAME_FILE_LIMITS,
    )


def find_layer_sources(
    spec: RunSpec, loaded: LoadedModel, entries: Sequence[Entry], matches: Matches
) -> LayerSources:
    """Plan every layer, and find the INT8 layers that exist already.

    Args:
        spec: the settings of the run.
        loaded: the model.
        entries: the LoRAs, which are part of the cache's key where they are baked in.
        matches: the layers that they change.
    """
    plans = loaded.plan_layers(spec.int8.convolutions)
    if not spec.int8.enable:
        return LayerSources(plans, prequantized=None, cache_key=None)
    warn_without_convolutions(plans, spec.int8.convolutions)
    cache_key = None
    if spec.cache.limit_gb and spec.int8.checkpoint is None:
        cache_key = build_cache_key(loaded, select_origin(spec), entries, spec.cache)
    request = PrequantizedRequest(
        checkpoint=spec.int8.checkpoint,
        outlier=spec.outlier,
        baked_loras=list_baked_loras(spec.lora),
        cache=spec.cache,
        cache_key=cache_key,
        declared=DeclaredFormat(spec.model.quant_format, spec.model.sdnq),
    )
    prequantized = find_prequantized(loaded, plans, request, changed_layers=set(matches.denoiser))
    if prequantized is not None and spec.int8.attention == FLOAT:
        report_float_attention(prequantized)
    return LayerSources(plans, prequantized, cache_key)


def install_text_encoders(
    spec: RunSpec, loaded: LoadedModel, matches: Matches, progress: Progress
) -> QuantizedEncoders:
    """Build the quantized text encoders, and put them into the pipeline where it has no float ones."""
    encoders = build_encoders(loaded.encoders, spec.clip, loaded.device, loaded.sampling, matches, progress)
    if not spec.needs_float_encoders:
        loaded.pipe.register_modules(**encoders.modules)
    return encoders


def trace_step(spec: RunSpec, loaded: LoadedModel, probe: Sequence[Sample], progress: Progress) -> TracedStep:
    """Run one denoising step, for the shapes in it and for activations.

    Args:
        spec: the settings of the run.
        loaded: the model.
        probe: samples of one batch.
        progress: of the step.
    """
    with progress.track_step("Tracing one denoising step"):
        denoiser = replace_missing_layers(loaded.denoiser)
        set_denoiser(loaded.pipe, denoiser, loaded.component)
        set_offload(loaded.pipe, spec.offload, loaded.device)
        calls = capture_step(loaded.pipe, loaded.component, denoiser, probe, loaded.sampling)
    return TracedStep(denoiser, calls)


def select_float_denoisers(spec: RunSpec, denoiser: nn.Module) -> dict[str, nn.Module]:
    """The float denoiser as `float` where the run needs it, as `clip` where only encoders are quantized."""
    denoisers = {}
    if spec.needs_float_denoiser:
        denoisers["float"] = denoiser
    if spec.candidate == "clip":
        denoisers["clip"] = denoiser
    return denoisers


def select_text_encoders(
    spec: RunSpec, text_encoders: Mapping[str, nn.Module], quantized: QuantizedEncoders
) -> dict[str, dict[str, nn.Module]]:
    """The encoders that `clip=` quantizes, by who generates with them.

    The float ones under `float` where they are in memory, the quantized ones under the candidate.

    Args:
        spec: the settings of the run.
        text_encoders: the pipeline's, by component.
        quantized: those that `clip=` quantizes.
    """
    selected: dict[str, dict[str, nn.Module]] = {}
    if spec.needs_float_encoders:
        selected["float"] = {component: text_encoders[component] for component in quantized.modules}
    selected[spec.candidate] = quantized.modules
    return selected


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
        settings = replace(settings, attentions=attentions.layers)
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
        attach_loras(built, spec, traced.rows)


def add_int8_vae(spec: RunSpec, loaded: LoadedModel, progress: Progress) -> QuantizedVae:
    """Quantize the VAE.

    Args:
        spec: the settings of the run.
        loaded: the float model.
        progress: of the layers.
    """
    rows = count_latent_pixels(loaded.pipe, spec.sampling)
    return quantize_vae(loaded, select_quantization_settings(spec), rows, progress)


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


def attach_loras(built: BuiltModel, spec: RunSpec, rows: Mapping[str, int]) -> None:
    """Bring the LoRAs to the INT8 layers, each by the mode that it can have.

    Args:
        built: has the INT8 denoiser and the stack.
        spec: the settings of the run.
        rows: that each layer sees in one step, by name.
    """
    overhead: Overhead | None = None
    if spec.lora.mode == "auto" and not spec.lora.is_scheduled:
        costs = BranchCosts(spec.backend, built.device, getattr(torch, spec.model.dtype))
        overhead = partial(measure_overhead, costs, rows)
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
    for warning in loras.sizes.list_large_changes(loras.names, spec.lora.largest_strengths):
        log.warning("%s", warning)


def install_candidate(built: BuiltModel, spec: RunSpec) -> None:
    """Give the pipeline the denoiser and the text encoders that the run is about, and its offloading."""
    set_denoiser(built.pipe, built.denoisers[spec.candidate], built.component)
    set_text_encoders(built.pipe, spec.candidate, built.encoders.modules)
    set_components(built.pipe, built.components.get(spec.candidate, {}))
    set_offload(built.pipe, spec.offload, built.device)
