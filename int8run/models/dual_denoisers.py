"""Pipelines with two denoisers, each for its own part of the steps: the high and the low noise of Wan 2.2.

The rest of int8run sees one module; only the pipeline itself and the recording of calls need its parts.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


class DualDenoiser(nn.Module):
    """The denoisers of one pipeline as one module.

    Its layers are named by their component first: `transformer_2.blocks.0.attn1.to_q`.

    Args:
        parts: by component name, in the order in which the pipeline uses them.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, expert: str, **arguments: Any) -> Any:
        """Call one of the denoisers; `expert` is its component name."""
        return self.get_submodule(expert)(**arguments)


def split_denoiser(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a pipeline calls by the prefix of their layers' names: "" for a single one."""
    if isinstance(denoiser, DualDenoiser):
        return {f"{name}.": part for name, part in denoiser.named_children()}
    return {"": denoiser}


def set_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module, component: str) -> None:
    """Let the pipeline call this denoiser.

    Args:
        pipe: is changed.
        denoiser: a single one, or a DualDenoiser.
        component: the name of a single one's component.
    """
    for prefix, part in split_denoiser(denoiser).items():
        name = prefix.removesuffix(".") or component
        # registering a part again would drop the hooks that offload it
        if getattr(pipe, name, None) is not part:
            pipe.register_modules(**{name: part})


def has_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module, component: str) -> bool:
    """Whether the pipeline calls this denoiser.

    Args:
        pipe: the pipeline.
        denoiser: a single one, or a DualDenoiser.
        component: the name of a single one's component.
    """
    for prefix, part in split_denoiser(denoiser).items():
        if getattr(pipe, prefix.removesuffix(".") or component, None) is not part:
            return False
    return True
