"""torch.compile of the denoisers, as `compile=` says. build.py calls it, after hooks for offloading are on.

With CUDA graphs a step is recorded once and played back, with the tensors where they were. So whatever
changes between two steps is written into the tensors that are there: LoRA strengths, merged weights.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from int8run.config.run_modes import REDUCE_OVERHEAD
from int8run.models.dual_denoisers import split_denoiser

log = logging.getLogger(__name__)


def compile_denoisers(
    denoisers: Mapping[str, nn.Module], mode: str, *, has_hooks: bool, takes_hooks: bool = False
) -> None:
    """Compile all denoisers, float and INT8 alike, by torch.compile.

    Args:
        denoisers: by what generates with them.
        mode: `none`, `blocks` (the repeated blocks), `full` or `reduce-overhead` (full, by CUDA graphs).
        has_hooks: whether hooks move their blocks to the GPU, which are not compiled and part the graph.
        takes_hooks: whether hooks will be put around blocks, as a step cache does; they stay outside the
            graphs then, which are compiled once whether the hooks are there or not.
    """
    parts: list[Any] = [part for whole in denoisers.values() for part in split_denoiser(whole).values()]
    for part in dict.fromkeys(parts):  # with quantized text encoders alone both denoisers are one
        if mode == "blocks" and takes_hooks:
            compile_inside_hooks(part, fullgraph=not has_hooks)
        elif mode == "blocks":
            part.compile_repeated_blocks(fullgraph=not has_hooks)
        elif mode == "full":
            part.compile(fullgraph=not has_hooks)
        elif mode == REDUCE_OVERHEAD:
            compile_to_cuda_graphs(part)


def compile_inside_hooks(part: Any, *, fullgraph: bool) -> None:
    """Compile what the repeated blocks of a denoiser compute, and not how they are called.

    Args:
        part: a denoiser of diffusers.
        fullgraph: whether a block must become one graph.
    """
    for module in part.modules():
        if type(module).__name__ in part._repeated_blocks:
            module.forward = torch.compile(module.forward, fullgraph=fullgraph)


def report_uncompiled(components: Iterable[str], mode: str) -> None:
    """Log which components that run in each step are not compiled where the denoisers are.

    Args:
        components: of the ControlNets, float and INT8 alike.
        mode: as for `compile_denoisers`.
    """
    if mode == "none":
        return
    for component in components:
        log.info("compile=%s compiles the denoiser alone; %s runs uncompiled", mode, component)


def compile_to_cuda_graphs(model: nn.Module) -> None:
    """Compile a whole model to CUDA graphs on a GPU; on a CPU to what `full` compiles it to.

    A graph writes its outputs to where it wrote them before. A pipeline may still hold those of the call
    before, as for guidance, so that each call hands out copies.

    Args:
        model: is changed; it keeps its class.
    """
    compiled = torch.compile(model._call_impl, fullgraph=True, mode=REDUCE_OVERHEAD)

    def call_graph(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(copy_tensor, compiled(*args, **kwargs))

    model._compiled_call_impl = call_graph


def copy_tensor(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
