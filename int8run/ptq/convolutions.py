"""Bind quantized convolutions to what computes them, and time them beside the float ones for `auto`.

They pass a `ConvolutionBinder` on their way to `quantize.build_int8_layers`, which binds the Linears. What is
measured is kept where `backend=auto` keeps what it measures of Linears.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from int8run.backends.auto import MIN_FLOAT_GAIN
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, find_instruction_set
from int8run.backends.convolution import ConvBackend, choose_conv_backend, read_geometry
from int8run.layers.int8_conv import Int8Conv, get_layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import AUTO, Int8Settings, LayerPlan
from int8run.ptq.layer_costs import describe_transform
from int8run.ptq.quantize import share_matrix
from int8run.utils.paths import expand_path
from int8run.utils.timing import time_medians

log = logging.getLogger(__name__)
DEFAULT_ROUNDS = 7  # timings of each side, where the settings name no number


class ConvolutionBinder:
    """Makes the INT8 layer of each convolution.

    Args:
        backend: of the settings; its name decides whether the definition computes, and it may know where
            measured choices are kept.
        device: where the layers run.
        settings: `convolutions=auto` times each layer beside the float one.
        inputs: shape [B, C, *size] of what each convolution gets in this run, by name; one that is missing is
            not timed.
    """

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        settings: Int8Settings,
        inputs: Mapping[str, Sequence[int]],
    ):
        self.inputs = inputs
        self.made: dict[str, Int8Conv] = {}
        self.matrices: dict[tuple[int, bool], Tensor | None] = {}  # of rotations, which many layers share
        is_timed = settings.convolutions == AUTO
        self.asked, self.device, self.is_timed = backend.name, device, is_timed
        instructions = getattr(backend, "instructions", AUTO)
        self.backend: ConvBackend | None = None  # chosen when the first convolution comes
        self.choose_backend = partial(choose_conv_backend, device, backend.name, instructions)
        self.rounds = int(getattr(backend, "rounds", DEFAULT_ROUNDS))
        table = getattr(backend, "table", None)
        self.table: Path | None = expand_path(table) if table else None
        self.caches: dict[torch.dtype, AutotuneCache] = {}

    def take_convolutions(
        self,
        model: nn.Module,
        layers: Iterable[tuple[LayerPlan, QuantizedLayer]],
        on_layer: Callable[[Int8Conv], object] | None = None,
    ) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
        """Bind the convolutions among some layers, into `made`, and yield the others.

        Args:
            model: the float model.
            layers: one at a time, so that the float weights are never in memory together.
            on_layer: called with each layer once it is made.
        """
        for plan, layer in layers:
            if plan.is_linear:
                yield plan, layer
                continue
            conv = get_layer(model, plan.name)
            assert not isinstance(conv, nn.Linear)
            self.made[plan.name] = self.bind(plan, layer, conv)
            if on_layer is not None:
                on_layer(self.made[plan.name])

    def bind(self, plan: LayerPlan, layer: QuantizedLayer, conv: nn.Conv2d | nn.Conv3d) -> Int8Conv:
        """The INT8 layer of one convolution; the plan gets what computes it, and why it is to stay float.

        Args:
            plan: of the convolution.
            layer: its integers.
            conv: the float one.
        """
        dtype = conv.weight.dtype
        input_shape = self.inputs.get(plan.name)
        if self.backend is None:
            self.backend = self.choose_backend()
        share_matrix(layer.transform, self.matrices)
        made = Int8Conv(layer, self.backend, conv, dtype).to(self.device)
        plan.backend_asked, plan.backend_used = self.asked, self.backend.name
        plan.instructions = find_instruction_set(self.backend)
        if self.asked not in ("auto", self.backend.name):
            # a backend of Linears has no convolutions; this is what stands for it
            plan.backend_asked = "auto"
        if self.is_timed and input_shape is not None:
            plan.speedup = self.measure_speedup(made, conv, tuple(input_shape))
            if plan.speedup * MIN_FLOAT_GAIN < 1:
                times = f"{1 / plan.speedup:.2f} times as fast"
                plan.float_reason = f"float is {times} as {plan.backend_used} for {list(input_shape)} here"
        return made

    def measure_speedup(
        self, layer: Int8Conv, conv: nn.Conv2d | nn.Conv3d, input_shape: tuple[int, ...]
    ) -> float:
        """Time of the float convolution over that of the INT8 one, measured once for each shape.

        Args:
            layer: the INT8 one.
            conv: the float one; its weight need not be in memory.
            input_shape: [B, C, *size].
        """
        dtype = layer.dtype
        if dtype not in self.caches:
            self.caches[dtype] = AutotuneCache(self.table, self.device, dtype)
        sizes = "x".join(map(str, input_shape))
        key = f"convolution {layer.geometry.label} padding {layer.geometry.padding} | {sizes} -> "
        key += f"{layer.out_features} | {layer.backend!r}"
        steps = describe_transform(layer.transform)
        if steps:
            key += f" | {steps}"
        known = parse_speedup(self.caches[dtype].get(key))
        if known is not None:
            return known
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(input_shape, generator=generator).to(self.device, dtype)
        float_seconds, int8_seconds = time_medians(
            [make_float_call(conv, layer, x), lambda: layer(x)], self.device, self.rounds
        )
        speedup = float_seconds / int8_seconds
        return parse_speedup(self.caches[dtype].put(key, f"{speedup:.4g}")) or speedup


def make_float_call(conv: nn.Conv2d | nn.Conv3d, layer: Int8Conv, x: Tensor) -> Callable[[], Tensor]:
    """One call of the float convolution, with random weights, as its own may not be in memory.

    Args:
        conv: its class decides what is computed.
        layer: has the sizes.
        x: its input.
    """
    convolve = nn.functional.conv2d if isinstance(conv, nn.Conv2d) else nn.functional.conv3d
    geometry = read_geometry(conv)
    weight = torch.randn(layer.weight_shape, device=x.device, dtype=x.dtype)
    bias = None if conv.bias is None else torch.zeros(layer.out_features, device=x.device, dtype=x.dtype)

    def run() -> Tensor:
        return convolve(
            x,
            weight,
            bias,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )

    return run


def parse_speedup(text: str | None) -> float | None:
    """A ratio out of the cache; a file that somebody edited may hold anything."""
    try:
        ratio = float(text or "")
    except ValueError:
        return None
    return ratio if 0 < ratio < float("inf") else None
