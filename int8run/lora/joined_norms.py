"""Reads the norms of DoRAs whose matrix a model has in several modules, where all the weights are at hand."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.joined_columns import JoinedColumns
from int8run.lora.adapters.row_selection import SelectedRows
from int8run.lora.apply import IndexedChanges, get_weight_deltas


def read_joined_norms(
    changes: Mapping[str, IndexedChanges], read_weight: Callable[[str], Tensor | None]
) -> None:
    """Compute the norms of one model that are not known yet, as far as its weights can be read.

    Args:
        changes: module -> what LoRAs do to it.
        read_weight: the weight of a module without any LoRA; None where it is not in memory.
    """
    for joined in iter_joined_columns(changes):
        if joined.norms is not None:
            continue
        weights: dict[str, Tensor] = {}
        for module in joined.modules:
            weight = read_weight(module)
            if weight is not None:
                weights[module] = weight
        if len(weights) == len(joined.modules):
            joined.read(weights.__getitem__)


def iter_joined_columns(changes: Mapping[str, IndexedChanges]) -> Iterator[JoinedColumns]:
    """What the column norms of DoRAs run over, for each module that has one."""
    for module_changes in changes.values():
        for _, delta in get_weight_deltas(module_changes):
            while isinstance(delta, SelectedRows):
                delta = delta.inner
            if isinstance(delta, DoRA) and delta.joined is not None:
                yield delta.joined
