"""Which mode brings the LoRAs to an INT8 layer: `dynamic`, `bake` or `stochastic`.

`LoraStack.attach` asks for every layer; with `lora.mode=auto` the answer may differ from layer to layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from int8run.errors import LoraError
from int8run.layers.int8_conv import Int8Layer
from int8run.lora.apply import IndexedBranches, IndexedChanges, get_weight_deltas

# (layer's name, layer, total rank) -> time of the layer with such a branch over its time without
Overhead = Callable[[str, Int8Layer, int], float]


@dataclass(frozen=True)
class ModeChoice:
    """The mode of one layer.

    Args:
        mode: `dynamic`, `bake` or `stochastic`.
        reason: why it is not dynamic, where that was a choice.
        branches: of a dynamic layer.
    """

    mode: str
    reason: str = ""
    branches: IndexedBranches = ()


@dataclass(frozen=True)
class ModeChooser:
    """Chooses the mode of each INT8 layer.

    Args:
        mode: what was asked for: `auto`, `dynamic`, `bake` or `stochastic`.
        has_float_weights: the weights that the layers were quantized from are in memory.
        is_scheduled: strengths change from step to step, which only dynamic layers can follow.
        overhead: what a branch costs, asked with `auto`; None: any cost is accepted.
        max_overhead: share of a layer's time that a branch may cost.
    """

    mode: str
    has_float_weights: bool
    is_scheduled: bool
    overhead: Overhead | None
    max_overhead: float

    def choose(
        self, name: str, layer: Int8Layer, changes: IndexedChanges, read_weight: Callable[[], Tensor]
    ) -> ModeChoice:
        """Choose the mode of one layer.

        Args:
            name: of the layer.
            layer: the one to be changed.
            changes: what the LoRAs do to it.
            read_weight: its weight without any LoRA.

        Raises:
            LoraError: when the mode that was asked for is not possible.
        """
        if self.mode == "bake" and not self.has_float_weights:
            raise LoraError(
                f"lora.mode=bake needs the float weight of {name}, and there is none for a checkpoint or a "
                "model that was quantized before; set lora.mode=dynamic, stochastic or auto"
            )
        if self.mode in ("bake", "stochastic"):
            return ModeChoice(self.mode)

        obstacle = find_branch_obstacle(changes)
        if obstacle is not None:
            self.check_need_not_be_dynamic(name, obstacle)
            return ModeChoice(self.merging_mode, reason=obstacle)

        branches = make_branches(changes, read_weight)
        cost_obstacle = self.find_cost_obstacle(name, layer, sum_ranks(branches))
        if cost_obstacle is not None:
            return ModeChoice(self.merging_mode, reason=cost_obstacle)
        return ModeChoice("dynamic", branches=branches)

    @property
    def merging_mode(self) -> str:
        """The mode of a layer that is not dynamic."""
        return "bake" if self.has_float_weights else "stochastic"

    def check_need_not_be_dynamic(self, name: str, obstacle: str) -> None:
        """Check that a layer whose changes cannot be branches need not have them as such.

        Raises:
            LoraError: when dynamic layers were asked for, or strengths change from step to step.
        """
        if self.mode == "dynamic":
            needed = "lora.mode=dynamic"
        elif self.is_scheduled:
            needed = "a schedule of strengths needs lora.mode=dynamic, which"
        else:
            return
        raise LoraError(
            f"{name}: {needed} is not possible: {obstacle}; set lora.mode=auto and one strength for all steps"
        )

    def find_cost_obstacle(self, name: str, layer: Int8Layer, rank: int) -> str | None:
        """Why a branch of this rank is too slow for `auto`; None: it is not, or the mode must be dynamic."""
        has_choice = self.mode == "auto" and not self.is_scheduled
        if not has_choice or not rank:
            return None
        if rank >= min(layer.in_features, layer.out_features):
            return f"a branch of rank {rank} would be more work than the layer"
        if self.overhead is None or self.overhead(name, layer, rank) <= 1 + self.max_overhead:
            return None
        limit = f"lora.max_overhead={self.max_overhead:g}"
        return f"a branch of rank {rank} would take more than {limit} of a layer's time"


def find_branch_obstacle(changes: IndexedChanges) -> str | None:
    """Why the changes of a layer cannot all be branches beside it; None: they can."""
    for _, delta in get_weight_deltas(changes):
        if not delta.has_branch:
            return f"a {delta.adapter_type} that has no low-rank form"
    return None


def make_branches(changes: IndexedChanges, read_weight: Callable[[], Tensor]) -> IndexedBranches:
    """The branch of each change of the weight; all of them have one.

    Args:
        changes: of one layer.
        read_weight: the layer's float weight, asked only for adapter types that need it (DoRA, IA3).
    """
    branches = []
    for index, delta in get_weight_deltas(changes):
        weight = read_weight() if delta.needs_weight else None
        branch = delta.make_branch(weight)
        assert branch is not None, delta.adapter_type
        branches.append((index, branch))
    return branches


def sum_ranks(branches: IndexedBranches) -> int:
    """The rank of all branches together."""
    return sum(branch.lora_A.shape[0] for _, branch in branches if branch.lora_A is not None)
