"""How much each layer or attention alone hurts the output of a denoiser when it is INT8.

`mixed_precision.py` orders them by it.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.int8_conv import Int8Layer
from int8run.metrics.quality import compute_relative_error
from int8run.models.attention_calls import entered_while_running, native_attention

# what computes a layer or an attention of the INT8 model
Computed = Int8Layer | Int8Attention


@torch.no_grad()
def measure_layer_sensitivities(
    denoiser: nn.Module,
    layers: Mapping[str, Computed],
    calls: Sequence[Mapping[str, Any]],
    *,
    on_layer: Callable[[], None],
) -> dict[str, float]:
    """Squared relative error of the denoiser's output when one layer or attention is INT8, mean over calls.

    Args:
        denoiser: the float model.
        layers: the INT8 layers and attentions, by name.
        calls: arguments of the denoiser.
        on_layer: called after each layer, for progress.
    """
    exact = [get_output_tensor(denoiser(**call)) for call in calls]
    sensitivities = {}
    for name, layer in layers.items():
        squares = []
        with computed_by(denoiser, name, layer):
            for call, exact_output in zip(calls, exact, strict=True):
                output = get_output_tensor(denoiser(**call))
                squares.append(compute_relative_error(output, exact_output) ** 2)
        sensitivities[name] = statistics.mean(squares)
        on_layer()
    return sensitivities


@contextmanager
def computed_by(denoiser: nn.Module, name: str, layer: Computed) -> Iterator[None]:
    """Let one layer or attention of the float model be computed in INT8 meanwhile.

    Args:
        denoiser: the float model.
        name: of the module.
        layer: computes it.
    """
    module = denoiser.get_submodule(name)
    if isinstance(layer, Int8Attention):
        with native_attention(denoiser), entered_while_running(module, layer):
            yield
        return
    with module.register_forward_hook(make_replacement_hook(copy_sharing_tensors(layer))):
        yield


def make_replacement_hook(layer: nn.Module) -> Callable[..., Tensor]:
    """A forward hook of a Linear that returns the INT8 layer's output instead of the Linear's.

    Args:
        layer: an `Int8Layer`; it is moved to its input, because with offloading it waits in memory.
    """
    int8_layer = cast(Int8Layer, layer)

    def replace_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        # the float model has its own activation before the layer
        return int8_layer.to(x.device).forward_isolated(x)

    return replace_output


def get_output_tensor(returned: Any) -> Tensor:
    """What a denoiser computed, out of the tuple or the object that diffusers returns. float32 [...]."""
    output: Tensor | list[Tensor] = returned[0]
    if isinstance(output, list):  # Z-Image's denoiser gives a tensor for each image
        return torch.cat([tensor.float().flatten() for tensor in output])
    return output.float()
