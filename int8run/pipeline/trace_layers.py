"""What the layers of a denoiser get in one step: how many rows, and of convolutions which shape.

`add_int8` asks before it quantizes, because backends are chosen by shape, and `task=bench` before it times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from int8run.generate.capture import capture_layers, check_finite
from int8run.layers.plan import CONV, LayerPlan
from int8run.pipeline.loaded_model import computes_values


@dataclass(frozen=True)
class TracedLayers:
    """What the layers of a denoiser get in one step.

    Args:
        rows: of each layer, by name; of a convolution its output pixels.
        conv_inputs: shape of what each convolution gets, [B, C, *size]; of those that a call reaches.
    """

    rows: Mapping[str, int]
    conv_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def trace_layers(
    denoiser: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Mapping[str, Any]]
) -> TracedLayers:
    """What each planned layer gets in the last call that reaches it; one row where no call does.

    Args:
        denoiser: the float model, or a copy with layers whose weights are not read.
        plans: of the layers.
        calls: arguments of the denoiser.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    rows = {plan.name: 1 for plan in plans}
    conv_inputs: dict[str, tuple[int, ...]] = {}
    convolutions = {plan.name: plan for plan in plans if plan.kind == CONV}
    has_values = computes_values(denoiser)

    def count_rows(name: str, x: Tensor, y: Tensor) -> None:
        if name in convolutions:
            conv_inputs[name] = tuple(x.shape)
            rows[name] = y.numel() // convolutions[name].out_features  # [B, N, *size] -> M
        else:
            rows[name] = x.numel() // x.shape[-1]  # [..., K] -> M
        if has_values:
            check_finite(name, x, "the first step")

    for call in calls:
        capture_layers(denoiser, call, list(rows), count_rows)
    return TracedLayers(rows, conv_inputs)
