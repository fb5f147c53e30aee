"""What the call of a pipeline takes."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline


def list_call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def takes_argument(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether a pipeline's call takes an argument of this name.

    A call with `**kwargs` hands on what it is given; but those of diffusers' own pipelines have it for old
    names alone, and drop everything else.
    """
    parameters = list_call_parameters(pipe)
    if name in parameters:
        return True
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return is_open and not type(pipe).__module__.startswith("diffusers.")


def get_call_default(pipe: DiffusionPipeline, name: str) -> Any:
    """What this pipeline's call takes where an argument is not given; None for one that it does not have."""
    parameter = list_call_parameters(pipe).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
