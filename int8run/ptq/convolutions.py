"""Bind quantized convolutions to what computes them, and time them beside the float ones for `auto`.

They pass a `ConvolutionBinder` on their way to `quantize.build_int8_layers`, which binds the Linears. What is
measured is kept where `backend=auto` keeps what it measures of Linears.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from int8run.backends.autotune_cache import open_cache_of
from int8run.backends.base import Backend, find_instruction_set
from int8run.backends.convolution import ConvBackend, choose_conv_backend, is_stopgap, read_geometry
from int8run.backends.float_comparison import ROUNDS, FloatComparer
from int8run.layers.int8_conv import Int8Conv, get_layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import AUTO, Int8Settings, LayerPlan
from int8run.ptq.layer_costs import describe_convolution
from int8run.ptq.quantize import share_matrix

log = logging.getLogger(__name__)


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
        self.asked, self.device, self.is_timed = backend, device, is_timed
        instructions = getattr(backend, "instructions", AUTO)
        self.backend: ConvBackend | None = None  # chosen when the first convolution comes
        self.choose_backend = partial(choose_conv_backend, device, backend.name, instructions)
        self.rounds = int(getattr(backend, "rounds", ROUNDS))
        self.comparers: dict[torch.dtype, FloatComparer] = {}

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
        plan.backend_asked, plan.backend_used = self.asked.name, self.backend.name
        plan.instructions = find_instruction_set(self.backend)
        if self.asked.name not in ("auto", self.backend.name):
            # a backend of Linears has no convolutions; this is what stands for it
            plan.backend_asked = "auto"
        if self.is_timed and is_stopgap(self.backend, self.asked.name):
            plan.float_reason = f"only the slow definition computes INT8 convolutions on {self.device.type}"
        elif self.is_timed and input_shape is not None:
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
        key = describe_convolution(layer, input_shape)
        comparer = self.get_comparer(layer.dtype)
        found = comparer.look_up(key)
        if found is None:
            x = draw_tensor(input_shape, self.device, layer.dtype)
            in_float = make_float_call(conv, layer.weight_shape, x)
            found = comparer.measure(key, int8=partial(layer, x), in_float=in_float)
        plan.speedup = found.speedup
        plan.backends_left_out = found.not_measured
        reason = found.explain_float(plan.backend_used, f"for {list(input_shape)}")
        if reason:
            plan.float_reason = reason
        if found.failure is not None:
            log.warning("the INT8 convolution %s stays float: %s", plan.name, plan.float_reason)
        if found.not_measured:
            log.warning("the INT8 convolution %s: %s", plan.name, found.not_measured)

    def get_comparer(self, dtype: torch.dtype) -> FloatComparer:
        """What compares with float convolutions in some dtype."""
        if dtype not in self.comparers:
            cache = open_cache_of(self.asked, self.device, dtype)
            self.comparers[dtype] = FloatComparer(cache, self.device, self.rounds)
        return self.comparers[dtype]


def draw_tensor(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers of a shape, the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)


def make_float_call(
    conv: nn.Conv2d | nn.Conv3d, weight_shape: tuple[int, ...], x: Tensor
) -> Callable[[], Tensor]:
    """One call of the float convolution, with random weights, as its own may not be in memory.

    Args:
        conv: its class decides what is computed.
        weight_shape: [N, C / groups, *kernel].
        x: its input.
    """
    convolve = nn.functional.conv2d if isinstance(conv, nn.Conv2d) else nn.functional.conv3d
    geometry = read_geometry(conv)
    weight = draw_tensor(weight_shape, x.device, x.dtype)
    bias = None if conv.bias is None else torch.zeros(weight_shape[0], device=x.device, dtype=x.dtype)

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
