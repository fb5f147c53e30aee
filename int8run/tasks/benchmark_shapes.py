"""Which shapes `task=bench` times: those of the Linears, convolutions and attentions in one step of a model.

Of the model only what never becomes INT8 is read: layers and attentions are answered by zeros.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from int8run.backends.base import Shape
from int8run.backends.convolution import ConvGeometry, read_geometry
from int8run.generate.capture import capture_step
from int8run.generate.capture_attention import answered_by_zeros, watch_attention
from int8run.generate.prompts import Sample, split_batches
from int8run.layers.int8_conv import CONV_CLASSES, get_layer
from int8run.layers.plan import CONV, LayerPlan
from int8run.models.dual_denoisers import split_denoiser
from int8run.pipeline.loaded_model import LoadedModel, make_skip_rule, replace_missing_layers
from int8run.pipeline.trace_layers import trace_layers
from int8run.ptq.attention import AttentionShape, TracedAttentions, plan_traced


class ConvShape(NamedTuple):
    """What the time of a convolution depends on.

    Args:
        input_shape: [B, C, *size].
        out_channels: N.
        geometry: kernel, stride, padding and groups.
        has_bias: whether it adds one.
    """

    input_shape: tuple[int, ...]
    out_channels: int
    geometry: ConvGeometry
    has_bias: bool

    def __str__(self) -> str:
        """`2×320×64×64→320 3x3 stride 1`."""
        sizes = "×".join(map(str, self.input_shape))
        return f"{sizes}→{self.out_channels} {self.geometry.label}"

    def build(self) -> nn.Conv2d | nn.Conv3d:
        """A convolution of this shape without weights."""
        conv_class = CONV_CLASSES[len(self.geometry.kernel) - 2]
        with torch.device("meta"):
            conv: nn.Conv2d | nn.Conv3d = conv_class(
                self.input_shape[1],
                self.out_channels,
                self.geometry.kernel,  # type: ignore[arg-type]
                stride=self.geometry.stride,  # type: ignore[arg-type]
                padding=self.geometry.padding,  # type: ignore[arg-type]
                groups=self.geometry.groups,
                bias=self.has_bias,
            )
        return conv


@dataclass(frozen=True)
class StepShapes:
    """How often each shape occurs in one step of a denoiser.

    Args:
        linears: rows, in_features and out_features of those that become INT8.
        convolutions: of those that `int8.convolutions=int8` makes INT8.
        attentions: of the calls that `int8.attention=int8` makes INT8.
    """

    linears: Counter[Shape]
    convolutions: Counter[ConvShape] = field(default_factory=Counter)
    attentions: Counter[AttentionShape] = field(default_factory=Counter)


def trace_shapes(samples: Sequence[Sample], loaded: LoadedModel, plans: Sequence[LayerPlan]) -> StepShapes:
    """Count the shapes in one step.

    Args:
        samples: what a run would generate; its first batch decides the number of rows.
        loaded: the model; the weights of these layers may be missing.
        plans: of the Linears and convolutions that become INT8.
    """
    loaded.fill_weights(except_for=[plan.name for plan in plans])
    denoiser = replace_missing_layers(loaded.denoiser)
    batch = split_batches(samples, loaded.sampling.batch)[0]
    seen = TracedAttentions()
    with answered_by_zeros(split_denoiser(denoiser).values()):
        calls = capture_step(loaded.pipe, loaded.component, denoiser, batch, loaded.sampling)
        traced = trace_layers(denoiser, plans, calls)
        with watch_attention(denoiser, seen.note_call, seen.note_softmax):
            for call in calls:
                denoiser(**call)
    linears: Counter[Shape] = Counter()
    convolutions: Counter[ConvShape] = Counter()
    for plan in plans:
        if plan.kind != CONV:
            linears[traced.rows[plan.name], plan.in_features, plan.out_features] += 1
        elif plan.name in traced.conv_inputs:
            conv = get_layer(loaded.denoiser, plan.name)
            assert not isinstance(conv, nn.Linear)
            shape = ConvShape(
                input_shape=traced.conv_inputs[plan.name],
                out_channels=conv.out_channels,
                geometry=read_geometry(conv),
                has_bias=conv.bias is not None,
            )
            convolutions[shape] += 1
    return StepShapes(linears, convolutions, count_attentions(seen, loaded))


def count_attentions(seen: TracedAttentions, loaded: LoadedModel) -> Counter[AttentionShape]:
    """The calls of the attentions that can be INT8.

    Args:
        seen: what one step showed.
        loaded: the model, whose family may keep some float.
    """
    counts: Counter[AttentionShape] = Counter()
    for planned in plan_traced(seen, make_skip_rule(loaded.family, loaded.denoiser)):
        if planned.plan.skip_reason is None:
            counts += seen.traces[planned.plan.name].shapes
    return counts
