"""One denoising step of the float model, looked into: what the denoiser is called with, and what each layer sees."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.generate import call_pipeline
from int8run.generate.prompts import Sample
from int8run.models.dual_denoisers import set_denoiser, split_denoiser
from int8run.models.sampling import Sampling


def capture_step(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Mapping[str, Any]]:
    """The denoiser's last call in a run of two steps, and of two experts the last of each: real activations for measurements."""
    last = {
        made.get("expert"): made
        for made in capture_calls(pipe, component, denoiser, batch, replace(sampling, steps=2))
    }
    return list(last.values())


@torch.no_grad()
def capture_calls(
    pipe: DiffusionPipeline, component: str, denoiser: nn.Module, batch: Sequence[Sample], sampling: Sampling
) -> list[Mapping[str, Any]]:
    """Arguments of each of the denoiser's calls, all by name: some pipelines pass the first ones by position.

    Of two experts `expert` says which was called (see `DualDenoiser.forward`).
    """
    calls: list[Mapping[str, Any]] = []
    set_denoiser(pipe, denoiser, component)
    with ExitStack() as stack:
        for prefix, part in split_denoiser(denoiser).items():
            which = {"expert": prefix.removesuffix(".")} if prefix else {}
            names = list(inspect.signature(part.forward).parameters)

            def keep(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                which: dict[str, str] = which,
                names: list[str] = names,
            ) -> None:
                calls.append(
                    {
                        **which,
                        **{
                            k: clone_tensors(v)
                            for k, v in {**dict(zip(names, args, strict=False)), **kwargs}.items()
                        },
                    }
                )

            stack.callback(part.register_forward_pre_hook(keep, with_kwargs=True).remove)
        # hooks inside a compiled graph would break it
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        call_pipeline(pipe, batch, sampling, lambda *_: {})
    return calls


def clone_tensors(value: Any) -> Any:
    """A value that later steps cannot change; some denoisers take lists of tensors (Z-Image) or tensors by name (SDXL)."""
    if isinstance(value, list):
        return [clone_tensors(v) for v in value]
    if isinstance(value, dict):
        return {k: clone_tensors(v) for k, v in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def capture_layers(
    denoiser: nn.Module,
    arguments: Mapping[str, Any],
    names: Sequence[str],
    see: Callable[[str, Tensor, Tensor], None],
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
