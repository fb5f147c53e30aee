"""How large the changes of a LoRA are, measured on the INT8 layers: a warning where they break images.

`LoraStack.attach` measures each change, a run warns of the strengths that it uses.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from int8run.layers.int8_linear import Int8Linear

# Share of a weight beyond which a change breaks images. Measured with `ink` on the shipped tiny model, six
# prompts: at 58 % (strength 1) all images are whole, at 87 % (1.5) their outlines dissolve, at 115 % (2)
# nothing can be recognized any more.
LARGE_SHARE = 0.7


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


def describe_large_change(name: str, strength: float, sizes: Sequence[ChangeSize]) -> str | None:
    """A warning where a LoRA changes the model so much that images break; None: it does not.

    Args:
        name: of the LoRA.
        strength: at which it is used.
        sizes: of its changes at strength 1, one for each INT8 layer.
    """
    share_at_1 = statistics.median(size.share for size in sizes)
    share = abs(strength) * share_at_1
    if share <= LARGE_SHARE:
        return None
    percent, limit = f"{share:.0%}", f"{LARGE_SHARE:.0%}"
    largest_strength = LARGE_SHARE / share_at_1
    return (
        f"LoRA {name!r} at strength {strength:g} changes the model's weights by {percent} of their own size "
        f"(median of the INT8 layers); most LoRAs change them by a few percent, beyond {limit} images break: "
        f"take a strength of at most {largest_strength:.2g}"
    )
