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
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.models.denoiser_classes import find_denoiser_class, get_denoiser_class
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.family import ModelSource
from int8run.models.hub import check_repository, make_download_error
from int8run.models.modular_pipeline import list_used_components
from int8run.models.modular_source import download_modular, resolve_components_elsewhere
from int8run.models.pipeline_class import CONTROLNET, check_pipeline_fits, choose_pipeline_class
from int8run.models.pipeline_index import (
    MODEL_INDEX_NAME,
    has_pipeline_index,
    is_modular_folder,
    read_json,
    read_pipeline_index,
)
from int8run.models.resolve_weights import (
    CONFIG_NAME,
    UNSUPPORTED_FORMATS,
    check_format,
    download_index,
    is_local,
    list_denoisers,
)
from int8run.utils.paths import SAFETENSORS, to_local_path
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
        from accelerate import init_empty_weights

        cls = get_denoiser_class(self.class_name)
        try:
            with init_empty_weights(include_buffers=False):
                model = cls.from_config(dict(self.config))
        except (TypeError, ValueError, KeyError) as error:
            reason = shorten_error(error)
            raise FileError(
                f"the config of {self.component} does not fit {self.class_name}: {reason}; "
                "take the one of its checkpoint"
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
        denoisers.append(read_denoiser(folder / component, component, index, weights))
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
    return choose_source_pipeline(source, read_source_index(source))


def check_known_pipeline(source: ModelSource) -> None:
    """Check the class and the mode of a model whose settings name its pipeline; the repository is not asked.

    Raises:
        ConfigError: for a class that diffusers does not have, and for a mode that this class has not.
    """
    if source.pipeline is not None:
        choose_class(source, named=None)


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


def read_source_index(source: ModelSource) -> Mapping[str, Any]:
    """The index of a model's repository; of one on the hub it alone is downloaded.

    Raises:
        ConfigError: for a denoiser alone without `model.base`.
        FileError: when the repository is not there.
    """
    location, setting = str(source.location), "model.location"
    if isinstance(source.location, Mapping) or names_weights(location):
        check_formats(source.location)
        if source.base is None:
            raise make_base_error(source)
        location, setting = source.base, "model.base"
    path = to_local_path(location)
    if is_local(location) or path.is_dir():
        check_pipeline_folder(path, setting)
        return read_model_index(path, location)
    revision = source.revision if setting == "model.location" else None
    check_repository(location, setting, revision)
    try:
        folder = download_index(location, revision)
    except (OSError, ValueError) as error:
        raise make_download_error(location, setting, error) from error
    return read_model_index(folder, location)


def check_pipeline_folder(path: Path, setting: str) -> None:
    """Raise FileError for a path that is no folder of a pipeline.

    Args:
        path: of the folder.
        setting: that names it.
    """
    if not has_pipeline_index(path):
        raise FileError(
            f"{path.absolute()} is not a diffusers folder: it has no {MODEL_INDEX_NAME}; set {setting} to a "
            f"folder that has one, to an id on the hub, or model.location to a {SAFETENSORS} file"
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


def make_base_error(source: ModelSource) -> ConfigError:
    """Return the error for a model whose location holds a denoiser alone, without `model.base`."""
    return ConfigError(
        f"model.location={source.location} holds a denoiser alone; set model.base=<hub id or diffusers "
        "folder> that the text encoders, the VAE, the scheduler and the denoiser's config come from"
    )


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


def check_formats(location: str | Mapping[str, str] | None) -> None:
    """Raise ConfigError where the file of a denoiser is in a format that is not read."""
    files = location.values() if isinstance(location, Mapping) else [location]
    for file in files:
        check_format(str(file))


def names_weights(location: str) -> bool:
    """Return whether a location names the weights of a denoiser alone.

    These are a file, here or on the hub, or a folder of files.
    """
    path = to_local_path(location)
    has_known_suffix = Path(location).suffix.lower() in (SAFETENSORS, *UNSUPPORTED_FORMATS)
    return has_known_suffix or path.is_file() or is_denoiser_folder(path)


def is_denoiser_folder(path: Path) -> bool:
    """Return whether a folder holds weights and no pipeline."""
    return path.is_dir() and not has_pipeline_index(path) and any(path.glob(f"*{SAFETENSORS}"))


def resolve_pipeline_folder(
    location: str, revision: str | None, without: tuple[str, ...] = (), setting: str = "model.location"
) -> Path:
    """Return the diffusers folder that a path or a hub id names; what is on the hub is downloaded.

    Args:
        location: a path or a hub id.
        revision: on the hub.
        without: components whose weights are not needed; their configs are.
        setting: what the location was given as, for messages.

    Raises:
        FileError: when it is not there or cannot be downloaded.
    """
    path = to_local_path(location)
    if is_local(location) or path.is_dir():
        check_pipeline_folder(path, setting)
        return path
    check_repository(location, setting, revision)
    left_out = dict.fromkeys(without)
    try:
        index_folder = download_index(location, revision)
        if is_modular_folder(index_folder):
            return download_modular(location, revision, read_model_index(index_folder, location), without)
        # use_safetensors: nothing pickled is downloaded
        downloaded = DiffusionPipeline.download(location, revision=revision, use_safetensors=True, **left_out)
        folder = Path(downloaded)
        if without:
            index = read_model_index(folder, location)
            for component in list_denoisers(index, str(folder)):
                hf_hub_download(location, CONFIG_NAME, subfolder=component, revision=revision)
    # diffusers reads a damaged index as it comes: each fault raises its own type
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_download_error(location, setting, error) from error
    return folder


def resolve_weight_file(location: str, revision: str | None) -> Path:
    """Return the file or folder of a denoiser's weights; `org/repo/file.safetensors` is downloaded.

    Raises:
        FileError: when it is not there, or cannot be downloaded.
    """
    path = to_local_path(location)
    if path.exists():
        return path
    path_on_hub = location.split("/")
    if is_local(location) or len(path_on_hub) < 3:
        raise FileError(
            f"{path.absolute()}: no such file; on the hub a file is org/repository/name{SAFETENSORS}"
        )
    repository, file = "/".join(path_on_hub[:2]), "/".join(path_on_hub[2:])
    check_repository(repository, "model.location", revision)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error


def resolve_part_folder(name: str, location: str) -> Path:
    """Return the folder of a component outside the pipeline's; nothing pickled is downloaded.

    Args:
        name: of the component.
        location: a path or a hub id.

    Raises:
        FileError: when it cannot be downloaded.
    """
    path = to_local_path(location)
    if path.is_dir():
        return path
    check_repository(location, f"model.parts.{name}")
    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", f"*{SAFETENSORS}"]))
    except (OSError, ValueError) as error:
        raise make_download_error(location, f"model.parts.{name}", error) from error


def make_load_error(location: str, error: Exception) -> FileError:
    """Return the error for a model that diffusers could not read."""
    reason = shorten_error(error)
    # the text of these is a key or an argument, which alone says little
    if isinstance(error, KeyError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return FileError(
        f"model {location!r} could not be loaded: {reason}; set model.location to a folder that has it"
    )


def read_model_index(folder: Path, location: str) -> Mapping[str, Any]:
    """Return the index of a pipeline's folder, modular or not.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        return read_pipeline_index(folder)
    except FileError as error:
        raise make_load_error(location, error) from error


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
