"""The modes of `model.mode`: short names for classes of diffusers, from `pipeline_modes.yaml`.

The settings check themselves against them, so that no library is imported here; `pipeline_class` finds the
class of a mode.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from int8run.errors import ConfigError, check_choice

MODES_FILE = Path(__file__).with_name("pipeline_modes.yaml")


@dataclass(frozen=True)
class PipelineMode:
    """What one mode means.

    Args:
        tables: of `diffusers.pipelines.auto_pipeline`.
        suffixes: behind a key of them, by the class of the ControlNet; "" without one.
        pairs: further classes, by the class that a repository names.
    """

    tables: Sequence[str] = ()
    suffixes: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def load_modes() -> Mapping[str, PipelineMode]:
    """Return the modes of `pipeline_modes.yaml` by name."""
    modes = yaml.safe_load(MODES_FILE.read_text(encoding="utf-8"))
    return {name: PipelineMode(**facts) for name, facts in modes.items()}


def check_pipeline_settings(pipeline: object, mode: object) -> None:
    """Check `model.pipeline` and `model.mode`, before the model is looked at.

    Raises:
        ConfigError: for a mode that does not exist, and a name that is no text.
    """
    if pipeline is not None and not isinstance(pipeline, str):
        raise ConfigError(
            f"model.pipeline is {pipeline!r}; it takes the name of a pipeline of diffusers, such as "
            "FluxImg2ImgPipeline"
        )
    if mode is not None:
        check_choice("model.mode", mode, load_modes())
