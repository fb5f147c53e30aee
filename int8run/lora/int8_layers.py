"""What brings the LoRAs of a stack to each INT8 layer, made by the mode that `modes.py` chooses for it.

`LoraStack.attach` calls it for one layer after the other. The layers themselves are changed by the objects
that are made here (`apply.py`), and not before their `attach`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from int8run.layers.int8_conv import Int8Layer
from int8run.lora.apply import BakedLayer, DynamicLayer, IndexedChanges, Int8LoraLayer, StochasticLayer
from int8run.lora.entries import Entry
from int8run.lora.merged_parameter import name_module
from int8run.lora.modes import ModeChoice, ModeChooser
from int8run.quant.rounding import AbsMax, Rounding

MODE_BY_CLASS: Mapping[type[Int8LoraLayer], str] = {
    DynamicLayer: "dynamic",
    BakedLayer: "bake",
    StochasticLayer: "stochastic",
}


@dataclass(frozen=True)
class Int8LayerMaker:
    """Makes what brings the LoRAs to the INT8 layers of one model.

    Args:
        chooser: of each layer's mode.
        entries: the LoRAs of the stack, in order.
        rounding: of baked weights, as asked for; None: absmax.
        seed: of the stochastic rounding.
        reasons: why layers do not get their LoRAs as was asked for -> how many; filled by `make`.
        choices: how each layer gets its LoRAs, by name; filled by `make`.
    """

    chooser: ModeChooser
    entries: Sequence[Entry]
    rounding: Rounding | None
    seed: int
    reasons: Counter[str] = field(default_factory=Counter)
    choices: dict[str, ModeChoice] = field(default_factory=dict)

    def make(
        self, name: str, layer: Int8Layer, changes: IndexedChanges, read_weight: Callable[[], Tensor]
    ) -> Int8LoraLayer:
        """Prepare one layer for its LoRAs; it is not changed yet.

        Args:
            name: of the layer.
            layer: the one to be changed.
            changes: what the LoRAs do to it.
            read_weight: its weight without any LoRA, [N, K].

        Raises:
            LoraError: when the layer cannot have the mode that was asked for.
        """
        choice = self.chooser.choose(name, layer, changes, read_weight)
        self.count_reasons(choice)
        self.choices[name] = ModeChoice(choice.mode, choice.reason)
        if choice.mode == "dynamic":
            with name_module(name):
                return DynamicLayer(layer, changes, choice.branches)
        if choice.mode == "bake":
            return BakedLayer(layer, changes, read_weight(), self.bake_rounding)
        files = [self.entries[index].file.identity for index, _ in changes]
        return StochasticLayer(layer, changes, read_weight, seed=(self.seed, name, "lora", *files))

    @property
    def bake_rounding(self) -> Rounding:
        """The rounding of baked weights: there are no activations to calibrate another one on."""
        if self.rounding is None or self.rounding.needs_calibration:
            return AbsMax()
        return self.rounding

    def count_reasons(self, choice: ModeChoice) -> None:
        """Count why a layer does not get its LoRAs as was asked for, with the mode that it gets."""
        if choice.reason:
            self.reasons[f"{choice.mode}: {choice.reason}"] += 1
        rounding = self.rounding
        if choice.mode == "bake" and rounding is not None and rounding.needs_calibration:
            used = self.bake_rounding.name
            self.reasons[f"bake: rounded by {used}, because {rounding.name} needs calibration"] += 1


def count_modes(layers: Mapping[str, Int8LoraLayer]) -> dict[str, int]:
    """How many layers get their LoRAs by each mode."""
    return dict(Counter(MODE_BY_CLASS[type(layer)] for layer in layers.values()))


def compute_clipped_share(layers: Mapping[str, Int8LoraLayer]) -> float:
    """Of the weights with stochastic rounding, the share that the old scales would have clipped."""
    num_weights, num_clipped = 0, 0.0
    for layer in layers.values():
        if isinstance(layer, StochasticLayer):
            size = layer.layer.in_features * layer.layer.out_features
            num_weights += size
            num_clipped += size * layer.clipped_share
    if not num_weights:
        return 0.0
    return num_clipped / num_weights
