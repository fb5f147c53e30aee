"""Rotary position embedding of an INT8 model in one pass over memory, where its backend has a kernel for it.

`assemble` installs it. diffusers' processors call a function of their own module for it. Those of an INT8
model get a class whose `__call__` is the same code and finds the backend's kernel under that name: nothing
is patched, and processors of other models stay as they are. Results have the same bits. Compiled code
computes what it did before: the compiler joins it with what is around.
"""

from collections.abc import Mapping
from functools import cache
from inspect import getattr_static
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.base import RotatesPositions
from int8run.layers.derived_class import make_picklable
from int8run.layers.int8_linear import Int8Linear
from int8run.models.attention_calls import ROTARY_FUNCTION

FUNCTION_NAME = ROTARY_FUNCTION.__name__
# arguments that the kernel computes, by name, and what they are where a call does not name them
PAIRS_OF_NEIGHBORS = {"use_real": True, "use_real_unbind_dim": -1}
TOKEN_DIMENSION, DEFAULT_TOKEN_DIMENSION = "sequence_dim", 2
TOKENS_FIRST = {1: True, 2: False}  # by that dimension: whether tokens come before heads


def install_rotary(model: nn.Module) -> int:
    """Let the backend of the INT8 layers rotate queries and keys.

    Args:
        model: its processors are changed in place; they must not be those of the float model.

    Returns:
        The number of processors.
    """
    backend = find_rotary_backend(model)
    if backend is None:
        return 0
    n_installed = 0
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if not uses_known_rotary(processor):
            continue
        processor.__class__ = make_fused_class(type(processor), backend)  # type: ignore[arg-type]
        n_installed += 1
    return n_installed


def find_rotary_backend(model: nn.Module) -> RotatesPositions | None:
    """The first backend of an INT8 layer that rotates positions."""
    for layer in model.modules():
        if isinstance(layer, Int8Linear) and isinstance(layer.backend, RotatesPositions):
            return layer.backend
    return None


def uses_known_rotary(processor: Any) -> bool:
    """Whether the code of a processor calls diffusers' own function."""
    call = getattr_static(type(processor), "__call__", None)
    if not isinstance(call, FunctionType) or FUNCTION_NAME not in call.__code__.co_names:
        return False
    return call.__globals__.get(FUNCTION_NAME) is ROTARY_FUNCTION


@cache
def make_fused_class(processor_class: type, backend: RotatesPositions) -> type:
    """A class like that of a processor, under its name, whose code finds the backend's kernel.

    Args:
        processor_class: whose `__call__` calls diffusers' function.
        backend: computes it.
    """
    call: Any = processor_class.__call__
    names = {**call.__globals__, FUNCTION_NAME: make_rotary_function(backend)}
    fused = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    fused.__kwdefaults__ = call.__kwdefaults__
    fused.__annotations__ = call.__annotations__
    members = {"__call__": fused, "__module__": processor_class.__module__}
    derived = type(processor_class.__name__, (processor_class,), members)
    make_picklable(derived, make_fused_class, processor_class, backend)
    return derived


def make_rotary_function(backend: RotatesPositions) -> Any:
    """What takes the place of diffusers' function, with its arguments and its results."""

    def rotate(x: Tensor, freqs_cis: Any, *rest: Any, **options: Any) -> Any:
        token_dimension = options.get(TOKEN_DIMENSION, DEFAULT_TOKEN_DIMENSION)
        is_known = not rest and rotates_neighbors(options) and token_dimension in TOKENS_FIRST
        if is_known and not torch.compiler.is_compiling():
            cos, sin = freqs_cis
            tokens_first = TOKENS_FIRST[token_dimension]
            if backend.can_rotate(x, cos, sin, tokens_first=tokens_first):
                return backend.rotate_positions(x, cos, sin, tokens_first=tokens_first)
        return ROTARY_FUNCTION(x, freqs_cis, *rest, **options)

    return rotate


def rotates_neighbors(options: Mapping[str, Any]) -> bool:
    """Whether a call of diffusers' function rotates pairs of neighboring channels."""
    return all(options.get(name, default) == default for name, default in PAIRS_OF_NEIGHBORS.items())
