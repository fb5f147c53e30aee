"""Finds the parts of a model: a diffusers folder, or a folder with single files for the denoisers.

What a hub id names is downloaded, without pickled files. No weight is read here; the loader and the streaming
of checkpoints do that.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.models.denoiser_classes import find_denoiser_class, get_denoiser_class
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.family import ModelSource
from int8run.models.model_folders import (
    check_formats,
    make_base_error,
    make_load_error,
    names_weights,
    read_model_index,
    read_source_index,
    resolve_pipeline_folder,
    resolve_weight_file,
)
from int8run.models.modular_blocks import list_used_components
from int8run.models.modular_source import resolve_components_elsewhere
from int8run.models.pipeline_class import CONTROLNET, check_pipeline_fits, choose_pipeline_class
from int8run.models.pipeline_index import MODEL_INDEX_NAME, read_json
from int8run.models.repository_pipelines import find_named_pipeline
from int8run.models.resolve_weights import (
    CONFIG_NAME,
    list_denoisers,
    read_denoiser_config,
)
from int8run.utils.text import shorten_error


@dataclass(frozen=True)
class ResolvedDenoiser:
    """One denoiser of a pipeline.

    Args:
        component: its name in the pipeline.
        class_name: of diffusers, or our own.
        config: of the class.
        weights: a `.safetensors` file, or a folder of them.
    """

    component: str
    class_name: str
    config: Mapping[str, Any]
    weights: Path

    def build_skeleton(self, dtype: torch.dtype) -> nn.Module:
        """Return the module with parameters that have shapes and no values (meta tensors).

        Buffers that no checkpoint holds have their values.

        Args:
            dtype: of the parameters, but those that diffusers keeps in float32.

        Raises:
            FileError: when the class does not take the config.
        """
        cls = get_denoiser_class(self.class_name)
        return build_empty_model(cls, self.config, self.component, dtype)


def build_empty_model(cls: Any, config: Mapping[str, Any], component: str, dtype: torch.dtype) -> nn.Module:
    """Return a module of diffusers whose parameters have shapes and no values (meta tensors).

    Args:
        cls: its class.
        config: of it.
        component: its name in the pipeline, for messages.
        dtype: of the parameters, but those that diffusers keeps in float32.

    Raises:
        FileError: when the class does not take the config.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = cls.from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        reason = shorten_error(error)
        raise FileError(
            f"the config of {component} does not fit {cls.__name__}: {reason}; take the one of its checkpoint"
        ) from error
    # diffusers' loader does the same
    in_float32 = getattr(cls, "_keep_in_fp32_modules", None) or ()
    in_float32 = {in_float32} if isinstance(in_float32, str) else set(in_float32)
    for name, parameter in model.named_parameters():
        if not in_float32 & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    skeleton: nn.Module = model.eval()
    return skeleton.requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's parts are.

    Args:
        folder: diffusers folder; of denoisers whose weights are elsewhere it has only the config.
        denoisers: in the order in which the pipeline uses them.
        has_single_files: whether the denoisers' weights are files of their own, outside the folder.
        pipeline_class: name of the class that runs it, of diffusers.
        elsewhere: folders of components that a modular pipeline's index finds in other places.
        workflow, skip_blocks: which of a modular pipeline's blocks are run; see `ModelSource`.
    """

    folder: Path
    denoisers: tuple[ResolvedDenoiser, ...]
    has_single_files: bool
    pipeline_class: str = "DiffusionPipeline"
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    workflow: str | None = None
    skip_blocks: tuple[str, ...] = ()

    def list_parts_elsewhere(self) -> dict[str, tuple[str, str]]:
        """The class and the folder of each component that lies elsewhere, as `model.parts` has them."""
        index = read_model_index(self.folder, str(self.folder)) if self.elsewhere else {}
        return {name: (str(index[name][1]), str(place)) for name, place in self.elsewhere.items()}


def resolve_model(source: ModelSource) -> ResolvedModel:
    """Find every part of a model, downloading what is named by its id on the hub. No weight is read.

    Raises:
        ConfigError: for a single file without `model.base`, or a format that is not read.
        FileError: when something is missing or cannot be downloaded.
    """
    location = source.location
    if isinstance(location, Mapping):
        files = {str(component): str(file) for component, file in location.items()}
        return resolve_single_files(source, files)
    if names_weights(str(location)):
        return resolve_single_files(source, str(location))
    return resolve_pipeline(source)


def resolve_pipeline(source: ModelSource) -> ResolvedModel:
    """Find a model whose location is a diffusers folder, or the hub id of one."""
    location = str(source.location)
    folder = resolve_pipeline_folder(location, source.revision)
    index = read_model_index(folder, location)
    pipeline_class = choose_source_pipeline(source, index)
    used = list_used_components(pipeline_class, source.workflow, source.skip_blocks)
    elsewhere = resolve_components_elsewhere(folder, used - set(source.parts))
    denoisers = []
    for component in select_denoisers(index, str(folder), used):
        place = elsewhere.get(component, folder / component)
        denoisers.append(read_denoiser(place, component, index, place))
    return ResolvedModel(
        folder,
        tuple(denoisers),
        has_single_files=False,
        pipeline_class=pipeline_class,
        elsewhere=elsewhere,
        workflow=source.workflow,
        skip_blocks=tuple(source.skip_blocks),
    )


def select_denoisers(index: Mapping[str, Any], location: str, used: Collection[str]) -> list[str]:
    """Return a pipeline's denoisers; of a modular one those that its blocks use.

    Args:
        index: of the pipeline.
        location: of the pipeline, for messages.
        used: components of its blocks; none of a pipeline without blocks.
    """
    denoisers = list_denoisers(index, location)
    if not used:
        return denoisers
    return [component for component in denoisers if component in used]


def resolve_single_files(source: ModelSource, files: str | Mapping[str, str]) -> ResolvedModel:
    """Find a model whose denoisers are files of their own, and everything else is in `model.base`.

    Args:
        source: the model.
        files: the file of the only denoiser, or one for each component.
    """
    check_formats(files)
    if source.base is None:
        raise make_base_error(source)
    folder = resolve_pipeline_folder(source.base, None, without=DENOISER_COMPONENTS, setting="model.base")
    index = read_model_index(folder, source.base)
    pipeline_class = choose_source_pipeline(source, index)
    used = list_used_components(pipeline_class, source.workflow, source.skip_blocks)
    components = select_denoisers(index, str(folder), used)
    by_component = {components[0]: files} if isinstance(files, str) else files
    check_components(by_component, components, source.base)
    denoisers = []
    for component in components:
        weights = resolve_weight_file(by_component[component], source.revision)
        # a folder with a config of its own may be another size than the base's
        has_config = weights.is_dir() and read_denoiser_config(weights) is not None
        config_folder = weights if has_config else folder / component
        denoisers.append(read_denoiser(config_folder, component, index, weights))
    return ResolvedModel(
        folder,
        tuple(denoisers),
        has_single_files=True,
        pipeline_class=pipeline_class,
        elsewhere=resolve_components_elsewhere(folder, used - set(components) - set(source.parts)),
        workflow=source.workflow,
        skip_blocks=tuple(source.skip_blocks),
    )


def find_pipeline_class(source: ModelSource) -> str:
    """The class that runs a model, before any of its weights is downloaded.

    Raises:
        ConfigError: when it is none of diffusers, or is made of other components than the repository has.
        FileError: when the repository is not there.
    """
    check_known_pipeline(source)
    try:
        index = read_source_index(source)
    except FileError as error:
        if source.mode is None:
            raise
        missing = f"whether it has model.mode={source.mode} stands in its {MODEL_INDEX_NAME}"
        raise FileError(f"{error}; {missing}") from error
    return choose_source_pipeline(source, index)


def check_known_pipeline(source: ModelSource) -> None:
    """Check the class and the mode of a model whose pipeline is known; the hub is not asked.

    Raises:
        ConfigError: for a class that diffusers does not have, and for a mode that this class has not.
    """
    find_known_class(source)


def find_known_class(source: ModelSource) -> str | None:
    """The class that runs a model, as far as it is known without asking the hub; None: it is not.

    Raises:
        ConfigError: for a class that diffusers does not have, and for a mode that this class has not.
    """
    named = find_named_pipeline(source)
    if named is None and source.pipeline is None:
        return None
    return choose_class(source, named)


def choose_class(source: ModelSource, named: object) -> str:
    """The class that runs a model, whether its repository has the components for it or not.

    Args:
        source: the model.
        named: the class that its repository names; None: not known.
    """
    controlnet = source.parts.get(CONTROLNET)
    return choose_pipeline_class(
        named,
        pipeline=source.pipeline,
        mode=source.mode,
        controlnet=None if controlnet is None else str(controlnet[0]),
    )


def choose_source_pipeline(source: ModelSource, index: Mapping[str, Any]) -> str:
    """The class that runs a model, of which the repository's index is known.

    Args:
        source: the model.
        index: the `model_index.json` of its repository.

    Raises:
        ConfigError: as `find_pipeline_class`.
    """
    parts = {name: str(part[0]) for name, part in source.parts.items()}
    chosen = choose_class(source, index.get("_class_name"))
    setting = f"model.location={source.location}"
    if source.mode is not None:
        setting = f"model.mode={source.mode}"
    elif source.pipeline is not None:
        setting = f"model.pipeline={source.pipeline}"
    if chosen != index.get("_class_name") or CONTROLNET in parts:
        check_pipeline_fits(chosen, index, parts, setting, checked=(*DENOISER_COMPONENTS, CONTROLNET))
    return chosen


def check_components(files: Mapping[str, str], components: list[str], base: str) -> None:
    """Check that there is one file for each denoiser of a pipeline.

    Args:
        files: by component.
        components: the pipeline's denoisers.
        base: the pipeline's location, for messages.

    Raises:
        ConfigError: when one is missing, or is for a component that the pipeline does not have.
    """
    for name in files:
        if name not in components:
            raise ConfigError(
                f"model.location names {name}; {suggest_similar(name, components)}"
                f"{base} has {', '.join(components)}"
            )
    if len(files) < len(components):
        pairs = ", ".join(f"{name}: <file>" for name in components)
        raise ConfigError(
            f"{base} has {len(components)} denoisers ({', '.join(components)}); "
            f"set 'model.location={{{pairs}}}'"
        )


def find_components(index: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """The components of a pipeline: the library and the class of each, by name.

    Both are None for a component that was left out.

    Args:
        index: the pipeline's `model_index.json`, whose settings may be lists, too.
    """
    components = {}
    for name, entry in index.items():
        is_pair = isinstance(entry, list) and len(entry) == 2
        if is_pair and not name.startswith("_") and all(isinstance(part, str | None) for part in entry):
            components[name] = (entry[0], entry[1])
    return components


def read_denoiser(folder: Path, component: str, index: Mapping[str, Any], weights: Path) -> ResolvedDenoiser:
    """Return what a diffusers folder says about one denoiser.

    Args:
        folder: with its config.
        component: the denoiser's name in the pipeline.
        index: the pipeline's `model_index.json`.
        weights: the file or folder of the denoiser's weights.

    Raises:
        FileError: for a class that diffusers does not have.
    """
    entry = index[component]
    library, class_name = entry if len(entry) == 2 else (None, entry)
    if find_denoiser_class(library, str(class_name)) is None:
        unknown = f"{library}.{class_name} is not in diffusers {diffusers.__version__}"
        reason = FileError(f"the {component} is of a class that is not here: {unknown}")
        raise make_load_error(str(folder.parent), reason)
    return ResolvedDenoiser(
        component=component,
        class_name=str(class_name),
        config=read_config(folder),
        weights=weights,
    )


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return the `config.json` of a component.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        return read_json(folder / CONFIG_NAME)
    except FileError as error:
        raise make_load_error(str(folder.parent), error) from error
