"""What `task=inspect` shows of the facts in an image, line by line, and what they leave open.

Called by `inspect_image`, which makes the command. Facts may have been written by somebody else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from int8run.tasks.file_description import Row
from int8run.tasks.model_facts import (
    INT8_SETTINGS,
    METHOD_GROUPS,
    SETTINGS_SUFFIX,
    find_changed_int8_settings,
)

UNSAID = "settings of the outlier method, of rounding= and backend=: the command takes the defaults"
UNSAID_CANDIDATES = "the candidates of outlier=auto: the command takes the defaults"
UNSAID_SETTINGS = "settings such as calibration, compile= and attention=: the command takes the defaults"
UNSAID_INT8 = "settings of int8, such as int8.attention: the command takes the defaults"
INT8 = "INT8"


def find_unsaid(facts: Mapping[str, Any]) -> Iterator[str]:
    """What of an INT8 model an image does not name."""
    if facts.get("precision") != INT8:
        return
    if "rounding" not in facts:  # by an earlier version
        yield UNSAID
    elif facts.get("outlier") == "auto" and "outlier_candidates" not in facts:
        yield UNSAID_CANDIDATES
    if INT8_SETTINGS not in facts:  # by an earlier version
        yield UNSAID_INT8
    if "settings" not in facts:  # by an earlier version
        yield UNSAID_SETTINGS


def describe_facts(facts: Mapping[str, Any]) -> Iterator[Row]:
    """Show each fact on a line of its own, the settings of the sampler by their names."""
    for name, value in facts.items():
        if name in ("input_copies", "outlier_candidates"):
            continue  # the command has them
        if isinstance(value, dict):
            yield from describe_group(name, value)
        else:
            yield name.replace("_", " "), str(value)


def describe_group(name: str, settings: Mapping[str, Any]) -> Iterator[Row]:
    """Show a fact that has names and values, each on a line of its own."""
    group = name.removesuffix(SETTINGS_SUFFIX)
    if name == "sampling":
        yield from describe_sampling(settings)
    elif name == "settings":
        yield from describe_other_settings(settings)
    elif name == "inputs":
        for column, files in settings.items():
            listed = files if isinstance(files, list) else [files]
            yield str(column), ", ".join(map(str, listed))
    elif name == INT8_SETTINGS:
        for setting, changed in find_changed_int8_settings(settings).items():
            yield f"int8.{setting}", str(changed)
    elif group in METHOD_GROUPS:
        for setting, number in settings.items():
            yield f"{group}.{setting}", str(number)
    else:
        yield name.replace("_", " "), str(settings)


def describe_other_settings(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Show what differs from the defaults; of the model's own settings its dtype."""
    for key, value in settings.items():
        if not key.startswith("model.") or key == "model.dtype":
            yield key, str(value)


def describe_sampling(sampling: Mapping[str, Any]) -> Iterator[Row]:
    """Show the settings of the sampler that have a value."""
    for name, value in sampling.items():
        if value not in (None, {}):
            yield f"sampler.{name}", str(value)
