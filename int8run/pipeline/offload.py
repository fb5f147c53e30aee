"""Offloading, which is diffusers' own: parts of a pipeline wait in memory and come to the GPU for their turn.

load.py asks whether a device can have it, build.py and the mixed precision search turn it on for what the
pipeline has at that moment. Nothing here knows layers or LoRAs, only their buffers: INT8 weights are buffers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from torch import nn

from int8run.config.run_modes import GROUP_STREAM
from int8run.errors import BackendError, ConfigError
from int8run.models.dual_denoisers import split_denoiser

CPU = torch.device("cpu")
# devices with memory of their own, and with streams that copy to it beside the computation
DEVICES = ("cuda", "xpu")
GROUP_MODES = ("group", GROUP_STREAM)
# names of hooks: diffusers' own, and the one that is added here
GROUP_OFFLOADING, RELEASE_BUFFERS = "group_offloading", "int8run_release_buffers"


def check_offload(mode: str, device: torch.device) -> None:
    """Check that there is something to move on a device.

    Raises:
        BackendError: when there is not.
    """
    if mode != "none" and device.type not in DEVICES:
        raise BackendError(
            f"offload={mode} moves parts of the model between memory and a GPU; on {device} "
            "there is nothing to move; set offload=none"
        )


def find_offload_device(mode: str, device: torch.device) -> torch.device:
    """Where weights wait: on the device, or with offloading in memory."""
    return device if mode == "none" else CPU


def set_offload(pipe: DiffusionPipeline, mode: str, device: torch.device) -> None:
    """Turn on offloading for everything that the pipeline has now.

    With groups, what has it already keeps it; diffusers sets `model` up anew at every call.

    Args:
        pipe: is changed.
        mode: `none`; `model`: one component on the GPU at a time; `group`: one block at a time;
            `group_stream`: one block computes while the next one is copied out of pinned memory.
        device: the GPU.

    Raises:
        ConfigError: for a component whose blocks diffusers cannot move.
    """
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode in GROUP_MODES:
        for module in pipe.components.values():
            if isinstance(module, nn.Module) and not has_group_offloading(module):
                offload_blocks(module, mode, device)


def follow_denoiser(pipe: DiffusionPipeline, mode: str, device: torch.device, left: nn.Module) -> None:
    """Turn on offloading for a denoiser that took the place of another one between two steps.

    Args:
        pipe: has the new one.
        mode: as for `set_offload`; with `model` the one that was left goes back to memory.
        device: the GPU.
        left: the denoiser that was there.
    """
    if mode == "model":
        for part in split_denoiser(left).values():
            part.to(CPU)  # diffusers takes its old hook off when it comes back
    set_offload(pipe, mode, device)


def has_group_offloading(model: nn.Module) -> bool:
    """Whether a model's blocks are moved by diffusers already."""
    return any(find_group_hook(module) is not None for module in model.modules())


def find_group_hook(module: nn.Module) -> Any:
    """The hook that moves the group of a module; None: it has none."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(GROUP_OFFLOADING)


def offload_blocks(model: nn.Module, mode: str, device: torch.device) -> None:
    """Let diffusers move the blocks of one model.

    Args:
        model: is changed.
        mode: `group` or `group_stream`.
        device: the GPU.

    Raises:
        ConfigError: when diffusers cannot.
    """
    if not getattr(model, "_supports_group_offloading", True):
        raise ConfigError(
            f"offload={mode}: diffusers does not move the blocks of a {type(model).__name__}; set "
            "offload=model"
        )
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=mode == GROUP_STREAM,
    )
    if mode == GROUP_STREAM:
        release_buffers_too(model)


class ReleaseBuffers(ModelHook):
    """After a group has run, its buffers are those in memory again, as diffusers does for its parameters.

    With streams, diffusers brings parameters and buffers to the GPU and releases parameters alone. The
    weights of INT8 layers are buffers: one step would leave the whole model on the GPU.

    Args:
        group: of diffusers; holds the copies in pinned memory.
    """

    def __init__(self, group: Any):
        super().__init__()
        self.group = group

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """The group waits in memory from the start, so that what is written to its buffers is not lost."""
        # the group before it may start the transfer, so a hook of this one would be too late
        self.group.onload_ = torch.compiler.disable(partial(onload_all, self.group, self.group.onload_))
        self.release()
        return module

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Release, once diffusers' own hook has waited for the computation."""
        self.release()
        return output

    @torch.compiler.disable()
    def release(self) -> None:
        """Point every buffer to its copy in pinned memory."""
        pin_new_tensors(self.group)
        for module in self.group.modules:
            for buffer in module.buffers():
                buffer.data = self.group.cpu_param_dict[buffer]


def onload_all(group: Any, onload: Callable[[], None]) -> None:
    """Bring a group to the GPU, with what its layers were given since offloading was turned on.

    Args:
        group: of diffusers.
        onload: its own method.
    """
    pin_new_tensors(group)
    onload()


def pin_new_tensors(group: Any) -> None:
    """Copy to pinned memory what diffusers has no copy of: it makes them once.

    A LoRA's branch, a bias or a float copy of a weight may come to a layer later.
    """
    for module in group.modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor not in group.cpu_param_dict:
                group.cpu_param_dict[tensor] = tensor.data.cpu().pin_memory()


def release_buffers_too(model: nn.Module) -> None:
    """Add `ReleaseBuffers` to every group of a model that is copied by a stream."""
    for module in model.modules():
        hook = find_group_hook(module)
        if hook is None or hook.group.stream is None or hook.group.offload_leader is not module:
            continue
        HookRegistry.check_if_exists_or_initialize(module).register_hook(
            ReleaseBuffers(hook.group), RELEASE_BUFFERS
        )
