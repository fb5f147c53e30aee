"""Finds the weights of one denoiser: a file, a folder, or what a hub id names.

It must work without diffusers: the tasks that only convert a checkpoint have no use for its 150 MB.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.hub import check_repository, make_download_error
from int8run.models.pipeline_index import (
    MODEL_INDEX_NAME,
    MODULAR_INDEX_NAME,
    has_pipeline_index,
    is_modular_folder,
    read_json,
    read_pipeline_index,
)
from int8run.utils.paths import GGUF, SAFETENSORS, SHIPPED_PREFIX, to_local_path
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
# what stands beside weights and may say how they were quantized
QUANTIZATION_CONFIGS = ("config.json", "quantization_config.json", "hf_quant_config.json")
CONFIG_NAME = "config.json"
# as diffusers names the weights in a folder
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLED_REASON = "a pickled file, which can run code when opened; convert it to .safetensors first"
READ_SUFFIXES = (SAFETENSORS, GGUF)  # of files with weights
UNSUPPORTED_FORMATS = {
    ".ckpt": PICKLED_REASON,
    ".pt": PICKLED_REASON,
    ".pth": PICKLED_REASON,
    ".bin": PICKLED_REASON,
}


@dataclass(frozen=True)
class ResolvedWeights:
    """Where a denoiser's weights are.

    Args:
        path: a .safetensors or .gguf file, or a folder of .safetensors files.
        config: of the denoiser's class; None where no diffusers config is beside the weights.
        pipeline: the class of the pipeline that they are a part of; None: of no pipeline.
    """

    path: Path
    config: Mapping[str, Any] | None = None
    pipeline: str | None = None

    @property
    def class_name(self) -> str | None:
        """The diffusers class that the config names."""
        return None if self.config is None else self.config.get("_class_name")


def resolve_weights(
    location: str, revision: str | None = None, component: str | None = None
) -> ResolvedWeights:
    """Find a denoiser's weights here, or download them from the hub; nothing else of the model is downloaded.

    Args:
        location: a .safetensors or .gguf file, an index of shards, a folder of a denoiser or of a pipeline,
            `shipped:NAME`, a hub id, or a file or a folder on the hub (`org/repository/file.safetensors`).
        revision: on the hub.
        component: which denoiser of a pipeline with several.

    Raises:
        ConfigError: for a format that is not read, or a pipeline without that component.
        FileError: when something is missing or cannot be downloaded.
    """
    check_format(location)
    path = to_local_path(location)
    if path.is_dir():
        return resolve_in_folder(path, location, component)
    if path.is_file():
        return ResolvedWeights(path, read_denoiser_config(path.parent))
    path_on_hub = location.split("/")
    if is_local(location) or len(path_on_hub) < 2:
        raise FileError(
            f"{path.absolute()}: no such file or folder; "
            "set model.location to a checkpoint, or to its id on the hub"
        )
    return resolve_on_hub(path_on_hub, revision, component)


def is_local(location: str) -> bool:
    """Return whether a location can only be a path here, or a model inside this package."""
    return location.startswith((SHIPPED_PREFIX, ".", "/", "~"))


def split_hub_path(location: str) -> tuple[str, str]:
    """`org/repository/inner/path` -> (`org/repository`, `inner/path`), which may be empty."""
    parts = location.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def is_folder_on_hub(location: str) -> bool:
    """Return whether a location is neither here nor a file, but a folder inside a repository on the hub."""
    _, inner = split_hub_path(location)
    if not inner or is_local(location) or to_local_path(location).exists():
        return False
    return Path(inner).suffix.lower() not in (*READ_SUFFIXES, ".json", *UNSUPPORTED_FORMATS)


def check_format(location: str) -> None:
    """Raise ConfigError for a file that is not read: by its suffix, of another name by how it begins."""
    suffix = Path(location).suffix.lower()
    reason = UNSUPPORTED_FORMATS.get(suffix)
    if reason is not None:
        raise ConfigError(f"model.location={location} is {reason}")
    path = to_local_path(location)
    if suffix in (*READ_SUFFIXES, ".json") or not path.is_file():
        return
    if not begins_like_weights(path):
        raise ConfigError(
            f"model.location={location} is neither a {SAFETENSORS} nor a {GGUF} file; name one, a diffusers "
            "folder, or its id on the hub"
        )


def begins_like_weights(path: Path) -> bool:
    """Return whether a file begins as safetensors, with eight bytes of a length and JSON, or as GGUF.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
    except OSError as error:
        raise FileError(
            f"{path} cannot be read: {error.strerror}; set model.location to a file that can be"
        ) from error
    return beginning[8:] == b"{" or beginning.startswith(b"GGUF")


def list_denoisers(index: Mapping[str, Any], location: str) -> list[str]:
    """Return a pipeline's denoisers by component name, in the order in which the pipeline uses them.

    Args:
        index: the pipeline's `model_index.json`.
        location: of the pipeline, for messages.

    Raises:
        ConfigError: when it has none.
    """
    names = [
        name for name in DENOISER_COMPONENTS if isinstance(index.get(name), list) and None not in index[name]
    ]
    if not names:
        components = ", ".join(sorted(key for key in index if not key.startswith("_")))
        raise ConfigError(
            f"{index.get('_class_name')} in {location} has no denoiser: its components are {components}; "
            "a denoiser is the module that is called once per step, "
            f"in diffusers named {' or '.join(DENOISER_COMPONENTS)}"
        )
    return names


