"""The classes of denoisers by name: those of diffusers, and our own for checkpoints that it has none for.

`source` builds skeletons with them. Which files are of a class of our own is data: `denoiser_variants.yaml`.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import yaml

from int8run.models.minimax_h3_pruned import MiniMaxH3PrunedTransformer3DModel
from int8run.models.missing_library import read_late_attribute
from int8run.models.tensor_part import Shape

# the libraries that a denoiser may come from; an index has ours with the module that the class is in
DIFFUSERS, INT8RUN = "diffusers", "int8run"
OWN_DENOISERS: Mapping[str, Any] = {
    MiniMaxH3PrunedTransformer3DModel.__name__: MiniMaxH3PrunedTransformer3DModel,
}
VARIANTS_FILE = Path(__file__).with_name("denoiser_variants.yaml")


@dataclass(frozen=True)
class DenoiserVariant:
    """A denoiser of our own that a checkpoint may hold in the place of the one that its repository names.

    Args:
        name: its class.
        of: the class that the repository names.
        keys: tensors of a file, without prefix; one of them is enough.
        config: settings by name: the dimension of that tensor which is their value.
        replaced: fnmatch patterns of layers that are built unlike those of the other class, with the reason
            why a LoRA made for that one cannot change them.
    """

    name: str
    of: str
    keys: tuple[str, ...]
    config: Mapping[str, int]
    replaced: Mapping[str, str]


@cache
def read_variants() -> tuple[DenoiserVariant, ...]:
    """The denoisers of our own."""
    entries = yaml.safe_load(VARIANTS_FILE.read_text(encoding="utf-8"))
    variants = []
    for name, entry in entries.items():
        variant = DenoiserVariant(
            name=name,
            of=entry["of"],
            keys=tuple(entry["keys"]),
            config=entry["config"],
            replaced=entry["replaced"],
        )
        variants.append(variant)
    return tuple(variants)


def find_denoiser_class(library: str | None, name: str) -> Any:
    """The class of a denoiser that the index of a pipeline names; None where it is not here.

    Args:
        library: that the index names.
        name: of the class.
    """
    if str(library).partition(".")[0] == INT8RUN:
        return OWN_DENOISERS.get(name)
    if library != DIFFUSERS:
        return None
    found = read_late_attribute(diffusers, name, f"the denoiser {name}")
    return found if isinstance(found, type) else None


def get_denoiser_class(name: str) -> Any:
    """The class of a denoiser that is here, of our own or of diffusers."""
    return OWN_DENOISERS.get(name) or getattr(diffusers, name)


def has_variants(class_name: str) -> bool:
    """Whether files may hold a denoiser of our own where a repository names this class."""
    return any(variant.of == class_name for variant in read_variants())


def choose_variant(
    class_name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[str, Mapping[str, Any]]:
    """The class that a file holds, and its config.

    Args:
        class_name: that the repository names.
        config: of that class.
        shapes: of the file's tensors, by their keys without prefix.

    Returns:
        What was given, unless the file is of a class of our own.
    """
    for variant in read_variants():
        tellers = [key for key in variant.keys if key in shapes]
        if variant.of == class_name and tellers:
            shape = shapes[tellers[0]]
            settings = {setting: shape[dim] for setting, dim in variant.config.items() if dim < len(shape)}
            return variant.name, {**config, **settings}
    return class_name, config


def find_replaced_reason(class_name: str, layer: str) -> str | None:
    """Why a LoRA made for another class cannot change a layer; None where that layer is built alike.

    Args:
        class_name: of the denoiser.
        layer: its name in the denoiser.
    """
    for variant in read_variants():
        if variant.name != class_name:
            continue
        for pattern, reason in variant.replaced.items():
            if fnmatch.fnmatchcase(layer, pattern):
                return reason
    return None
