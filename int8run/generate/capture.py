"""Capture what a denoiser and its layers receive: arguments of its calls, inputs and outputs of its layers.

Calibration, mixed precision and layer metrics read real activations through these functions.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.pipeline_call import call_pipeline
from int8run.generate.prompts import Sample
from int8run.generate.step_count import count_asked_steps
from int8run.models.dual_denoisers import set_denoiser, split_denoiser
from int8run.models.sampling import Sampling, drop_schedule

CAPTURED_STEPS = 2
SPREAD_STEPS = 3
Call = Mapping[str, Any]  # the arguments of one call of a denoiser, by name


def capture_step(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Call]:
    """Generate with two steps and capture the denoiser's last call; of two experts the last call of each.

    Args:
        pipe: the pipeline to run.
        component: name of the pipeline's denoiser component.
        denoiser: takes that component's place.
        batch: what to generate.
        sampling: how, apart from the number of steps.
    """
    steps = count_asked_steps(pipe, batch, sampling, CAPTURED_STEPS)
    calls = capture_calls(pipe, component, denoiser, batch, replace(drop_schedule(sampling), steps=steps))
    last_calls = {call.get("expert"): call for call in calls}
    return list(last_calls.values())


def capture_spread_calls(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Call]:
    """Generate with few steps and capture the denoiser's first, middle and last call; of two experts of each.

    Args:
        pipe: the pipeline to run.
        component: name of the pipeline's denoiser component.
        denoiser: takes that component's place.
        batch: what to generate.
        sampling: how, apart from the number of steps.
    """
    steps = count_asked_steps(pipe, batch, sampling, SPREAD_STEPS)
    calls = capture_calls(pipe, component, denoiser, batch, replace(drop_schedule(sampling), steps=steps))
    by_expert: dict[object, list[Call]] = {}
    for call in calls:
        by_expert.setdefault(call.get("expert"), []).append(call)
    chosen = []
    for own_calls in by_expert.values():
        last = len(own_calls) - 1
        chosen += [own_calls[index] for index in dict.fromkeys((0, (last + 1) // 2, last))]
    return chosen


@torch.no_grad()
def capture_calls(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Call]:
    """Generate and capture the arguments of every call of the denoiser.

    Args:
        pipe: the pipeline to run.
        component: name of the pipeline's denoiser component.
        denoiser: takes that component's place.
        batch: what to generate.
        sampling: how.

    Returns:
        The arguments by name: some pipelines pass the first ones by position. Of two experts `expert` tells
        which one was called (see `DualDenoiser.forward`).
    """
    calls: list[Call] = []
    set_denoiser(pipe, denoiser, component)
    with ExitStack() as stack:
        for prefix, part in split_denoiser(denoiser).items():
            expert = {"expert": prefix.removesuffix(".")} if prefix else {}
            stack.callback(add_call_hook(part, expert, calls))
        # Hooks inside a compiled graph would break it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        call_pipeline(pipe, batch, sampling, lambda *_: {})
    return calls


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Keep the arguments of every call of some modules meanwhile, by the names that they are given with."""
    calls: dict[str, list[Call]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(add_call_hook(module, {}, calls[name]))
        yield calls


def add_call_hook(part: nn.Module, expert: Mapping[str, str], calls: list[Call]) -> Callable[[], None]:
    """Append the arguments of every call of a module to `calls`.

    Args:
        part: the denoiser, or one of two.
        expert: what tells the two apart.
        calls: receives the arguments.

    Returns:
        A function that removes the hook.
    """
    names = list(inspect.signature(part.forward).parameters)

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = {**dict(zip(names, args, strict=False)), **kwargs}
        calls.append({**expert, **{name: clone_tensors(value) for name, value in by_name.items()}})

    return part.register_forward_pre_hook(capture, with_kwargs=True).remove


def clone_tensors(value: Any) -> Any:
    """A copy that later steps cannot change.

    Some denoisers take lists of tensors (Z-Image), tensors by name (SDXL) or a cache that is emptied after
    the last step (Wan Animate 2).
    """
    if isinstance(value, list):
        return [clone_tensors(item) for item in value]
    if type(value) is tuple:
        return tuple(clone_tensors(item) for item in value)
    if isinstance(value, dict):
        return {key: clone_tensors(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.clone()
    return copy_cache(value)


def copy_cache(value: Any) -> Any:
    """A copy of an object of diffusers, and of all such objects in it; everything else as it is.

    Its tensors are the same ones: they are large, and a cache takes others in instead of changing them. So
    are dictionaries of a class of their own, such as a frozen config.
    """
    if isinstance(value, list):
        return [copy_cache(item) for item in value]
    if type(value) is tuple:
        return tuple(copy_cache(item) for item in value)
    if type(value) is dict:
        return {key: copy_cache(item) for key, item in value.items()}
    if isinstance(value, dict):
        return value
    is_cache = type(value).__module__.startswith("diffusers.") and hasattr(value, "__dict__")
    if not is_cache or isinstance(value, nn.Module):
        return value
    copied = copy.copy(value)
    for name, item in vars(value).items():
        setattr(copied, name, copy_cache(item))
    return copied


@torch.no_grad()
def capture_layers(
    denoiser: nn.Module,
    call: Call,
    names: Sequence[str],
    on_layer: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Call the denoiser once and hand the input and the output of its layers to a function.

    Args:
        denoiser: to call.
        call: its arguments.
        names: of the layers.
        on_layer: called with name, input and output of each of these layers that runs.
    """
    with ExitStack() as stack:
        # Hooks inside a compiled graph would break it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in names:
            stack.callback(add_layer_hook(denoiser, name, on_layer))
        denoiser(**call)


def add_layer_hook(
    denoiser: nn.Module, name: str, on_layer: Callable[[str, Tensor, Tensor], None]
) -> Callable[[], None]:
    """Hand every input and output of one layer to a function; returns what removes the hook."""

    def capture(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        on_layer(name, args[0], output)

    return denoiser.get_submodule(name).register_forward_hook(capture).remove


def check_finite(layer: str, x: Tensor, where: str) -> None:
    """Check the input of a layer: INT8 has no NaN and no infinity.

    Args:
        layer: its name.
        x: its input, of any shape.
        where: what the float model was doing, such as `step 3`.

    Raises:
        ConfigError: with the layer and the number of bad values.
    """
    num_bad = int((~torch.isfinite(x)).sum())
    if num_bad:
        raise ConfigError(
            f"{layer}: {num_bad} of {x.numel()} inputs are NaN or infinite in {where} of the float model; "
            "check the checkpoint, or try model.dtype=bfloat16 or float32"
        )
