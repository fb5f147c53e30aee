"""How large the changes of a LoRA are, measured on the INT8 layers, for a line in the log."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from int8run.layers.int8_linear import Int8Linear

# share of a weight that a LoRA usually stays well below
LARGE_SHARE = 0.5


@dataclass(frozen=True)
class ChangeSize:
    """The size of a change of one INT8 layer at strength 1.

    Args:
        steps: its RMS, in steps of the layer's grid.
        share: its norm over the norm of the weight.
    """

    steps: float
    share: float


def measure_change(delta: Tensor, weight: Tensor, layer: Int8Linear) -> ChangeSize:
    """The size of a change.

    Args:
        delta: [N, K], at strength 1.
        weight: [N, K], what it changes.
        layer: made from the weight.
    """
    rms = layer.transform.transform_weight(delta.float()).square().mean().sqrt()
    return ChangeSize(
        steps=(rms / layer.scale.mean()).item(),
        share=(delta.norm() / weight.float().norm()).item(),
    )


def compute_median_steps(sizes: Sequence[ChangeSize]) -> float:
    """The typical size of the changes, in steps of the layers' grids."""
    return statistics.median(size.steps for size in sizes)


def format_sizes(name: str, sizes: Sequence[ChangeSize]) -> str:
    """A line for people.

    Args:
        name: of the LoRA.
        sizes: of its changes, one for each INT8 layer.
    """
    shares = [size.share for size in sizes]
    typical, largest = statistics.median(shares), max(shares)
    warning = ""
    if largest > LARGE_SHARE:
        warning = "; that is a lot: a few percent are usual, and beyond 50 % images often break"
    share = f"{typical:.1%} of their weights' size (median; at most {largest:.1%})"
    steps = f"{compute_median_steps(sizes):.2f} times what one integer stands for"
    return f"LoRA {name!r} at strength 1 changes its INT8 layers by {share}, {steps}{warning}"
