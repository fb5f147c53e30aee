"""Load a model: whole and in float, or as a skeleton whose weights are read when they are quantized.

A skeleton is a module on the meta device: the right class and shapes, without weights. build.py and
task=bench call `load_model`. Files that are not for the model are refused before weights are read; sampler
settings and `attention` once the pipeline exists. Nothing is quantized here, and no LoRA is known here.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.errors import ConfigError
from int8run.generate.pipeline_call import find_unknown_arguments
from int8run.layers.int8_conv import is_convolution
from int8run.models.attention_calls import find_attention_obstacle
from int8run.models.block_rules import keep_boundary_blocks
from int8run.models.denoiser_classes import OWN_DENOISERS, get_denoiser_class
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.family import (
    AutoFamily,
    ModelFamily,
    ModelSource,
    load_families,
    read_model_options,
)
from int8run.models.loader import (
    REPLACED_PARTS,
    VAE,
    list_block_prefixes,
    load_parts,
    load_pipeline,
    pick_device,
    place_components,
)
from int8run.models.missing_library import check_needed_library
from int8run.models.modular_loader import load_modular_pipeline
from int8run.models.pipeline_class import is_modular
from int8run.models.resolve_weights import download_side_files
from int8run.models.sampling import Sampling
from int8run.models.schedulers import set_scheduler
from int8run.models.source import ResolvedModel, resolve_model
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.denoiser_variants import choose_denoiser_classes
from int8run.pipeline.load_settings import LoadSettings
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.model_files import check_float_components, has_quantized_weights
from int8run.pipeline.offload import check_offload, find_offload_device
from int8run.pipeline.text_encoders import OpenedEncoder, open_encoders
from int8run.pipeline.vae_file import open_vae_file
from int8run.ptq.quantize import check_backend
from int8run.report.console import Progress
from int8run.utils.paths import to_local_path
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
# is given a function that builds the skeletons of the denoisers, by component
CheckFiles = Callable[[Callable[[], Mapping[str, nn.Module]]], None]


def load_model(
    settings: LoadSettings, progress: Progress, check_files: CheckFiles = lambda skeletons: None
) -> LoadedModel:
    """Load the pipeline and recognize the family of its denoiser.

    Args:
        settings: what to load, and how.
        progress: of the loading.
        check_files: called before weights are read, with a function that builds the skeletons of the
            denoisers; raises where a given file is not for them.

    Raises:
        BackendError: for a device or a backend that cannot run here; nothing is loaded then.
        ConfigError: for a model of another family than its settings are made for, sampler settings that this
            model does not have, and an `attention` that does not fit it or this machine.
        FileError: when weights are missing, damaged or another model's.
    """
    device = pick_device(settings.device)
    check_device(settings, device)
    started = time.perf_counter()
    with progress.track_step("Loading the model"):
        source = find_source(settings)
        check_files(partial(build_skeletons, source, settings.dtype))
        skeletons, checkpoint = open_skeletons(source, settings)
        parts = {**source.list_parts_elsewhere(), **settings.model.parts}
        encoders = open_encoders(settings.clip, source.folder, parts, settings.dtype)
        place = find_offload_device(settings.offload, device)
        vae = open_vae_file(source.folder, parts, settings.dtype, place)
        given = dict(skeletons)
        if vae is not None:
            given[VAE] = vae.module
        pipe = load_float_parts(source, settings, given=given, encoders=encoders, device=device)

        denoisers = prepare_denoisers(pipe, source, settings.attention)
        check_sampling(pipe, settings.sampling, settings.model.sampling)
        original_scheduler = pipe.scheduler  # kept: a later job may go back to it
        set_scheduler(pipe, original_scheduler, settings.sampling)
        component, first_denoiser = next(iter(denoisers.items()))
        family = resolve_family(settings.model_type, first_denoiser, source.pipeline_class)
        warn_of_other_family(settings.model, settings.model_type, family)
        loaded = LoadedModel(
            pipe=pipe,
            component=component,
            denoiser=first_denoiser if len(denoisers) == 1 else DualDenoiser(denoisers),
            scheduler=original_scheduler,
            family=family,
            sampling=settings.sampling,
            device=device,
            source=source,
            checkpoint=checkpoint,
            encoders=encoders,
            vae=vae,
            offload=settings.offload,
        )
        if settings.needs_float_denoiser and checkpoint is not None:
            loaded.fill_weights()
    loaded.seconds = time.perf_counter() - started
    return loaded


def find_source(settings: LoadSettings) -> ResolvedModel:
    """Where the parts of a model are, and of which class its denoisers are; nothing is loaded yet.

    Raises:
        ConfigError: for a model of another family than its settings are made for, and a denoiser that needs
            a library which is not installed.
    """
    source = choose_denoiser_classes(resolve_model(settings.model))
    check_model_family(settings.model, source.denoisers[0].class_name, source.pipeline_class)
    for denoiser in source.denoisers:
        check_needed_library(get_denoiser_class(denoiser.class_name))
    return source


def open_skeletons(
    source: ResolvedModel, settings: LoadSettings
) -> tuple[dict[str, nn.Module], DenoiserWeights | None]:
    """The denoisers without weights, by component, and the files that have their weights.

    Returns:
        Nothing of either where the denoisers are loaded as a part of their pipeline.
    """
    if not needs_skeletons(source, settings):
        return {}, None
    skeletons = build_skeletons(source, settings.dtype)
    download_quantization_configs(source, settings.model)
    return skeletons, open_denoiser_weights(source, skeletons, settings.model)


def check_device(settings: LoadSettings, device: torch.device) -> None:
    """Check that backend, offloading and attention can run here, before anything is loaded.

    Raises:
        BackendError: when they cannot.
        ConfigError: for an attention that diffusers does not have here.
    """
    if settings.backend is not None:
        check_backend(settings.backend, device, ())
    check_offload(settings.offload, device)
    obstacle = find_attention_obstacle(settings.attention)
    if obstacle is not None:
        raise ConfigError(f"attention={settings.attention} cannot be used here: {obstacle}")


def open_denoiser_weights(
    source: ResolvedModel, skeletons: Mapping[str, nn.Module], model: ModelSource
) -> DenoiserWeights:
    """Open the weights of every denoiser, by the prefix that its layers have beside those of another.

    Args:
        source: where they are.
        skeletons: of the denoisers, by component.
        model: what decides where the files leave open how their layers are stored.
    """
    declared = DeclaredFormat(model.quant_format, model.sdnq)
    files = {}
    for denoiser in source.denoisers:
        skeleton = skeletons[denoiser.component]
        files[denoiser.component] = FileWeights(denoiser.weights, skeleton, declared=declared)
    if len(files) == 1:
        return DenoiserWeights({"": next(iter(files.values()))})
    return DenoiserWeights({f"{component}.": file for component, file in files.items()})


def needs_skeletons(source: ResolvedModel, settings: LoadSettings) -> bool:
    """Whether int8run reads the weights of the denoisers itself, into skeletons, and not diffusers."""
    if source.has_single_files or not settings.needs_float_denoiser:
        return True
    if any(denoiser.class_name in OWN_DENOISERS for denoiser in source.denoisers):
        return True
    declared = DeclaredFormat(settings.model.quant_format, settings.model.sdnq)
    if not declared.is_empty:
        return True
    # diffusers would take quantized weights for floats
    return any(has_quantized_weights(denoiser.weights) for denoiser in source.denoisers)


def build_skeletons(source: ResolvedModel, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The skeletons of the denoisers, by component."""
    return {denoiser.component: denoiser.build_skeleton(dtype) for denoiser in source.denoisers}


