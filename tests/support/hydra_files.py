"""Hydra reads a shipped YAML file once per process and not once per composition: a third of a composition's
time.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.plugins.config_source import ConfigResult


@contextmanager
def remembered_package_files() -> Iterator[None]:
    """Remember what hydra read from files inside packages, which do not change while tests run."""
    read = ImportlibResourcesConfigSource._read_config
    results: dict[str, ConfigResult] = {}

    def read_once(source: ImportlibResourcesConfigSource, file: Any) -> ConfigResult:
        name = str(file)
        if name not in results:
            results[name] = read(source, file)
        # hydra changes what it gets
        return copy.deepcopy(results[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImportlibResourcesConfigSource, "_read_config", read_once)
        yield
