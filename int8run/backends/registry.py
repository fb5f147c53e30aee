"""The backends that int8run ships, by name. Each is one YAML file in `conf/backend/`.

Text encoders and measurements name a backend without composing a config, and error messages recommend those
that run here. A new backend needs no entry here: its YAML file is enough.
"""

import importlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import torch
import yaml

from int8run.backends.base import Backend

# Hydra's key for the class that a mapping stands for, and its list of options that are part of this one
TARGET, DEFAULTS = "_target_", "defaults"


def list_backend_names() -> Iterator[str]:
    """The options of `backend=`."""
    for option in files("int8run.conf").joinpath("backend").iterdir():
        if option.name.endswith(".yaml"):
            yield option.name.removesuffix(".yaml")


def make_backend(name: str) -> Backend:
    """A backend with the settings of its YAML file, as `backend=<name>` would make it."""
    settings = dict(read_backend_option(name))
    for entry in settings.pop(DEFAULTS, ()):
        # `cpu@candidates.cpu`: the option cpu becomes the field candidates["cpu"]
        option, _, path = entry.partition("@")
        field, _, key = path.partition(".")
        part = make_backend(option)
        if key:
            settings.setdefault(field, {})[key] = part
        else:
            settings[field] = part
    backend: Backend = instantiate(settings)
    return backend


def instantiate(value: Any) -> Any:
    """The object that a mapping with a `_target_` stands for, inner ones first; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    settings = {key: instantiate(inner) for key, inner in value.items()}
    if TARGET not in settings:
        return settings
    create = import_object(settings.pop(TARGET))
    return create(**settings)


def list_usable_backends(device: torch.device) -> list[str]:
    """Names of the backends that can run on this device, as the command line knows them."""
    usable = []
    for name in sorted(list_backend_names()):
        if not make_backend(name).limits.unsupported_reasons(device):
            usable.append(name)
    return usable


def read_backend_option(name: str) -> Mapping[str, Any]:
    """The YAML file of one option."""
    text = files("int8run.conf").joinpath("backend", f"{name}.yaml").read_text(encoding="utf-8")
    option: Mapping[str, Any] = yaml.safe_load(text)
    return option


def import_object(path: str) -> Any:
    """The class or function of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
