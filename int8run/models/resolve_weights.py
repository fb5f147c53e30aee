"""Find the weights of one denoiser, without diffusers: a program that only moves numbers has no use for its 150 MB."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError, FileError, suggest_similar

ASSETS_FOLDER = Path(__file__).parents[1] / "assets"
SAFETENSORS = ".safetensors"
# of pipelines; a single name is the denoiser, of two each has its own part of the steps
DENOISER_COMPONENTS = ("transformer", "transformer_2", "unet")
CONFIG_NAME, MODEL_INDEX_NAME = "config.json", "model_index.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # as diffusers names weights in a folder
PICKLED_REASON = "a pickled file, which can run code when opened; convert it to .safetensors first"
UNSUPPORTED_FORMATS = {".gguf": "a GGUF file; ComfyUI-GGUF and diffusers' GGUFQuantizationConfig read it"}
UNSUPPORTED_FORMATS |= dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), PICKLED_REASON)


@dataclass(frozen=True)
class ResolvedWeights:
    """Where a denoiser's weights are.

    Args:
        path: a .safetensors file, or a folder of them.
        config: of the denoiser's class, where there is one: with weights from a diffusers folder.
    """

    path: Path
    config: Mapping[str, Any] | None = None

    @property
    def class_name(self) -> str | None:
        """The diffusers class, where a config says so."""
        return None if self.config is None else self.config.get("_class_name")


def resolve_weights(
    location: str, revision: str | None = None, component: str | None = None
) -> ResolvedWeights:
    """Find a denoiser's weights here, or fetch them from the hub; nothing else of the model is fetched.

    Args:
        location: a .safetensors file, an index of shards, a folder of a denoiser or of a pipeline, `shipped:NAME`, a hub id, or a file on
            the hub (`org/repository/file.safetensors`).
        revision: on the hub.
        component: of a pipeline with several denoisers the one that is meant.

    Raises:
        ConfigError: for a format that is not read, or a pipeline without that component.
        FileError: when something is missing or cannot be fetched.
    """
    check_format(location)
    shipped, path = location.startswith("shipped:"), to_local_path(location)
    if path.is_dir():
        return resolve_in_folder(path, location, component)
    if path.is_file():
        return ResolvedWeights(path, read_denoiser_config(path.parent))
    words = location.split("/")
    if shipped or location.startswith((".", "/", "~")) or len(words) < 2:
        raise FileError(
            f"{path.absolute()}: no such file or folder; set model.location to a checkpoint, or to its id on the hub"
        )
    return resolve_on_hub(words, revision, component)


def to_local_path(location: str) -> Path:
    """The path that a location names, if it names one here."""
    return (
        ASSETS_FOLDER / location.removeprefix("shipped:")
        if location.startswith("shipped:")
        else Path(location).expanduser()
    )


def check_format(location: str) -> None:
    """Refuse files that are not read, by the name of their format.

    Raises:
        ConfigError: with what reads them.
    """
    why = UNSUPPORTED_FORMATS.get(Path(location).suffix.lower())
    if why is not None:
        raise ConfigError(f"model.location={location} is {why}")


def list_denoisers(index: Mapping[str, Any], location: str) -> list[str]:
    """A pipeline's denoisers, in the order in which it uses them.

    Raises:
        ConfigError: when it has none.
    """
    names = [
        name for name in DENOISER_COMPONENTS if isinstance(index.get(name), list) and None not in index[name]
    ]
    if not names:
        parts = ", ".join(sorted(key for key in index if not key.startswith("_")))
        raise ConfigError(
            f"{index.get('_class_name')} in {location} has no denoiser: its components are {parts}; a denoiser is the module that is "
            f"called once per step, in diffusers named {' or '.join(DENOISER_COMPONENTS)}"
        )
    return names


def resolve_in_folder(folder: Path, location: str, component: str | None) -> ResolvedWeights:
    """A denoiser's own folder, or the one inside a pipeline's."""
    if not (folder / MODEL_INDEX_NAME).is_file():
        if component is not None:
            raise ConfigError(
                f"task.component={component} names a part of a pipeline, and {location} is a single denoiser; leave it out"
            )
        return ResolvedWeights(folder, read_denoiser_config(folder))
    name = choose_component(read_json(folder / MODEL_INDEX_NAME), location, component)
    return ResolvedWeights(folder / name, read_denoiser_config(folder / name))


def resolve_on_hub(words: list[str], revision: str | None, component: str | None) -> ResolvedWeights:
    """One denoiser of a repository, or one of its files; kept in the hub's own cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, location = "/".join(words[:2]), "/".join(words)
    try:
        if len(words) > 2:
            return ResolvedWeights(Path(hf_hub_download(repository, "/".join(words[2:]), revision=revision)))
        name = choose_component(
            read_json(Path(hf_hub_download(repository, MODEL_INDEX_NAME, revision=revision))),
            location,
            component,
        )
        wanted = [f"{name}/{CONFIG_NAME}", f"{name}/*{SAFETENSORS}", f"{name}/*{SAFETENSORS}.index.json"]
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*.fp16.*", "*.non_ema.*"],
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"model.location={location} could not be fetched: {reason}; name a file or folder that you have"
        ) from error
    return ResolvedWeights(folder / name, read_denoiser_config(folder / name))


def choose_component(index: Mapping[str, Any], location: str, component: str | None) -> str:
    """The name of a pipeline's denoiser.

    Raises:
        ConfigError: when there is none, or several and none is named.
    """
    names = list_denoisers(index, location)
    if component is not None:
        if component not in names:
            listed = ", ".join(names) or "none"
            raise ConfigError(
                f"task.component={component} is no denoiser of {location}; {suggest_similar(component, names)}it has {listed}"
            )
        return component
    if len(names) == 1:
        return names[0]
    raise ConfigError(
        f"{location} has {len(names)} denoisers; choose one: task.component={' or task.component='.join(names)}"
    )


def read_denoiser_config(folder: Path) -> Mapping[str, Any] | None:
    """The config of the weights in a folder, if it has one that names a class."""
    file = folder / CONFIG_NAME
    config = read_json(file) if file.is_file() else {}
    return config if isinstance(config.get("_class_name"), str) else None


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        FileError: when it is none.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{file} is no JSON object")
    return found
