"""Settings that take a mapping take any key of it, whatever stands there before.

Hydra closes a composed config, so that a misspelled setting is found. In a mapping whose names are the user's
own that would refuse each of them, so an override of such a mapping, or of a key in it, adds what is missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig

from int8run.config.key_patterns import is_at, is_below

# dotted paths, where `*` stands for one part
OPEN_MAPPINGS = (
    "sampler.extra",
    "sampler.scheduler_settings",
    "model.sampling.extra",
    "model.sampling.scheduler_settings",
    "model.location",
    "model.parts",
    "model.sdnq",
    "model_type.inputs",
    "model_type.families",
    "model_type.keep_blocks",
    "int8.checkpoint",
    "metrics.measures",
    "clip.path",
    "lora.adapters.*.path",
    "outlier.candidates",
    "backend.candidates",
    "task.space",
    "hydra.launcher.resources",
    "hydra.launcher.extra",
    "hydra.launcher.runtime_env",
    "hydra.sweeper.params",
)


@contextmanager
def open_mappings() -> Iterator[None]:
    """Let hydra add what is missing in OPEN_MAPPINGS when it applies overrides."""
    # an attribute of the class would give the function, and a static method has to be put back
    apply_overrides = ConfigLoaderImpl.__dict__["_apply_overrides_to_config"]

    def apply_to_open_mappings(overrides: list[Override], config: DictConfig) -> None:
        for override in overrides:
            if override.type == OverrideType.CHANGE and is_in_open_mapping(override):
                override.type = OverrideType.FORCE_ADD
        apply_overrides.__func__(overrides, config)

    hydra_class: Any = ConfigLoaderImpl
    hydra_class._apply_overrides_to_config = staticmethod(apply_to_open_mappings)
    try:
        yield
    finally:
        hydra_class._apply_overrides_to_config = apply_overrides


def is_in_open_mapping(override: Override) -> bool:
    """Whether an override sets such a mapping, by another one, or a key in it."""
    key = override.key_or_group
    # a value that is no mapping takes the place of the whole, as everywhere
    is_mapping = isinstance(override._value, dict)
    return any(is_below(pattern, key) or (is_mapping and is_at(pattern, key)) for pattern in OPEN_MAPPINGS)
