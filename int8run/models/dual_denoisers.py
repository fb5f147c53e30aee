"""Pipelines with two denoisers: each has its own part of the steps, such as the high and the low noise of Wan 2.2."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


class DualDenoiser(nn.Module):
    """The denoisers of one pipeline as one module: layers are named by their component first (`transformer_2.blocks.0.attn1.to_q`).

    Args:
        parts: by component name, in the order in which the pipeline uses them.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, expert: str, **arguments: Any) -> Any:
        """One call of one of them; `expert` is its component name."""
        return self.get_submodule(expert)(**arguments)


def split_denoiser(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The modules that a pipeline calls, by the prefix of their layers' names: `""` for a single one."""
    return (
        {f"{n}.": part for n, part in denoiser.named_children()}
        if isinstance(denoiser, DualDenoiser)
        else {"": denoiser}
    )


def set_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module, component: str) -> None:
    """Let the pipeline call this denoiser.

    Args:
        component: the name of a single one's place.
    """
    for prefix, part in split_denoiser(denoiser).items():
        name = prefix.removesuffix(".") or component
        if getattr(pipe, name, None) is not part:  # one that is there may have hooks for its offloading
            pipe.register_modules(**{name: part})
