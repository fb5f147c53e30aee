"""Finds where a location lies on this machine; what is on the hub is downloaded, but nothing pickled.

A location is a diffusers folder, the weights of a denoiser, or a folder with another component. `source` asks
for the first two, `text_encoders` and the modular loader for components. What the folders hold is not known
here, but for the index of a pipeline.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download

from int8run.errors import ConfigError, FileError
from int8run.models.family import ModelSource
from int8run.models.hub import check_repository, make_download_error
from int8run.models.modular_source import download_modular
from int8run.models.pipeline_index import (
    MODEL_INDEX_NAME,
    has_pipeline_index,
    is_modular_folder,
    read_pipeline_index,
)
from int8run.models.resolve_weights import (
    CONFIG_NAME,
    READ_SUFFIXES,
    UNSUPPORTED_FORMATS,
    check_format,
    download_component,
    download_index,
    is_folder_on_hub,
    is_local,
    list_denoisers,
    split_hub_path,
)
from int8run.utils.paths import SAFETENSORS, to_local_path
from int8run.utils.text import shorten_error


def names_weights(location: str) -> bool:
    """Return whether a location names the weights of a denoiser alone.

    These are a file or a folder of files, here or inside a repository on the hub.
    """
    path = to_local_path(location)
    has_known_suffix = Path(location).suffix.lower() in (*READ_SUFFIXES, *UNSUPPORTED_FORMATS)
    return has_known_suffix or path.is_file() or is_denoiser_folder(path) or is_folder_on_hub(location)


def is_denoiser_folder(path: Path) -> bool:
    """Return whether a folder holds weights and no pipeline."""
    return path.is_dir() and not has_pipeline_index(path) and any(path.glob(f"*{SAFETENSORS}"))


def check_formats(location: str | Mapping[str, str] | None) -> None:
    """Raise ConfigError where the file of a denoiser is in a format that is not read."""
    files = location.values() if isinstance(location, Mapping) else [location]
    for file in files:
        check_format(str(file))


def make_base_error(source: ModelSource) -> ConfigError:
    """Return the error for a model whose location holds a denoiser alone, without `model.base`."""
    return ConfigError(
        f"model.location={source.location} holds a denoiser alone; set model.base=<hub id or diffusers "
        "folder> that the text encoders, the VAE, the scheduler and the denoiser's config come from"
    )


def check_pipeline_folder(path: Path, setting: str) -> None:
    """Raise FileError for a path that is no folder of a pipeline.

    Args:
        path: of the folder.
        setting: that names it.
    """
    if not has_pipeline_index(path):
        raise FileError(
            f"{path.absolute()} is not a diffusers folder: it has no {MODEL_INDEX_NAME}; set {setting} to a "
            f"folder that has one, to an id on the hub, or model.location to a {SAFETENSORS} or .gguf file"
        )


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
    """Return the file or folder of a denoiser's weights; `org/repository/file.safetensors` is downloaded.

    So is the folder `org/repository/folder`.

    Raises:
        FileError: when it is not there, or cannot be downloaded.
    """
    path = to_local_path(location)
    if path.exists():
        return path
    repository, file = split_hub_path(location)
    if is_local(location) or not file:
        raise FileError(
            f"{path.absolute()}: no such file; on the hub a file is org/repository/name{SAFETENSORS}"
        )
    check_repository(repository, "model.location", revision)
    try:
        if is_folder_on_hub(location):
            return download_component(repository, file, revision)
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error


def resolve_part_folder(name: str, location: str) -> Path:
    """Return the folder of a component outside the pipeline's; nothing pickled is downloaded.

    Args:
        name: of the component.
        location: a path, a hub id, or a folder inside a repository on the hub.

    Raises:
        FileError: when it cannot be downloaded.
    """
    path = to_local_path(location)
    if path.is_dir():
        return path
    repository, folder = split_hub_path(location)
    check_repository(repository, f"model.parts.{name}")
    try:
        if is_folder_on_hub(location):
            return download_component(repository, folder, revision=None)
        return Path(snapshot_download(location, allow_patterns=["*.json", f"*{SAFETENSORS}"]))
    except (OSError, ValueError) as error:
        raise make_download_error(location, f"model.parts.{name}", error) from error


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


def read_model_index(folder: Path, location: str) -> Mapping[str, Any]:
    """Return the index of a pipeline's folder, modular or not.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        return read_pipeline_index(folder)
    except FileError as error:
        raise make_load_error(location, error) from error


def make_load_error(location: str, error: Exception) -> FileError:
    """Return the error for a model that diffusers could not read."""
    reason = shorten_error(error)
    # the text of these is a key or an argument, which alone says little
    if isinstance(error, KeyError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return FileError(
        f"model {location!r} could not be loaded: {reason}; set model.location to a folder that has it"
    )
