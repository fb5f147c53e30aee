"""Where the parts of a model lie: a diffusers folder, or a folder with single files for the denoisers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.models.family import ModelSource
from int8run.models.resolve_weights import (
    CONFIG_NAME,
    DENOISER_COMPONENTS,
    MODEL_INDEX_NAME,
    SAFETENSORS,
    UNSUPPORTED_FORMATS,
    check_format,
    list_denoisers,
    read_json,
    to_local_path,
)

ONLY = ""  # whose weights a single file has, before that is known


@dataclass(frozen=True)
class ResolvedDenoiser:
    """One denoiser of a pipeline.

    Args:
        component: its name in the pipeline.
        class_name: of diffusers.
        config: of the class.
        weights: a `.safetensors` file, or a folder of them.
    """

    component: str
    class_name: str
    config: Mapping[str, Any]
    weights: Path

    def build_skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The module with parameters that have shapes and no values; buffers that no checkpoint holds are there.

        Raises:
            FileError: when the class does not take the config.
        """
        from accelerate import init_empty_weights

        cls = getattr(diffusers, self.class_name)
        try:
            with init_empty_weights(include_buffers=False):
                model = cls.from_config(dict(self.config))
        except (TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FileError(
                f"the config of {self.component} does not fit {self.class_name}: {reason}; take the one of its checkpoint"
            ) from error
        keep = getattr(cls, "_keep_in_fp32_modules", None) or ()  # diffusers' loader does the same
        words = {keep} if isinstance(keep, str) else set(keep)
        for name, parameter in model.named_parameters():
            if not words & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class ResolvedModel:
    """A model's parts.

    Args:
        folder: diffusers folder; of what `denoisers` lie elsewhere it has only the config.
        denoisers: in the order in which a pipeline uses them.
        single: whether the denoisers' weights are files of their own.
    """

    folder: Path
    denoisers: tuple[ResolvedDenoiser, ...]
    has_single_files: bool


def resolve_model(source: ModelSource) -> ResolvedModel:
    """Find every part, fetching from the hub what is named by its id there. No weight is read.

    Raises:
        ConfigError: for a single file without `model.base`, or a format that is not read.
        FileError: when something is missing or cannot be had.
    """
    location = source.location
    files = (
        {str(name): str(file) for name, file in location.items()}
        if isinstance(location, Mapping)
        else {ONLY: str(location)}
    )
    if (
        not isinstance(location, Mapping)
        and not names_file(str(location))
        and not is_denoiser_folder(to_local_path(str(location)))
    ):
        folder = resolve_pipeline_folder(str(location), source.revision)
        index = read_model_index(folder, str(location))
        names = list_denoisers(index, str(folder))
        return ResolvedModel(
            folder, tuple(read_denoiser(folder, name, index, folder / name) for name in names), False
        )
    for name in files.values():
        check_format(name)
    if source.base is None:
        raise ConfigError(
            f"model.location={location} holds a denoiser alone; set model.base=<hub id or diffusers folder> that the text encoders, "
            "the VAE, the scheduler and the denoiser's config come from"
        )
    folder = resolve_pipeline_folder(source.base, None, without=DENOISER_COMPONENTS, setting="model.base")
    index = read_model_index(folder, source.base)
    names = list_denoisers(index, str(folder))
    if ONLY in files:
        files = {names[0]: files[ONLY]}
    unknown = [name for name in files if name not in names]
    if unknown:
        raise ConfigError(
            f"model.location names {unknown[0]}; {suggest_similar(unknown[0], names)}{source.base} has {', '.join(names)}"
        )
    missing = [name for name in names if name not in files]
    if missing:
        pair = ", ".join(f"{name}: <file>" for name in names)
        raise ConfigError(
            f"{source.base} has {len(names)} denoisers ({', '.join(names)}); set 'model.location={{{pair}}}'"
        )
    found = [
        read_denoiser(folder, name, index, resolve_weight_file(files[name], source.revision))
        for name in names
    ]
    return ResolvedModel(folder, tuple(found), True)


def names_file(location: str) -> bool:
    """Whether a location names a file, here or on the hub."""
    return (
        Path(location).suffix.lower() in (SAFETENSORS, *UNSUPPORTED_FORMATS)
        or to_local_path(location).is_file()
    )


def is_denoiser_folder(path: Path) -> bool:
    """Whether a folder holds weights and no pipeline."""
    return path.is_dir() and not (path / MODEL_INDEX_NAME).is_file() and any(path.glob(f"*{SAFETENSORS}"))


def resolve_pipeline_folder(
    location: str, revision: str | None, without: tuple[str, ...] = (), setting: str = "model.location"
) -> Path:
    """The diffusers folder behind a path or a hub id, which is fetched.

    Args:
        without: components whose weights are not wanted.
        setting: what it was given as.

    Raises:
        FileError: when it is not there or cannot be fetched.
    """
    path = to_local_path(location)
    if location.startswith(("shipped:", ".", "/", "~")) or path.is_dir():
        if not (path / MODEL_INDEX_NAME).is_file():
            raise FileError(f"{path.absolute()} is not a diffusers folder: it has no {MODEL_INDEX_NAME}")
        return path
    try:
        folder = Path(
            DiffusionPipeline.download(
                location, revision=revision, use_safetensors=True, **dict.fromkeys(without)
            )  # nothing pickled
        )
        index = read_model_index(folder, location)
        for name in list_denoisers(index, str(folder)) if without else ():
            hf_hub_download(location, CONFIG_NAME, subfolder=name, revision=revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_download_error(location, setting, error) from error
    return folder


def resolve_weight_file(location: str, revision: str | None) -> Path:
    """The file or folder of a denoiser's weights; `org/repo/file.safetensors` is fetched from the hub.

    Raises:
        FileError: when it is not there.
    """
    path = to_local_path(location)
    if path.exists():
        return path
    parts = location.split("/")
    if location.startswith((".", "/", "~")) or len(parts) < 3:
        raise FileError(
            f"{path.absolute()}: no such file; on the hub a file is org/repository/name{SAFETENSORS}"
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision))
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error


def resolve_part_folder(name: str, location: str) -> Path:
    """The folder of one component that lies elsewhere; what a hub id names is fetched, without what is pickled.

    Raises:
        FileError: when it cannot be had.
    """
    path = to_local_path(location)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", f"*{SAFETENSORS}"]))
    except (OSError, ValueError) as error:
        raise make_download_error(location, f"model.parts.{name}", error) from error


def make_download_error(location: str, setting: str, error: Exception) -> FileError:
    """The error for what neither this machine nor the hub gave."""
    reason = " ".join(str(error).split()).split(". ")[0][:160]
    return FileError(
        f"{setting}={location} is not on this machine and could not be fetched ({type(error).__name__}: {reason}); set {setting} to a "
        "folder that you have, or log in where the model is gated: hf auth login"
    )


def make_load_error(location: str, error: Exception) -> FileError:
    """The error for a model that diffusers could not read."""
    reason = (
        f"{type(error).__name__}: " * isinstance(error, KeyError | TypeError)
        + " ".join(str(error).split())[:300]
    )
    return FileError(
        f"model {location!r} could not be loaded: {reason}; set model.location to a folder that has it"
    )


def read_model_index(folder: Path, location: str) -> Mapping[str, Any]:
    """What a pipeline is made of.

    Raises:
        FileError: when the folder does not say.
    """
    try:
        return read_json(folder / MODEL_INDEX_NAME)
    except FileError as error:
        raise make_load_error(location, error) from error


def read_denoiser(folder: Path, component: str, index: Mapping[str, Any], weights: Path) -> ResolvedDenoiser:
    """What a diffusers folder says about one denoiser.

    Raises:
        FileError: for a class that diffusers does not have.
    """
    library, class_name = index[component] if len(index[component]) == 2 else (None, index[component])
    if library != "diffusers" or not isinstance(getattr(diffusers, str(class_name), None), type):
        known = f"{library}.{class_name} is not in diffusers {diffusers.__version__}"
        raise make_load_error(
            str(folder), ValueError(f"the {component} is of a class that is not here: {known}")
        )
    return ResolvedDenoiser(component, str(class_name), read_config(folder / component), weights)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The config of a component.

    Raises:
        FileError: when it has none that can be read.
    """
    try:
        return read_json(folder / CONFIG_NAME)
    except FileError as error:
        raise make_load_error(str(folder.parent), error) from error