def resolve_in_folder(folder: Path, location: str, component: str | None) -> ResolvedWeights:
    """Find the weights in a denoiser's own folder, or in the folder of a pipeline.

    Raises:
        ConfigError: when the component is not in the pipeline, or the folder is no pipeline.
    """
    if has_pipeline_index(folder):
        index = keep_present_components(folder, read_pipeline_index(folder))
        name = choose_component(index, location, component)
        return ResolvedWeights(folder / name, read_denoiser_config(folder / name), index.get("_class_name"))
    if component is not None:
        raise ConfigError(
            f"task.component={component} names a part of a pipeline, and {location} is a single denoiser; "
            "leave it out"
        )
    return ResolvedWeights(folder, read_denoiser_config(folder))


def keep_present_components(folder: Path, index: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out of a modular pipeline's index the components that its folder does not hold."""
    if not is_modular_folder(folder):
        return index
    present = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or (folder / name).is_dir():
            present[name] = entry
    return present


def resolve_on_hub(
    path_on_hub: Sequence[str], revision: str | None, component: str | None
) -> ResolvedWeights:
    """Download one file of a repository, or one denoiser of its pipeline, into the hub's own cache.

    Args:
        path_on_hub: organization, repository, and the path of a file if one is named.
        revision: on the hub.
        component: which denoiser of a pipeline with several.

    Raises:
        ConfigError: for a pipeline without that component.
        FileError: when it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    location = "/".join(path_on_hub)
    repository, file = split_hub_path(location)
    check_repository(repository, "model.location", revision)
    try:
        if is_folder_on_hub(location):
            folder = download_component(repository, file, revision)
            return ResolvedWeights(folder, read_denoiser_config(folder))
        if file:
            return ResolvedWeights(Path(hf_hub_download(repository, file, revision=revision)))
        index = read_pipeline_index(download_index(repository, revision))
        name = choose_component(index, location, component)
        folder = download_component(repository, name, revision)
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error
    return ResolvedWeights(folder, read_denoiser_config(folder), index.get("_class_name"))


def download_index(repository: str, revision: str | None) -> Path:
    """Download the index of a pipeline, modular or not, and return the folder that it is in.

    Raises:
        OSError, ValueError: of the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(repository, MODEL_INDEX_NAME, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        file = hf_hub_download(repository, MODULAR_INDEX_NAME, revision=revision)
    return Path(file).parent


def download_side_files(location: str, revision: str | None) -> None:
    """Download the configs beside a file on the hub, which may say how its weights were quantized.

    A config that is not there is left out. A location that is here, or names a whole repository, has all.

    Args:
        location: as of `resolve_weights`.
        revision: on the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path_on_hub = location.split("/")
    if is_local(location) or to_local_path(location).exists() or len(path_on_hub) < 3:
        return
    repository, folders = "/".join(path_on_hub[:2]), path_on_hub[2:-1]
    for name in QUANTIZATION_CONFIGS:
        try:
            hf_hub_download(repository, "/".join([*folders, name]), revision=revision)
        except LocalEntryNotFoundError:
            log.warning(
                "%s is quantized, and the hub cannot be reached for the %s beside it, which may say how; "
                "it is read without",
                location,
                name,
            )
            return
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning(
                "%s is quantized, and the %s beside it, which may say how, could not be downloaded: %s",
                location,
                name,
                shorten_error(error),
            )


def download_component(repository: str, name: str, revision: str | None) -> Path:
    """Return the folder of one component of a pipeline, downloaded without its half-size and EMA variants."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=[
            *(f"{name}/{config}" for config in QUANTIZATION_CONFIGS),
            f"{name}/*{SAFETENSORS}",
            f"{name}/*{SAFETENSORS}.index.json",
        ],
        ignore_patterns=["*.fp16.*", "*.non_ema.*"],
    )
    return Path(folder) / name


def choose_component(index: Mapping[str, Any], location: str, component: str | None) -> str:
    """Return the component name of a pipeline's denoiser.

    Args:
        index: the pipeline's `model_index.json`.
        location: of the pipeline, for messages.
        component: the one that was asked for; None: the only one.

    Raises:
        ConfigError: when there is none, or several and none was asked for.
    """
    names = list_denoisers(index, location)
    if component in names:
        return component
    if component is not None:
        raise ConfigError(
            f"task.component={component} is not a denoiser of {location}; "
            f"{suggest_similar(component, names)}it has {', '.join(names)}"
        )
    if len(names) > 1:
        choices = " or ".join(f"task.component={name}" for name in names)
        raise ConfigError(f"{location} has {len(names)} denoisers; choose one: {choices}")
    return names[0]


def read_denoiser_config(folder: Path) -> Mapping[str, Any] | None:
    """Return the config of the weights in a folder; None unless it has one that names a diffusers class."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return None
    config = read_json(file)
    return config if isinstance(config.get("_class_name"), str) else None
