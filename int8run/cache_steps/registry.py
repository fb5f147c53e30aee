"""The step caches that int8run ships, by name. Each is one YAML file in `conf/cache_steps/`.

Error messages recommend those that a model can have. A new cache needs no entry here: its YAML file is
enough.
"""

import importlib
from importlib.resources import files
from typing import Any

import yaml

from int8run.cache_steps.base import NONE, StepCache


def list_cache_names() -> list[str]:
    """The options of `cache_steps=` that are caches."""
    folder = files("int8run.conf").joinpath("cache_steps")
    names = [
        option.name.removesuffix(".yaml") for option in folder.iterdir() if option.name.endswith(".yaml")
    ]
    return sorted(name for name in names if name != NONE)


def make_cache(name: str, **changed: Any) -> StepCache:
    """A cache with the settings of its YAML file, as `cache_steps=<name>` would make it.

    Args:
        name: of the option.
        changed: settings that differ.
    """
    text = files("int8run.conf").joinpath("cache_steps").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    module, _, name_of_class = str(settings.pop("_target_")).rpartition(".")
    create = getattr(importlib.import_module(module), name_of_class)
    cache: StepCache = create(**(settings | changed))
    return cache
