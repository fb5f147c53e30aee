"""How large the changes of LoRAs are, measured on the INT8 layers: a warning where they break images.

`LoraStack.attach` records each change, a run warns of the strengths that it uses.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from int8run.layers.int8_conv import Int8Layer
from int8run.lora.apply import IndexedChanges

# Share of a weight beyond which a change breaks images. Measured with `ink` on the shipped tiny model, six
# prompts: at 58 % (strength 1) all images are whole, at 87 % (1.5) their outlines dissolve, at 115 % (2)
# nothing can be recognized any more.
LARGE_SHARE = 0.7
# The same up to the strength for which a LoRA was made: what it changes there is meant. The shipped `edit`
# changes three quarters of the weights at strength 1, and its images are whole.
LARGE_SHARE_AS_MADE = 1.0
MADE_FOR_STRENGTH = 1.0
TINY_SHARE = 1e-9  # of a LoRA that changes nothing


@dataclass(frozen=True)
class ChangeSize:
    """The size of a change of one INT8 layer at strength 1.

    Args:
        steps: its RMS, in steps of the layer's grid.
        share: its norm over the norm of the weight.
    """

    steps: float
    share: float


def measure_change(delta: Tensor, weight: Tensor, layer: Int8Layer) -> ChangeSize:
    """The size of a change.

    Args:
        delta: [N, K], at strength 1.
        weight: [N, K], what it changes.
        layer: made from the weight.
    """
    rms = layer.transform.transform_weight(delta.float().flatten(1)).square().mean().sqrt()
    return ChangeSize(
        steps=(rms / layer.scale.mean()).item(),
        share=(delta.norm() / weight.float().norm()).item(),
    )


@dataclass(frozen=True)
class ChangeSizes:
    """The sizes of the changes that the LoRAs of a stack make.

    Args:
        by_lora: index of the LoRA -> one for each INT8 layer that it changes.
    """

    by_lora: dict[int, list[ChangeSize]] = field(default_factory=dict)

    def record(self, layer: Int8Layer, changes: IndexedChanges, read_weight: Callable[[], Tensor]) -> None:
        """Measure the changes of one INT8 layer's weight.

        Args:
            layer: made from the weight.
            changes: of the layer, by index of the LoRA.
            read_weight: gives the weight without any LoRA, [N, K].
        """
        for index, change in changes:
            if change.weight_delta is not None:
                weight = read_weight()
                size = measure_change(change.weight_delta.compute_delta(weight), weight, layer)
                self.by_lora.setdefault(index, []).append(size)

    def compute_median_steps(self, index: int) -> float | None:
        """The typical size of a LoRA's changes in steps of the layers' grids; None: no INT8 layer has it."""
        if index not in self.by_lora:
            return None
        return statistics.median(size.steps for size in self.by_lora[index])

    def list_large_changes(self, names: Sequence[str], strengths: Sequence[float]) -> list[str]:
        """A warning for each LoRA that changes the INT8 layers so much that images break.

        Args:
            names: of the LoRAs.
            strengths: at which they are used, one for each.
        """
        warnings = []
        for index, sizes in sorted(self.by_lora.items()):
            warning = describe_large_change(names[index], strengths[index], sizes)
            if warning is not None:
                warnings.append(warning)
        return warnings


def find_largest_strength(share_at_1: float) -> float:
    """The largest strength of which nothing is said.

    Args:
        share_at_1: of the weights that the LoRA changes at strength 1.
    """
    if share_at_1 <= LARGE_SHARE:
        return LARGE_SHARE / max(share_at_1, TINY_SHARE)
    return min(MADE_FOR_STRENGTH, LARGE_SHARE_AS_MADE / share_at_1)


def describe_large_change(name: str, strength: float, sizes: Sequence[ChangeSize]) -> str | None:
    """A warning where a LoRA changes the model so much that images break; None: it does not.

    Args:
        name: of the LoRA.
        strength: at which it is used.
        sizes: of its changes at strength 1, one for each INT8 layer.
    """
    share_at_1 = statistics.median(size.share for size in sizes)
    share = abs(strength) * share_at_1
    largest_strength = find_largest_strength(share_at_1)
    if abs(strength) <= largest_strength:
        return None
    percent, limit = f"{share:.0%}", f"{largest_strength * share_at_1:.0%}"
    return (
        f"LoRA {name!r} at strength {strength:g} changes the model's weights by {percent} of their own size "
        f"(median of the INT8 layers); most LoRAs change them by a few percent, beyond {limit} images break: "
        f"take a strength of at most {largest_strength:.2g}"
    )
