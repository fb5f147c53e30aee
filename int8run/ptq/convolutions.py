"""Bind quantized convolutions to what computes them, and time them beside the float ones for `auto`.

They pass a `ConvolutionBinder` on their way to `quantize.build_int8_layers`, which binds the Linears. What is
measured is kept where `backend=auto` keeps what it measures of Linears.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from int8run.backends.auto import MIN_FLOAT_GAIN
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, find_instruction_set
from int8run.backends.convolution import ConvBackend, choose_conv_backend, read_geometry
from int8run.backends.run_errors import find_run_failure
from int8run.layers.int8_conv import Int8Conv, get_layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import AUTO, Int8Settings, LayerPlan
from int8run.ptq.layer_costs import describe_transform, parse_ratio
from int8run.ptq.quantize import share_matrix
from int8run.utils.paths import expand_path
from int8run.utils.timing import is_steady, time_in_turns

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
            self.compare_with_float(plan, made, conv, tuple(input_shape))
        return made

    def compare_with_float(
        self, plan: LayerPlan, layer: Int8Conv, conv: nn.Conv2d | nn.Conv3d, input_shape: tuple[int, ...]
    ) -> None:
        """Note in the plan how fast the INT8 convolution is, and why it is to stay float where it is slower.

        Args:
            plan: of the convolution, is changed.
            layer: the INT8 one.
            conv: the float one; its weight need not be in memory.
            input_shape: [B, C, *size].
        """
        key = self.build_key(layer, input_shape)
        plan.speedup = parse_ratio(self.get_cache(layer.dtype).get(key))
        if plan.speedup is None:
            x = draw_tensor(input_shape, self.device, layer.dtype)
            failure = find_run_failure(lambda: layer(x), self.device)
            if failure is not None:
                plan.float_reason = f"{plan.backend_used} cannot run it here: {failure}"
                log.warning("the INT8 convolution %s stays float: %s", plan.name, plan.float_reason)
                return
            plan.speedup = self.measure_speedup(key, layer, conv, x)
        if plan.speedup is not None and plan.speedup * MIN_FLOAT_GAIN < 1:
            times = f"{1 / plan.speedup:.2f} times as fast"
            plan.float_reason = f"float is {times} as {plan.backend_used} for {list(input_shape)} here"

    def get_cache(self, dtype: torch.dtype) -> AutotuneCache:
        """Where ratios to a float convolution in some dtype are kept."""
        if dtype not in self.caches:
            self.caches[dtype] = AutotuneCache(self.table, self.device, dtype)
        return self.caches[dtype]

    def build_key(self, layer: Int8Conv, input_shape: tuple[int, ...]) -> str:
        """The key of a convolution in the file of measured choices.

        Args:
            layer: the INT8 one.
            input_shape: [B, C, *size].
        """
        sizes = "x".join(map(str, input_shape))
        key = f"convolution {layer.geometry.label} padding {layer.geometry.padding} | {sizes} -> "
        key += f"{layer.out_features} | {layer.backend!r}"
        steps = describe_transform(layer.transform)
        return f"{key} | {steps}" if steps else key

    def measure_speedup(
        self, key: str, layer: Int8Conv, conv: nn.Conv2d | nn.Conv3d, x: Tensor
    ) -> float | None:
        """Time of the float convolution over that of the INT8 one; None where the times scatter.

        Args:
            key: of the convolution in the file of measured choices.
            layer: the INT8 one.
            conv: the float one; its weight need not be in memory.
            x: [B, C, *size].
        """
        calls = [make_float_call(conv, layer, x), lambda: layer(x)]
        float_seconds, int8_seconds = time_in_turns(calls, self.device, self.rounds)
        if not is_steady(float_seconds) or not is_steady(int8_seconds):
            # times of a busy machine take nothing out of INT8
            return None
        speedup = statistics.median(float_seconds) / statistics.median(int8_seconds)
        return parse_ratio(self.get_cache(layer.dtype).put(key, f"{speedup:.4g}")) or speedup


def draw_tensor(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers of a shape, the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)


def make_float_call(conv: nn.Conv2d | nn.Conv3d, layer: Int8Conv, x: Tensor) -> Callable[[], Tensor]:
    """One call of the float convolution, with random weights, as its own may not be in memory.

    Args:
        conv: its class decides what is computed.
        layer: has the sizes.
        x: its input.
    """
    convolve = nn.functional.conv2d if isinstance(conv, nn.Conv2d) else nn.functional.conv3d
    geometry = read_geometry(conv)
    weight = draw_tensor(tuple(layer.weight_shape), x.device, x.dtype)
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
