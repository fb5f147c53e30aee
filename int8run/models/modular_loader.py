"""Loads a modular pipeline out of a folder: its class, its blocks, and the components that they use.

`pipeline.load` calls it. diffusers' own loader is not used: it would import what the index names, and leave
out without a word what it cannot read. Only classes of diffusers and transformers are made, of safetensors
files.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers.modular_pipelines import ModularPipelineBlocks
from torch import nn

from int8run.errors import ConfigError, FileError
from int8run.models.missing_library import raise_if_library_is_missing, read_late_attribute
from int8run.models.model_folders import make_load_error, read_model_index
from int8run.models.modular_blocks import build_blocks
from int8run.models.modular_pipeline import ModularFace, make_pipeline
from int8run.models.source import ResolvedModel

log = logging.getLogger(__name__)
BLOCKS_KEY = "_blocks_class_name"
# libraries that components come from, by their names in an index
LIBRARIES: Mapping[str, Any] = {"diffusers": diffusers, "transformers": transformers}


def load_modular_pipeline(source: ResolvedModel, given: Mapping[str, Any], dtype: torch.dtype) -> ModularFace:
    """Load a modular pipeline.

    A component that the folder lacks is left out: some inputs need it, others do not.

    Args:
        source: where it is; its folder may be that of a pipeline that is not modular.
        given: components that exist already, such as skeletons.
        dtype: of the components that are read and are modules.

    Raises:
        ConfigError: for an unknown workflow, and for a given component that the pipeline has no place for.
        FileError: when a component cannot be read, or is of a class that is not here.
    """
    folder, class_name = source.folder, source.pipeline_class
    # the progress bars of the libraries write over ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = read_model_index(folder, str(folder))
    cls = getattr(diffusers, class_name)
    check_own_blocks(folder, index)
    blocks = build_blocks(cls, source.workflow, source.skip_blocks)
    components: dict[str, Any] = {}
    for spec in blocks.expected_components:
        place = source.elsewhere.get(spec.name, folder / spec.name)
        if spec.name in given:
            components[spec.name] = given[spec.name]
        elif place.is_dir() and is_component(index.get(spec.name)):
            components[spec.name] = load_component(place, index[spec.name], dtype)
        elif spec.default_creation_method == "from_pretrained":
            log.info("%s has no %s; inputs that need it cannot be used", folder, spec.name)
    for name in given:
        if name not in components:
            known = ", ".join(spec.name for spec in blocks.expected_components)
            raise ConfigError(f"{class_name} takes no {name}; it is made of {known}")
    return make_pipeline(cls, blocks, components, index)


def check_own_blocks(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a folder whose index names blocks that diffusers does not have: they would be code of its own.

    Raises:
        FileError: naming them.
    """
    name = index.get(BLOCKS_KEY)
    if name is None:
        return
    cls = getattr(diffusers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, ModularPipelineBlocks):
        raise FileError(
            f"{folder} is made for the blocks {name}, which diffusers {diffusers.__version__} does not have; "
            "blocks from repositories are code and are never run: take a folder whose blocks diffusers has"
        )


def is_component(entry: object) -> bool:
    """Whether an entry of an index names a class."""
    return isinstance(entry, list) and len(entry) == 2 and None not in entry


def load_component(folder: Path, entry: list[str], dtype: torch.dtype) -> Any:
    """Load one component.

    Args:
        folder: with its files.
        entry: its library and its class.
        dtype: of a component that is a module.

    Raises:
        ConfigError: when a library that it needs is not installed.
        FileError: when it cannot be read, or is of a class that is not here.
    """
    library, class_name = entry
    what = f"the {folder.name} of {folder.parent}"
    cls: Any = read_late_attribute(find_library(library), class_name, what)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        reason = (
            f"the {folder.name} is a {library}.{class_name}, which neither diffusers nor transformers has"
        )
        raise make_load_error(str(folder.parent), FileError(reason))
    options = {"dtype": dtype, "use_safetensors": True} if issubclass(cls, nn.Module) else {}
    try:
        return cls.from_pretrained(str(folder), **options)
    except ImportError as error:
        raise_if_library_is_missing(what, error)
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_load_error(str(folder.parent), error) from error


def find_library(name: str) -> Any:
    """Return what an index calls a library: one of LIBRARIES, or a folder of diffusers' pipelines, as `ltx2`.

    None for every other; nothing else is imported.

    Raises:
        ConfigError: when a library that the folder needs is not installed.
    """
    if name in LIBRARIES:
        return LIBRARIES[name]
    folder = read_late_attribute(diffusers.pipelines, name, f"diffusers.pipelines.{name}")
    is_folder = isinstance(folder, ModuleType) and hasattr(folder, "__path__")
    return folder if is_folder else None
