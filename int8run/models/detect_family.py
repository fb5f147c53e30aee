"""Detects which denoiser a file holds by the names in it, with the fingerprints of `conf/model_type`.

Called for single files, whose names are all that tells what they are. No weight is read.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from int8run.errors import ConfigError
from int8run.models.family import ModelFamily
from int8run.models.fingerprint import SizedFingerprint
from int8run.models.state_dict_adapter import find_targets
from int8run.models.tensor_part import Shape

NAMED_FILE = Path(__file__).with_name("models_without_class.yaml")


def detect_denoiser(
    keys: Iterable[str], families: Iterable[ModelFamily], shapes: Mapping[str, Shape] | None = None
) -> tuple[ModelFamily, str] | None:
    """Return the family of a file's denoiser and its class in diffusers.

    None where no fingerprint matches, and for a model that diffusers has no class for: some of these have all
    names of another.

    Args:
        keys: of the file, without prefix (`find_denoiser_keys`), named as in diffusers or by the model's
            authors.
        families: to choose from.
        shapes: logical shapes of the tensors. With them a family whose layers read other widths is left out
            (`ModelFamily.inputs`): Stable Diffusion 1 and 2 differ in nothing else.

    Raises:
        ConfigError: when more than one denoiser matches.
    """
    keys = set(keys)
    if find_model_without_class(keys, shapes) is not None:
        return None
    found: dict[tuple[str, str], ModelFamily] = {}
    for family in families:
        for fingerprint in family.fingerprints:
            class_name = fingerprint.denoiser
            if fingerprint.matches(keys) and has_family_widths(family, class_name, shapes):
                found[family.name, class_name] = family
    if len(found) > 1:
        denoisers = " or ".join(f"{name} ({class_name})" for name, class_name in found)
        names = dict.fromkeys(name for name, _ in found)
        choices = " or ".join(f"model_type={name}" for name in names)
        raise ConfigError(f"the names in the file are those of {denoisers}; say which it is with {choices}")
    for (_, class_name), family in found.items():
        return family, class_name
    return None


def find_model_without_class(keys: Iterable[str], shapes: Mapping[str, Shape] | None = None) -> str | None:
    """The name of the model whose denoiser a file holds and that diffusers has no class for; None: not known.

    Args:
        keys: of the file, without prefix.
        shapes: of its tensors; without them a model that only its sizes tell is not found.
    """
    known_shapes: Mapping[str, Shape] = dict.fromkeys(keys, ()) if shapes is None else shapes
    for name, fingerprint in read_models_without_class().items():
        if fingerprint.matches(known_shapes):
            return name
    return None


@functools.cache
def read_models_without_class() -> Mapping[str, SizedFingerprint]:
    """What `models_without_class.yaml` says, by the name of the model."""
    rows = yaml.safe_load(NAMED_FILE.read_text(encoding="utf-8"))
    return {name: SizedFingerprint(**row) for name, row in rows.items()}


def has_family_widths(family: ModelFamily, class_name: str, shapes: Mapping[str, Shape] | None) -> bool:
    """Return whether the layers of a file read the widths of a family; without shapes nothing is compared."""
    if shapes is None:
        return True
    return family.find_input_mismatch(read_input_widths(shapes, class_name)) is None


def read_input_widths(shapes: Mapping[str, Shape], class_name: str) -> dict[str, int]:
    """Return how many inputs the Linears of a file have, by their names in the model.

    Args:
        shapes: of the file's tensors, by their keys without prefix.
        class_name: the denoiser's class in diffusers.
    """
    # weights of Linears: [N, K]
    widths = {key: shape[1] for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")}
    by_layer: dict[str, int] = {}
    for key, names in find_targets(widths, class_name).items():
        for name in names:
            by_layer[name.removesuffix(".weight")] = widths[key]
    return by_layer
