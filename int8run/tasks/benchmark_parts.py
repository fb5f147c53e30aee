"""Times of what `task=bench` measures beside Linears: convolutions and attentions, in float and in INT8.

`benchmark.py` hands over the shapes of a step. Ratios to float are kept where `int8.convolutions=auto` and
`int8.attention=auto` look for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from int8run.backends.attention import (
    AttentionBackend,
    ReferenceAttention,
    choose_attention_method,
    list_attention_backends,
)
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, LayerTimes, find_instruction_set
from int8run.backends.convolution import ConvBackend, choose_conv_backend, is_stopgap
from int8run.backends.float_comparison import compare_times
from int8run.backends.layer_timer import Attempt, LayerTimer
from int8run.backends.run_errors import find_run_failure
from int8run.kernels.cpu.instructions import AUTO
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.int8_conv import Int8Conv
from int8run.layers.int8_linear import QuantizedLayer
from int8run.models.attention_calls import compute_float_attention
from int8run.outlier.base import OutlierTransform
from int8run.ptq.attention import AttentionShape
from int8run.ptq.attention_check import find_attention_fault
from int8run.ptq.attention_speed import AttentionSpeed, draw_attention_call
from int8run.ptq.convolutions import draw_tensor, make_float_call
from int8run.ptq.layer_costs import describe_convolution
from int8run.quant.weight import quantize_weight
from int8run.report.console import Progress
from int8run.tasks.benchmark_shapes import ConvShape, StepShapes
from int8run.tasks.benchmark_table import TimedParts
from int8run.utils.dtypes import FLOAT_DTYPES


@dataclass(frozen=True)
class PartTimer:
    """Times convolutions and attentions on one device.

    Args:
        asked: `backend=` of the config.
        timer: has device, dtype of the model and number of rounds.
        cache: keeps the ratios to float.
        float_attention: `attention=` of the config, which the float model computes with.
        left_out: why something could not run, by what it is; filled while it measures.
    """

    asked: Backend
    timer: LayerTimer
    cache: AutotuneCache
    float_attention: str
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it measures."""
        return self.timer.device

    @property
    def dtype_name(self) -> str:
        """Of the float model."""
        return str(self.timer.dtype).removeprefix("torch.")

    def measure(self, shapes: StepShapes, progress: Progress) -> list[TimedParts]:
        """Time all convolutions and attentions of a step; nothing for what it has none of.

        Args:
            shapes: of the step.
            progress: shows the shapes.
        """
        parts = []
        conv_backend = self.choose_conv_backend() if shapes.convolutions else None
        attention_backends = self.list_attention_backends() if shapes.attentions else []
        count = len(shapes.convolutions) + len(shapes.attentions)
        with progress.track_loop("Timing convolutions and attentions", count) as advance:
            convolutions = TimedParts("convolutions")
            for shape, number in sorted(shapes.convolutions.items(), key=str):
                convolutions.add(str(shape), number, self.time_convolution(shape, conv_backend))
                advance(1)
            attentions = TimedParts("attention")
            for shape_of_call, number in sorted(shapes.attentions.items(), key=str):
                times = self.time_attention(shape_of_call, attention_backends)
                attentions.add(format_attention(shape_of_call), number, times)
                advance(1)
        if conv_backend is not None:
            convolutions.instructions[conv_backend.name] = find_instruction_set(conv_backend)
        for backend in attention_backends:
            attentions.instructions[backend.name] = backend.instruction_set
        for part in (convolutions, attentions):
            if part.counts:
                parts.append(part)
        return parts

    def choose_conv_backend(self) -> ConvBackend | None:
        """What computes INT8 convolutions here; None: only the definition, and nobody asked for it."""
        instructions = getattr(self.asked, "instructions", AUTO)
        chosen = choose_conv_backend(self.device, self.asked.name, instructions)
        if is_stopgap(chosen, self.asked.name):
            self.left_out["INT8 convolutions"] = f"only the slow definition computes them on {self.device}"
            return None
        return chosen

    def list_attention_backends(self) -> list[AttentionBackend]:
        """What can compute INT8 attention here; the definition only where it is asked for."""
        usable = []
        for backend in list_attention_backends(self.asked, self.device):
            if not isinstance(backend, ReferenceAttention) or self.asked.name == backend.name:
                usable.append(backend)
        if not usable:
            self.left_out["INT8 attention"] = f"only the slow definition computes it on {self.device}"
        return usable

    def time_convolution(self, shape: ConvShape, backend: ConvBackend | None) -> LayerTimes:
        """Time one convolution in every float dtype and in INT8.

        Args:
            shape: of the convolution.
            backend: computes it in INT8; None: nothing does.
        """
        conv = shape.build()
        calls: dict[str, Callable[[], object]] = {}
        for name in FLOAT_DTYPES:
            x = draw_tensor(shape.input_shape, self.device, getattr(torch, name))
            calls[name] = make_float_call(conv, tuple(conv.weight.shape), x)
        layer: Int8Conv | None = None
        if backend is not None:
            weight = draw_tensor((shape.out_channels, conv.weight[0].numel()), self.device, torch.float32)
            bias = torch.zeros(shape.out_channels, device=self.device) if shape.has_bias else None
            quantized = QuantizedLayer(quantize_weight(weight), OutlierTransform(), bias)
            layer = Int8Conv(quantized, backend, conv, self.timer.dtype).to(self.device)
            calls[backend.name] = partial(
                layer, draw_tensor(shape.input_shape, self.device, self.timer.dtype)
            )
        times = self.time_calls(calls, "convolution")
        if layer is not None:
            self.keep_ratio(describe_convolution(layer, shape.input_shape), times, layer.backend.name)
        return times

    def time_attention(self, shape: AttentionShape, backends: list[AttentionBackend]) -> LayerTimes:
        """Time one attention in every float dtype and on every INT8 backend.

        Args:
            shape: of the call.
            backends: compute it in INT8.
        """
        calls: dict[str, Callable[[], object]] = {}
        for name in FLOAT_DTYPES:
            call = draw_attention_call(shape, self.device, getattr(torch, name))
            calls[name] = partial(compute_float_attention, call, self.float_attention)
        widths = (shape.width, shape.value_width)
        layers: dict[str, Int8Attention] = {}
        call = draw_attention_call(shape, self.device, self.timer.dtype)
        for backend in backends:
            fault = backend.unsupported_width_reason(*widths)
            fault = fault or find_attention_fault(backend, [widths], self.device, self.timer.dtype)
            if fault is not None:
                self.left_out[f"attention on {backend.name}"] = fault
                continue
            layers[backend.name] = Int8Attention(backend, choose_attention_method(shape.width))
            calls[backend.name] = partial(layers[backend.name].attend, call)
        times = self.time_calls(calls, "attention")
        speed = AttentionSpeed(self.cache, self.device, self.timer.dtype, self.float_attention)
        for name, layer in layers.items():
            self.keep_ratio(speed.build_key(shape, layer), times, name)
        return times

    @torch.no_grad()
    def time_calls(self, calls: Mapping[str, Callable[[], object]], what: str) -> LayerTimes:
        """Time calls that take turns; those that cannot run are noted.

        Args:
            calls: by the name that they have in the result.
            what: they compute, for the note.
        """
        attempts = {}
        for name, call in calls.items():
            attempts[name] = Attempt(run=call, failure=find_run_failure(call, self.device))
        times = self.timer.time_attempts(attempts)
        for name, failure in times.failures.items():
            self.left_out[f"{what} in {name}"] = failure
        return times

    def keep_ratio(self, key: str, times: LayerTimes, name: str) -> None:
        """Keep how fast INT8 is beside the model's dtype, where the times can be trusted.

        Args:
            key: where `auto` looks for it.
            times: of one shape.
            name: of the INT8 backend.
        """
        seconds = times.seconds
        if not times.is_steady or name not in seconds or self.dtype_name not in seconds:
            return
        found = compare_times(seconds[self.dtype_name], seconds[name], times.find_shortest(name))
        self.cache.put(key, found.format())


def format_attention(shape: AttentionShape) -> str:
    """`24 heads of 128, 4608×4608`, with what a mask or causality adds."""
    heads = str(shape.heads)
    if shape.kv_heads != shape.heads:
        heads += f" on {shape.kv_heads}"
    text = f"{shape.batch}×{heads} heads of {shape.width}, {shape.queries}×{shape.keys}"
    if shape.is_causal:
        text += " causal"
    if shape.mask:
        text += " masked"
    return text