def download_quantization_configs(source: ResolvedModel, model: ModelSource) -> None:
    """Download what may say how quantized files on the hub were made, where nothing is beside them yet."""
    if not source.has_single_files:
        return
    for denoiser in source.denoisers:
        if not has_quantized_weights(denoiser.weights):
            continue
        location = model.location
        if isinstance(location, Mapping):
            location = location[denoiser.component]
        download_side_files(str(location), model.revision)


def load_float_parts(
    source: ResolvedModel,
    settings: LoadSettings,
    *,
    given: Mapping[str, nn.Module],
    encoders: Mapping[str, OpenedEncoder],
    device: torch.device,
) -> DiffusionPipeline:
    """Load the pipeline with everything in float that is not there already.

    Args:
        source: where its parts are.
        settings: how it is loaded.
        given: components whose weights are not read here: skeletons of denoisers, a VAE that was quantized.
        encoders: text encoders that are quantized later.
        device: of the model; with offloading, parts wait in memory until they are moved there.
    """
    given_modules = dict(given)
    parts = {name: part for name, part in settings.model.parts.items() if name not in given}
    if not settings.needs_float_encoders:
        for name, opened in encoders.items():
            given_modules[name] = opened.skeleton
            parts.pop(name, None)
    replaced = [name for name in REPLACED_PARTS if name in parts]
    check_float_components(source.folder, without=[*given_modules, *replaced])
    loaded_parts = load_parts(source.folder, parts, settings.dtype)
    place = find_offload_device(settings.offload, device)
    if is_modular(source.pipeline_class):
        pipe = load_modular_pipeline(source, {**loaded_parts, **given_modules}, settings.dtype)
        place_components(pipe, place, without=given_modules)
        return pipe
    return load_pipeline(
        source.folder, given_modules, settings.dtype, place, loaded_parts, source.pipeline_class
    )


