"""Loads a diffusers pipeline: chooses the device, reads the components, puts them there.

Where the files are was found by `source`; denoisers are often given as skeletons and filled later.
"""

import importlib.metadata
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run import __version__
from int8run.errors import BackendError, ConfigError, FileError, suggest_similar
from int8run.models.missing_library import raise_if_library_is_missing, read_late_attribute
from int8run.models.model_folders import make_load_error, read_model_index
from int8run.models.pipeline_class import get_pipeline_class
from int8run.models.source import find_components
from int8run.utils.hardware import count_devices, has_device
from int8run.utils.paths import expand_path
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda", "xpu", "mps")
# libraries whose versions can change a result
VERSIONED_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "hydra-core",
    "mlflow",
    "numpy",
)
# what a component outside the pipeline's folder may be; other classes may open pickled files
PART_CLASSES = (
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.ProcessorMixin,
    transformers.ImageProcessingMixin,
    transformers.FeatureExtractionMixin,
    diffusers.ModelMixin,
)
VAE = "vae"
# components that one of `model.parts` takes the place of, where the folder has its own
REPLACED_PARTS = (VAE,)
# where the classes of a pipeline's components come from; diffusers imports whatever library a folder names
COMPONENT_LIBRARIES = ("diffusers", "transformers")


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; `auto` is CUDA or XPU where there is one.

    MPS is taken only where it is asked for: torch has no int8 product there.

    Raises:
        ConfigError: for a name that torch does not know.
        BackendError: for a device that is not there.
    """
    if name == "auto":
        kind = next((kind for kind in ("cuda", "xpu") if has_device(kind)), "cpu")
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        choices = "auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"
        raise ConfigError(f"device is {name!r}; choose from {choices}") from error
    if device.type not in DEVICES:
        raise BackendError(f"device={name}: this version runs on {' and '.join(DEVICES)}")
    if device.type != "cpu":
        check_gpu(name, device)
    return device


def check_gpu(name: str, device: torch.device) -> None:
    """Raise BackendError unless torch sees this GPU.

    Args:
        name: of the device, as it was asked for.
        device: that it means.
    """
    if not has_device(device.type):
        raise BackendError(
            f"device={name} asks for a GPU, but torch {torch.__version__} sees none; device=cpu works here"
        )
    count = count_devices(device.type)
    if (device.index or 0) >= count:
        raise BackendError(
            f"device={name} asks for a GPU that is not there; torch sees {count}, counted from 0 (a launcher "
            "or CUDA_VISIBLE_DEVICES may hide others)"
        )


def load_parts(folder: Path, parts: Mapping[str, Sequence[str]], dtype: torch.dtype) -> dict[str, Any]:
    """Load components that a pipeline's folder lacks; one that the folder has is skipped, unless it is a VAE.

    Args:
        folder: of the pipeline.
        parts: by name, the class of transformers or diffusers and its hub id or folder.
        dtype: of components that are modules.

    Raises:
        FileError: when one cannot be loaded.
        ConfigError: for a class that neither has.
    """
    index = read_model_index(folder, str(folder))
    loaded: dict[str, Any] = {}
    for name, (class_name, location) in parts.items():
        is_in_index = None not in (index.get(name) or [None])
        if is_in_index and (folder / name).is_dir() and name not in REPLACED_PARTS:
            continue
        loaded[name] = load_part(name, class_name, location, dtype)
        log.info("%s comes from %s", name, location)
    return loaded


def load_part(name: str, class_name: str, location: str, dtype: torch.dtype) -> Any:
    """Load one component of transformers or diffusers from a folder or a hub id.

    Args:
        name: of the component, for messages.
        class_name: of transformers or diffusers.
        location: hub id or folder.
        dtype: of a component that is a module.

    Raises:
        FileError: when it cannot be loaded.
        ConfigError: as `get_part_class`.
    """
    cls = get_part_class(name, class_name)
    options = {"dtype": dtype, "use_safetensors": True} if issubclass(cls, nn.Module) else {}
    path = expand_path(location)
    try:
        return cls.from_pretrained(str(path) if path.is_dir() else location, **options)
    except ImportError as error:
        raise_if_library_is_missing(f"{name} of {location}", error)
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = shorten_error(error)
        raise FileError(
            f"{name} could not be loaded from {location}: {reason}; "
            f"set 'model.parts.{name}=[{class_name}, FOLDER]' to one that you have"
        ) from error


def get_part_class(name: str, class_name: str) -> Any:
    """Return the class of a component outside the pipeline's folder.

    Args:
        name: of the component, for messages.
        class_name: of transformers or diffusers.

    Raises:
        ConfigError: for a class that neither has, or that is no model, tokenizer or processor.
    """
    found = [getattr(library, class_name, None) for library in (transformers, diffusers)]
    classes = [cls for cls in found if isinstance(cls, type)]
    if not classes:
        known = [other for library in (transformers, diffusers) for other in dir(library)]
        raise ConfigError(
            f"model.parts.{name} is of class {class_name}, which neither transformers "
            f"{transformers.__version__} nor diffusers {diffusers.__version__} has; "
            f"{suggest_similar(class_name, known)}see their documentation"
        )
    if not issubclass(classes[0], PART_CLASSES):
        raise ConfigError(
            f"model.parts.{name} is of class {class_name}; allowed are models, tokenizers and processors of "
            "transformers, and models of diffusers"
        )
    return classes[0]


def load_pipeline(
    folder: Path,
    denoisers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    parts: Mapping[str, Any] | None = None,
    class_name: str | None = None,
) -> DiffusionPipeline:
    """Load the pipeline of a diffusers folder, every module in `dtype` on `device`.

    Only weights in safetensors files are read.

    Args:
        folder: of the pipeline.
        denoisers: components that exist already, such as skeletons; they are taken as they are, and are not
            moved.
        dtype: of the others, which are read.
        device: of the others.
        parts: further components that exist already.
        class_name: of the pipeline; None: the one that the folder names.

    Raises:
        FileError: when the folder is incomplete.
    """
    # the progress bars of the libraries write over ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    check_component_libraries(folder)
    if class_name is None:
        class_name = str(read_model_index(folder, str(folder)).get("_class_name"))
    cls = get_pipeline_class(class_name)
    try:
        pipeline = cls.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, **denoisers, **(parts or {})
        )
    except ImportError as error:
        raise_if_library_is_missing(f"{cls.__name__} of {folder}", error)
        raise
    # diffusers reads a damaged index as it comes: each fault raises its own type
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_load_error(str(folder), error) from error
    for name, denoiser in denoisers.items():
        if getattr(pipeline, name) is not denoiser:
            raise FileError(
                f"{cls.__name__} of diffusers {diffusers.__version__} takes no {name} from outside; "
                "use a diffusers folder"
            )
    place_components(pipeline, device, without=denoisers)
    return pipeline


def place_components(pipeline: Any, device: torch.device, without: Collection[str]) -> None:
    """Move a pipeline's modules to a device, and turn its progress bars off.

    Args:
        pipeline: is changed.
        device: of its modules.
        without: components that stay where they are.
    """
    pipeline.set_progress_bar_config(disable=True)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and name not in without:
            move_module(module, device)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module; what has no numbers yet stays: a ControlNet may share layers of a skeleton."""
    is_whole = not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    if is_whole:
        module.to(device)
        return

    def move(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    module._apply(move)


def check_component_libraries(folder: Path) -> None:
    """Raise FileError for a pipeline's folder with a component of another library: it would be imported."""
    components = find_components(read_model_index(folder, str(folder)))
    for name, (library, _) in components.items():
        if library is None or is_component_library(library):
            continue
        # code in the folder itself is refused by diffusers, with its reason
        if (folder / name / f"{library}.py").is_file():
            continue
        libraries = " and ".join(COMPONENT_LIBRARIES)
        reason = f"the {name} is of the library {library}, and components come from {libraries} alone"
        raise make_load_error(str(folder), FileError(reason))


def is_component_library(library: str) -> bool:
    """Whether components may be of this library, or of this module of diffusers' pipelines."""
    if library in COMPONENT_LIBRARIES:
        return True
    module = read_late_attribute(diffusers.pipelines, library, f"diffusers.pipelines.{library}")
    return module is not None


def list_block_prefixes(denoiser: nn.Module) -> list[str]:
    """Return the prefixes of a denoiser's repeated blocks (`transformer_blocks.0.`), in order.

    Repeated blocks are those in its own lists with more than one.
    """
    prefixes: list[str] = []
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            prefixes += [f"{name}.{i}." for i in range(len(child))]
    return prefixes


def read_library_versions() -> dict[str, str]:
    """The versions of int8run and of the libraries that can change a result.

    int8run may run from a working tree that was never installed; it knows its version itself.
    """
    versions = {"int8run": __version__}
    for name in VERSIONED_LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions
