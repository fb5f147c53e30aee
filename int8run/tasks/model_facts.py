"""What an image and a model card say of the model: how it differs from the float checkpoint, by its settings.

Used by `image_writer`, `inspect_image` and `model_card`. Imports no library that generates: `task=quantize`
does without them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from int8run.cache_steps.base import StepCache, list_cache_settings
from int8run.config.run_spec import RunSpec
from int8run.layers.plan import Int8Settings

# of the command line; each has a fact with its option and one with the option's settings
METHOD_GROUPS = ("outlier", "rounding", "backend")
SETTINGS_SUFFIX = "_settings"
INT8_SETTINGS = f"int8{SETTINGS_SUFFIX}"
# of `int8`: what an image says otherwise, and how
SAID_OTHERWISE = {"enable": "its precision is INT8 or a float dtype"}


def describe_model(spec: RunSpec, model: str) -> dict[str, str]:
    """How the model of an image differs from the float checkpoint, by names for its file.

    Args:
        spec: the settings.
        model: `float`, `int8` or `clip`.
    """
    facts = {"Precision": spec.model.dtype}
    if model == "int8":
        facts = {
            "Precision": "INT8",
            "Outlier": name_method(spec.outlier),
            "Rounding": name_method(spec.rounding),
            "Backend": spec.backend.name,
        }
        changed = find_changed_int8_settings(list_int8_settings(spec.int8))
        if spec.has_step_cache:
            facts["Step cache"] = name_step_cache(spec.cache_steps)
        if changed:
            facts["INT8 settings"] = " ".join(f"{name}={value}" for name, value in changed.items())
    if model != "float" and spec.clip.is_quantized:
        facts["Text encoders"] = spec.clip.format
    loras = []
    for adapter, strength in zip(spec.lora.adapters, spec.lora.strengths, strict=True):
        loras.append(f"{adapter.name}: {strength:g}")
    if loras:
        facts["LoRAs"] = ", ".join(loras)
    return facts


def list_methods(spec: RunSpec) -> dict[str, Any]:
    """The options of outlier=, rounding= and backend=, the plain settings of each, and those of `int8`."""
    facts: dict[str, Any] = {INT8_SETTINGS: list_int8_settings(spec.int8)}
    for group in METHOD_GROUPS:
        method = getattr(spec, group)
        facts[group] = method.name
        settings = list_plain_settings(method)
        if settings:
            facts[f"{group}{SETTINGS_SUFFIX}"] = settings
    return facts


def list_int8_settings(settings: Int8Settings) -> dict[str, Any]:
    """The settings of `int8` that an image does not say otherwise; of `checkpoint` the names of its files."""
    listed = {}
    for field in dataclasses.fields(settings):
        if field.name not in SAID_OTHERWISE:
            listed[field.name] = getattr(settings, field.name)
    checkpoint = settings.checkpoint
    if isinstance(checkpoint, str):
        listed["checkpoint"] = name_model(checkpoint)
    elif checkpoint is not None:
        listed["checkpoint"] = ", ".join(map(name_model, checkpoint.values()))
    return listed


def find_changed_int8_settings(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the listed settings of `int8` that are not the defaults of this version."""
    defaults = list_int8_settings(Int8Settings())
    changed = {}
    for name, value in listed.items():
        if name not in defaults or value != defaults[name]:
            changed[name] = value
    return changed


def name_method(method: Any) -> str:
    """A method with its settings: `convrot group_size=256`."""
    settings = [f"{name}={value}" for name, value in list_plain_settings(method).items()]
    return " ".join([method.name, *settings])


def name_step_cache(cache: StepCache) -> str:
    """A step cache with its settings: `first_block threshold=0.1`."""
    settings = [f"{name}={value}" for name, value in list_cache_settings(cache).items()]
    return " ".join([cache.name, *settings])


def list_plain_settings(method: Any) -> dict[str, float | None]:
    """The settings of a method that are numbers, or null in place of one: no file, and no further method."""
    settings = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        is_null = value is None and isinstance(field.default, int | float)
        if is_null or isinstance(value, int | float):
            settings[field.name] = value
    return settings


def name_model(location: str) -> str:
    """The last part of where a model is, without the ending of a file; no folder of this machine."""
    name = re.split("[/:]", location.rstrip("/"))[-1]
    return name.removesuffix(".safetensors").removesuffix(".gguf") or "unknown"
