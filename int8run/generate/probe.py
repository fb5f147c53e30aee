"""One denoising step of the float model, looked into: what the denoiser is called with, and what each layer sees."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.generate.generate import call
from int8run.generate.prompts import Sample
from int8run.models.family import Sampling


@torch.no_grad()
def record_call(pipe: DiffusionPipeline, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling) -> Mapping[str, Any]:
    """Keyword arguments of the denoiser's call in the middle of a run: real activations for measurements."""
    calls: list[Mapping[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise TypeError(f"{type(module).__name__} was called with positional arguments; the probe needs keywords")
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        call(pipe, batch, sampling, lambda *_: {})
    finally:
        handle.remove()
    return calls[len(calls) // 2]


@torch.no_grad()
def watch_layers(
    denoiser: nn.Module, arguments: Mapping[str, Any], names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
) -> None:
    """Call the denoiser once; `see(name, input, output)` is called for each named layer that runs."""
    with ExitStack() as stack:
        # hooks inside a compiled graph would break it
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in names:
            hook = lambda _, args, out, name=name: see(name, args[0], out)  # noqa: E731
            stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
        denoiser(**arguments)
