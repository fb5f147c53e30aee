"""What a setting of a run affects: the model that is built, what the float model generates, or neither.

`RunSpec` declares it at each of its fields. A sweep reuses the last model while the build keys are equal, and
a run finds float images of an earlier one by the float key, so a setting without a declaration is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

# from all settings to the part of one that counts; True: its whole value, False: nothing of it
Part = bool | Callable[[Any], object]
METADATA_KEY = "effects"


@dataclass(frozen=True)
class Effects:
    """What of a setting counts.

    Args:
        build: for the model that is built.
        float_baseline: for what the float model generates from the same samples.
    """

    build: Part = False
    float_baseline: Part = False


def affects(*, build: Part = False, float_baseline: Part = False) -> Mapping[str, Effects]:
    """The metadata of a dataclass field; see `Effects`."""
    return {METADATA_KEY: Effects(build, float_baseline)}


NOTHING = affects()
BUILD = affects(build=True)
BUILD_AND_FLOAT = affects(build=True, float_baseline=True)


def make_settings_key(settings: Any, effect: Literal["build", "float_baseline"]) -> str:
    """The settings with that effect as text: where two texts are equal, so is the result.

    Args:
        settings: a dataclass whose fields all declare their effects.
        effect: a field of `Effects`.
    """
    parts = []
    for setting in fields(settings):
        counts: Part = getattr(setting.metadata[METADATA_KEY], effect)
        if counts is False:
            continue
        value = getattr(settings, setting.name) if counts is True else counts(settings)
        parts.append(f"{setting.name}={value!r}")
    return ", ".join(parts)
