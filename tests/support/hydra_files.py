"""Hydra reads a shipped YAML file once per process and not once per composition: a third of its time."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource


@contextmanager
def remembered_package_files() -> Iterator[None]:
    """Remember what hydra read from files inside packages, which do not change while tests run."""
    # its scan executes the modules of sources again: only now are their classes those in use
    Plugins.instance()
    package_source: Any = SourcesRegistry.instance().types["pkg"]
    read = package_source._read_config
    pickled: dict[str, bytes] = {}

    def read_once(source: ConfigSource, file: Any) -> ConfigResult:
        name = str(file)
        if name not in pickled:
            pickled[name] = pickle.dumps(read(source, file))
        # hydra changes what it gets; this is a third of a deep copy's time
        result: ConfigResult = pickle.loads(pickled[name])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package_source, "_read_config", read_once)
        yield
