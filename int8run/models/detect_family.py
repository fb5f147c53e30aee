"""Which denoiser a file holds, by the names in it: the fingerprints of `conf/model_type`."""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping

from int8run.errors import ConfigError
from int8run.models.family import Fingerprint, ModelFamily
from int8run.models.state_dict_adapter import Shape, find_targets


def detect_denoiser(
    keys: Iterable[str], families: Iterable[ModelFamily], shapes: Mapping[str, Shape] | None = None
) -> tuple[ModelFamily, str] | None:
    """The family of a file's denoiser and its class in diffusers; None where no fingerprint matches.

    Args:
        keys: of the file, without prefix (`layout.denoiser_keys`), named as in diffusers or as by the model's authors.
        families: to choose from.
        shapes: logical shapes of the tensors. With them a family whose layers read other widths is left out (`ModelFamily.inputs`):
            Stable Diffusion 1 and 2 differ in nothing else.

    Raises:
        ConfigError: when more than one denoiser matches.
    """
    keys = set(keys)
    found: dict[tuple[str, str], ModelFamily] = {}
    for family in families:
        for mark in family.fingerprints:
            if not matches(mark, keys):
                continue
            if shapes is None or family.find_input_mismatch(read_input_widths(shapes, mark.denoiser)) is None:
                found[family.name, mark.denoiser] = family
    if len(found) > 1:
        words = " or ".join(f"{name} ({denoiser})" for name, denoiser in found)
        choices = " or ".join(f"model_type={name}" for name in dict.fromkeys(name for name, _ in found))
        raise ConfigError(f"the names in the file are those of {words}; say which it is with {choices}")
    return next(((family, denoiser) for (_, denoiser), family in found.items()), None)


def matches(mark: Fingerprint, keys: Collection[str]) -> bool:
    """Whether all of a fingerprint's patterns are among the keys and none of those that must not be."""
    return all(has_match(pattern, keys) for pattern in mark.all) and not any(
        has_match(pattern, keys) for pattern in mark.none
    )


def has_match(pattern: str, keys: Collection[str]) -> bool:
    """Whether a key matches an fnmatch pattern."""
    if not re.search(r"[*?[]", pattern):
        return pattern in keys
    fits = re.compile(fnmatch.translate(pattern)).match
    return any(fits(key) for key in keys)


def read_input_widths(shapes: Mapping[str, Shape], denoiser: str) -> dict[str, int]:
    """How many inputs the layers of a file have, by their names in the model."""
    weights = {key: shape[1] for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")}
    return {
        name.removesuffix(".weight"): weights[key]
        for key, names in find_targets(weights, denoiser).items()
        for name in names
    }
