"""Build what a run needs: a pipeline, its float denoiser, the INT8 denoiser beside it, and LoRAs on both.

`tasks.run` calls `build_model`; `process_cache` keeps the last model for jobs with equal settings. This and
`add_int8`, the half of it that quantizes, are the last to see the whole RunSpec (`step_settings` makes of it
what the steps take): the functions that they call take the settings that they use.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.output_path import prepare_output_path
from int8run.config.run_spec import RunSpec
from int8run.export.weight_layers import check_saved_bits
from int8run.generate.capture import capture_step, record_calls
from int8run.generate.generate import set_components, set_text_encoders
from int8run.generate.prompts import Sample
from int8run.layers.plan import FLOAT, INT8, LayerPlan
from int8run.layers.plan_summary import select_int8_plans, warn_without_convolutions
from int8run.lora.entries import Entry
from int8run.lora.header_info import LoraHeader
from int8run.lora.match import Matches
from int8run.lora.stack import LoraStack
from int8run.metrics.layers import count_module_bytes, note_macs_shares
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.given_model import find_controlnets, find_text_encoders
from int8run.models.pipeline_class import CONTROLNET
from int8run.pipeline.add_int8 import (
    LayerSources,
    TracedStep,
    add_int8_controlnets,
    add_int8_denoiser,
    add_int8_vae,
)
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.compile import compile_denoisers, report_uncompiled
from int8run.pipeline.controlnets import list_float_controlnets
from int8run.pipeline.given_files import check_checkpoint_fits, check_loras_fit
from int8run.pipeline.load import load_model
from int8run.pipeline.loaded_model import LoadedModel, replace_missing_layers
from int8run.pipeline.lora_steps import bake_loras, read_entries, report_loras
from int8run.pipeline.offload import set_offload
from int8run.pipeline.prequantized import (
    PrequantizedRequest,
    find_prequantized,
    report_float_attention,
)
from int8run.pipeline.provenance import build_cache_key, list_baked_loras
from int8run.pipeline.quantize_attention import count_step, plan_attentions
from int8run.pipeline.step_cache_fit import check_modules
from int8run.pipeline.step_settings import (
    select_attention_settings,
    select_load_settings,
    select_origin,
)
from int8run.pipeline.store_layers import get_vae_folder
from int8run.pipeline.text_encoders import QuantizedEncoders, build_encoders
from int8run.report.columns import SAME_FILE_LIMITS
from int8run.report.console import Progress
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloatModel:
    """A model whose denoiser and VAE are float, with its LoRAs on it.

    Args:
        loaded: the pipeline, and where its weights come from.
        sources: what is decided for the layers of its denoiser.
        loras: on the denoiser and the text encoders.
        text_encoders: the float ones, by component.
        float_text_encoder_bytes: their size.
        encoders: those that `clip=` quantizes.
        load_seconds: time of loading, without that of the LoRAs and of quantizing.
    """

    loaded: LoadedModel
    sources: LayerSources
    loras: LoraStack
    text_encoders: Mapping[str, nn.Module]
    float_text_encoder_bytes: int
    encoders: QuantizedEncoders
    load_seconds: float


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
    model = load_float_model(spec, entries, progress)
    loaded = model.loaded
    step = trace_step(spec, loaded, probe, progress)
    macs, traced = count_step(step.denoiser, step.calls)
    attentions = plan_attentions(loaded, traced, select_attention_settings(spec), probe)
    built = begin_built_model(spec, model, macs=macs, attention_plans=attentions.plans)

    started = time.perf_counter()
    if spec.int8.enable:
        add_int8_denoiser(
            built, spec, loaded, sources=model.sources, step=step, attentions=attentions, progress=progress
        )
        built.controlnets = add_int8_controlnets(built, spec, loaded, step, progress)
        if spec.int8.vae == INT8:
            built.vae = add_int8_vae(spec, loaded, progress)
    else:
        built.controlnets = list_float_controlnets(loaded)
    install_candidate(built, spec)
    built.seconds = {"load": model.load_seconds, "quantize": time.perf_counter() - started}
    compile_denoisers(
        built.denoisers, spec.compile, has_hooks=spec.offload != "none", takes_hooks=spec.has_step_cache
    )
    report_uncompiled([controlnet.component for controlnet in built.controlnets], spec.compile)
    return built


def load_float_model(spec: RunSpec, entries: Sequence[Entry], progress: Progress) -> FloatModel:
    """Load a model, put the LoRAs on it, and build its quantized text encoders.

    Args:
        spec: the settings of the run.
        entries: the LoRAs.
        progress: of each step.
    """
    loaded = load_model(select_load_settings(spec), progress, partial(check_given_files, spec, entries))
    warn_dequantized_baseline(spec, loaded)
    warn_dequantized_steps(spec, loaded)
    report_vae_file(spec, loaded)
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
    return FloatModel(
        loaded=loaded,
        sources=sources,
        loras=loras,
        text_encoders=text_encoders,
        float_text_encoder_bytes=float_text_encoder_bytes,
        encoders=encoders,
        load_seconds=load_seconds,
    )


def begin_built_model(
    spec: RunSpec, model: FloatModel, *, macs: Mapping[str, int], attention_plans: Sequence[LayerPlan]
) -> BuiltModel:
    """What a run gets of the model as long as nothing of it is INT8.

    Args:
        spec: the settings of the run.
        model: that is loaded.
        macs: multiply-adds of one step, by layer.
        attention_plans: of the denoiser.
    """
    loaded = model.loaded
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
        plans=[*model.sources.plans, *attention_plans],
        loras=model.loras,
        encoders=model.encoders,
        text_encoders=select_text_encoders(spec, model.text_encoders, model.encoders),
        float_text_encoder_bytes=model.float_text_encoder_bytes,
        text_strengths=[0.0] * len(model.loras.entries),  # `set_strengths` sets them
        num_dequantized_layers=loaded.num_dequantized_layers,
    )
    note_macs_shares(built.plans, built.macs)
    return built


def check_given_files(
    spec: RunSpec, entries: Sequence[Entry], build_skeletons: Callable[[], Mapping[str, nn.Module]]
) -> None:
    """Refuse a checkpoint or a LoRA that is for another model, and a step cache, before weights are read.

    Args:
        spec: the settings of the run.
        entries: the LoRAs.
        build_skeletons: the denoisers without weights, by component.
    """
    if spec.int8.checkpoint is None and not entries and not spec.has_step_cache:
        return
    skeletons = build_skeletons()
    if spec.has_step_cache:
        check_modules(spec.cache_steps, skeletons)
    if spec.int8.checkpoint is not None:
        check_checkpoint_fits(spec.int8.checkpoint, skeletons, spec.model)
    check_loras_fit(entries, skeletons)


def prepare_save(spec: RunSpec) -> None:
    """Check that `save=` can be written, before the work whose result it is for.

    Logs what the file will not hold: quantized text encoders, the INT8 ControlNet, LoRAs that are not baked
    in.
    """
    if spec.save is None:
        return
    check_saved_bits(spec.int8.bits, spec.outlier.name)
    if spec.clip.is_quantized:
        log.info("save= writes the denoiser; task=quantize task.component=text_encoder writes a text encoder")
    if spec.int8.vae == INT8:
        prepare_output_path(get_vae_folder(spec.save))
    if CONTROLNET in spec.model.parts and spec.int8.controlnet == INT8:
        log.info(
            "save= writes the denoiser; the INT8 ControlNet is not in %s: a run makes it again", spec.save
        )
    if spec.int8.has_float_steps:
        log.info("save= writes the INT8 denoiser; int8.steps is not in %s: a run sets it again", spec.save)
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


def warn_dequantized_steps(spec: RunSpec, loaded: LoadedModel) -> None:
    """Warn of float steps whose numbers were read from a quantized file."""
    if spec.int8.has_float_steps and loaded.num_dequantized_layers:
        log.warning(
            "The float steps of int8.steps compute with the quantized numbers of %s in %s: they do not bring "
            "back what the file lost when it was made",
            spec.model.location,
            count_noun(loaded.num_dequantized_layers, "layer"),
        )


def report_vae_file(spec: RunSpec, loaded: LoadedModel) -> None:
    """Log what becomes of a VAE whose files hold quantized weights."""
    file = loaded.vae
    if file is None:
        return
    layers = count_noun(len(file.layers), "INT8 layer")
    if spec.int8.vae == FLOAT:
        log.info("%s is dequantized; int8.vae=int8 uses its %s as they are", file.location, layers)
    elif spec.metrics.baseline != "none":
        log.warning(
            "The float VAE has the quantized numbers of %s: vae/psnr_db does not see what its %s lost when "
            "they were made",
            file.location,
            layers,
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
        with record_calls(find_controlnets(loaded.pipe.components)) as controlnet_calls:
            calls = capture_step(loaded.pipe, loaded.component, denoiser, probe, loaded.sampling)
    last_calls = {component: recorded[-1:] for component, recorded in controlnet_calls.items()}
    return TracedStep(denoiser, calls, last_calls)


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


def install_candidate(built: BuiltModel, spec: RunSpec) -> None:
    """Give the pipeline the denoiser and the text encoders that the run is about, and its offloading."""
    set_denoiser(built.pipe, built.denoisers[spec.candidate], built.component)
    set_text_encoders(built.pipe, spec.candidate, built.encoders.modules)
    set_components(built.pipe, built.components.get(spec.candidate, {}))
    set_offload(built.pipe, spec.offload, built.device)