def prepare_denoisers(pipe: DiffusionPipeline, source: ResolvedModel, attention: str) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component, ready for inference, with the attention of the settings."""
    denoisers = {}
    for denoiser in source.denoisers:
        module = getattr(pipe, denoiser.component)
        module.eval()
        module.requires_grad_(requires_grad=False)
        set_attention(module, attention)
        denoisers[denoiser.component] = module
    return denoisers


def resolve_family(
    model_type: ModelFamily | AutoFamily, denoiser: nn.Module, pipeline: str | None = None
) -> ModelFamily:
    """The family of a denoiser, with rules for its `keep_blocks`; see `AutoFamily.resolve_family`."""
    linears = {name: m.in_features for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    convolutions = [name for name, module in denoiser.named_modules() if is_convolution(module)]
    blocks = list_block_prefixes(denoiser)
    family = model_type.resolve_family(type(denoiser).__name__, blocks, linears, pipeline, convolutions)
    return keep_boundary_blocks(family, blocks, [*linears, *convolutions])


def check_model_family(model: ModelSource, denoiser: str, pipeline: str | None = None) -> None:
    """Refuse a denoiser of another architecture than a model's settings are made for, before it is read.

    Args:
        model: the settings.
        denoiser: its class in diffusers.
        pipeline: the class of its pipeline; None: not known.

    Raises:
        ConfigError: naming what the location holds, and the models of that family.
    """
    families = load_families()
    if model.family is None or model.family not in families:
        return
    if families[model.family].has_member(denoiser, pipeline):
        return
    found = [name for name, family in families.items() if family.has_member(denoiser, pipeline)]
    choice = "write a model of your own"
    options = list_model_options(model.location, found)
    if options:
        choice = f"choose model={' or '.join(options)}"
    raise ConfigError(
        f"model.location={model.location} holds a {denoiser} ({' or '.join(found) or 'no known family'}), "
        f"and the steps, guidance and size of this model are made for {model.family}; {choice}, or set "
        "model.family=null to use it anyway"
    )


def list_model_options(location: object, families: Collection[str]) -> list[str]:
    """The options of `model=` for a location: the one that has it, else all that are made for its family.

    Args:
        location: that was given.
        families: names of those that its denoiser may be of.
    """
    options = read_model_options()
    folder = Path(os.path.realpath(to_local_path(str(location))))
    for name, option in options.items():
        if folder.exists() and Path(os.path.realpath(to_local_path(option.location))) == folder:
            return [name]
    return [name for name, option in options.items() if option.family in families]


def warn_of_other_family(
    model: ModelSource, model_type: ModelFamily | AutoFamily, family: ModelFamily
) -> None:
    """Warn where only the widths of the layers show another family: denoisers of one class may differ so."""
    is_chosen_by_name = isinstance(model_type, ModelFamily)
    if model.family in (None, family.name) or is_chosen_by_name:
        return
    log.warning(
        "The denoiser is of the family %s, and the steps, guidance and size are those of a model of %s; set "
        "them with sampler.*, or choose another model",
        family.name,
        model.family,
    )


def set_attention(denoiser: Any, name: str) -> None:
    """Set diffusers' attention backend.

    Raises:
        ConfigError: when this denoiser or this machine cannot use it.
    """
    if name == "native":
        return
    try:
        denoiser.set_attention_backend(name)
    except (AttributeError, ValueError, ImportError, RuntimeError) as error:
        reason = shorten_error(error)
        raise ConfigError(
            f"attention={name} cannot be used with {type(denoiser).__name__}: {reason}"
        ) from error


def check_sampling(pipe: DiffusionPipeline, sampling: Sampling, default: Sampling) -> None:
    """Raise ConfigError for sampler settings that the pipeline does not take.

    Args:
        pipe: the pipeline.
        sampling: with all defaults.
        default: the checkpoint's own settings, which may be for another pipeline.
    """
    unknown = []
    for name in find_unknown_arguments(pipe, sampling):
        is_default = name in default.extra and default.extra[name] == sampling.extra[name]
        if not is_default:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"sampler.extra.{unknown[0]} is not an argument of {type(pipe).__name__}; see the pipeline's "
            "documentation"
        )
