"""One denoising step of the float model, looked into: what the denoiser is called with, and what each layer sees."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.generate import call
from int8run.generate.prompts import Sample
from int8run.models.family import Sampling


def record_call(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> Mapping[str, Any]:
    """Keyword arguments of the denoiser's last call in a run of two steps: real activations for measurements."""
    return record_calls(pipe, component, denoiser, batch, replace(sampling, steps=2))[-1]


@torch.no_grad()
def record_calls(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Mapping[str, Any]]:
    """Keyword arguments of each of the denoiser's calls."""
    calls: list[Mapping[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise TypeError(f"{type(module).__name__} was called with positional arguments; the probe needs keywords")
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    pipe.register_modules(**{component: denoiser})
    with ExitStack() as stack:
        stack.callback(denoiser.register_forward_pre_hook(keep, with_kwargs=True).remove)
        # hooks inside a compiled graph would break it
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        call(pipe, batch, sampling, lambda *_: {})
    return calls


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


def check_finite(layer: str, x: Tensor, where: str) -> None:
    """Refuse what no INT8 layer can take.

    Raises:
        ConfigError: naming the layer.
    """
    if not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise ConfigError(
            f"{layer}: {count} of {x.numel()} inputs are NaN or infinite in {where} of the float model; "
            "check the checkpoint, or try model.dtype=bfloat16 or float32"
        )
