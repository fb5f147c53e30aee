"""Load a diffusers pipeline and find its denoiser."""

import importlib.metadata
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from int8run.errors import BackendError, ConfigError, FileError, suggest_similar
from int8run.models.sampling import Sampling
from int8run.models.source import make_load_error, read_model_index

log = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")


def pick_device(asked: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        BackendError: for a device that is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(f"device is {asked!r}; choose from auto, cpu, cuda, cuda:N") from error
    if device.type not in DEVICES:
        raise BackendError(f"device={asked}: this version runs on {' and '.join(DEVICES)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device={asked} asks for a GPU, but torch {torch.__version__} sees none; device=cpu works here"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device={asked} asks for a GPU that is not there; torch sees {torch.cuda.device_count()}, counted from 0"
        )
    return device


def load_parts(folder: Path, parts: Mapping[str, Sequence[str]], dtype: torch.dtype) -> dict[str, Any]:
    """Components that a pipeline's folder lacks; one that the folder has is left to it.

    Args:
        parts: by name, the class of transformers and its hub id or folder.

    Raises:
        FileError: when one cannot be had.
        ConfigError: for a class that transformers does not have.
    """
    index, found = read_model_index(folder, str(folder)), {}
    for name, (class_name, location) in parts.items():
        if None not in (index.get(name) or [None]) and (folder / name).is_dir():
            continue
        named = getattr(transformers, class_name, None)
        if not isinstance(named, type):
            raise ConfigError(
                f"model.parts.{name} is of class {class_name}, which transformers {transformers.__version__} does not have"
            )
        options = {"dtype": dtype, "use_safetensors": True} if issubclass(named, nn.Module) else {}
        cls: Any = named
        place = Path(location).expanduser()
        try:
            found[name] = cls.from_pretrained(str(place) if place.is_dir() else location, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            advice = f"set 'model.parts.{name}=[{class_name}, FOLDER]' to one that you have"
            raise FileError(f"{name} could not be loaded from {location}: {reason}; {advice}") from error
        log.info("%s comes from %s", name, location)
    return found


def load_pipeline(
    folder: Path,
    denoisers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """The pipeline of a diffusers folder, every module in `dtype` on `device`. Only safetensors weights are read.

    Args:
        denoisers: components that are there already, such as skeletons; they are taken as they are. The others are read.
        parts: further components that are there.

    Raises:
        FileError: when the folder is incomplete.
    """
    # their bars write over ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # the base class forgets components that a pipeline calls optional, and reads them itself
    named = getattr(diffusers, str(read_model_index(folder, str(folder)).get("_class_name")), None)
    cls: Any = (
        named if isinstance(named, type) and issubclass(named, DiffusionPipeline) else DiffusionPipeline
    )
    try:
        pipeline = cls.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, **denoisers, **(parts or {})
        )
    # diffusers reads a damaged index as it comes: a list, a missing key and an unknown class each raise their own kind
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_load_error(str(folder), error) from error
    for name, denoiser in denoisers.items():
        if getattr(pipeline, name) is not denoiser:
            raise FileError(
                f"{cls.__name__} of diffusers {diffusers.__version__} takes no {name} from outside; use a diffusers folder"
            )
    pipeline.set_progress_bar_config(disable=True)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and name not in denoisers:
            module.to(device)
    return pipeline


def set_scheduler(pipe: DiffusionPipeline, original: Any, sampling: Sampling) -> None:
    """Give the pipeline the scheduler that the sampling names, made from its original one's config.

    Raises:
        ConfigError: for a class that diffusers does not have, or a setting that the class does not have.
    """
    if sampling.scheduler is None and not sampling.scheduler_settings:
        pipe.register_modules(scheduler=original)
        return
    name = sampling.scheduler or type(original).__name__
    if not is_scheduler(name):
        known = list_compatible_schedulers(original)
        reason = (
            "needs a library that is not there" if name in dir(diffusers) else "is no scheduler of diffusers"
        )
        raise ConfigError(
            f"sampler.scheduler={name} {reason}; {suggest_similar(name, known)}choose from {', '.join(known)}"
        )
    cls: Any = getattr(diffusers, name)
    settings = inspect.signature(cls).parameters
    unknown = [key for key in sampling.scheduler_settings if key not in settings]
    if unknown:
        raise ConfigError(
            f"sampler.scheduler_settings.{unknown[0]} is no setting of {name}; choose from {', '.join(sorted(settings))}"
        )
    try:
        pipe.register_modules(scheduler=cls.from_config(original.config, **sampling.scheduler_settings))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"sampler.scheduler={name} does not take these settings: {' '.join(str(error).split())[:300]}"
        ) from error


def list_compatible_schedulers(original: Any) -> list[str]:
    """Schedulers whose steps are asked for in the same way, so that a pipeline made for the original can use them."""
    wanted = set(inspect.signature(original.set_timesteps).parameters) & {"sigmas", "timesteps"}
    names = [
        n
        for n in dir(diffusers)
        if n.endswith("Scheduler") and is_scheduler(n) and hasattr(getattr(diffusers, n), "set_timesteps")
    ]
    flow = type(original).__name__.startswith("FlowMatch")
    return [
        n
        for n in sorted(names)
        if wanted <= set(inspect.signature(getattr(diffusers, n).set_timesteps).parameters)
        and n.startswith("FlowMatch") == flow
    ]


def is_scheduler(name: str) -> bool:
    """Whether diffusers has a scheduler of that name that can be made from a config here."""
    cls = getattr(diffusers, name, None)  # in the place of one whose library is missing stands another class
    return (
        isinstance(cls, type)
        and issubclass(cls, diffusers.SchedulerMixin)
        and issubclass(cls, diffusers.ConfigMixin)
    )


def list_block_prefixes(denoiser: nn.Module) -> list[str]:
    """Prefixes of the blocks in a denoiser's own block lists (`transformer_blocks.0.`), in order."""
    return [
        f"{name}.{i}."
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1
        for i in range(len(child))
    ]


def read_library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    names = ("int8run", "torch", "diffusers", "transformers", "safetensors", "hydra-core", "mlflow", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
