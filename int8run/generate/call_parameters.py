"""What the call of a pipeline takes."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline


def list_call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def get_call_default(pipe: DiffusionPipeline, name: str) -> Any:
    """What this pipeline's call takes where an argument is not given; None for one that it does not have."""
    parameter = list_call_parameters(pipe).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
