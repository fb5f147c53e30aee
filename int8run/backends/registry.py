"""The backends that ship, read from their YAML: for those who name one by a word, and for messages that recommend one."""

import importlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import torch
import yaml

from int8run.backends.base import Backend

TARGET, DEFAULTS = "_target_", "defaults"


def list_backend_names() -> Iterator[str]:
    """The options of `backend=`."""
    for option in files("int8run.conf").joinpath("backend").iterdir():
        if option.name.endswith(".yaml"):
            yield option.name.removesuffix(".yaml")


def make_backend(name: str) -> Backend:
    """A backend with the settings of its YAML, as `backend=<name>` would make it."""
    settings = dict(read_backend_option(name))
    for place in settings.pop(DEFAULTS, ()):  # `vnni@candidates.vnni`: that option, in that place
        option, _, path = place.partition("@")
        field, _, key = path.partition(".")
        made = make_backend(option)
        if key:
            settings.setdefault(field, {})[key] = made
        else:
            settings[field] = made
    return instantiate(settings)


def instantiate(value: Any) -> Any:
    """What a mapping with a target stands for, inner ones first; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    settings = {key: instantiate(inner) for key, inner in value.items()}
    return import_object(settings.pop(TARGET))(**settings) if TARGET in settings else settings


def list_usable_backends(device: torch.device) -> list[str]:
    """Names of the backends that can run on this device, as the command line knows them."""
    return [
        name
        for name in sorted(list_backend_names())
        if not import_object(read_backend_option(name)[TARGET]).limits.unsupported_reasons(device)
    ]


def read_backend_option(name: str) -> Mapping[str, Any]:
    """The YAML of one option."""
    return yaml.safe_load(files("int8run.conf").joinpath("backend", f"{name}.yaml").read_text())


def import_object(target: str) -> Any:
    """The class or function of that name."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)
