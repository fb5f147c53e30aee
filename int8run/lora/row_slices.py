"""Rows of modules' weights that one name of a LoRA file stands for, and how its matrix is cut for them.

`module_names` finds the rows behind each name. Nothing here knows names, files or adapters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModuleTarget:
    """A module that rows of a file's matrix belong to; halves are swapped after the rows are taken.

    Args:
        module: the module's name in the model.
        source_rows: rows of the file's matrix; None: all.
        start: the first row that they change in the module's weight; None: they are the whole weight.
        total: rows of the module's weight, where `start` is given.
        swap_halves: the two halves of the rows change places.
    """

    module: str
    source_rows: slice | None = None
    start: int | None = None
    total: int | None = None
    swap_halves: bool = False


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows of a module's weight.

    Args:
        module: the module's name in the model.
        start: the first of the rows.
        count: how many.
        total: rows of the whole weight.
        is_swapped: the file has their halves the other way round.
    """

    module: str
    start: int
    count: int
    total: int
    is_swapped: bool = False

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.start + self.count

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the weight."""
        return self.count == self.total


# what one name in a file stands for: the matrix of that name holds these rows, one slice after the other
RowSlices = tuple[RowSlice, ...]


ModuleTargets = tuple[ModuleTarget, ...]


def count_source_rows(targets: Sequence[ModuleTarget]) -> int | None:
    """How many rows a file's matrix must have to be cut for these targets; None: it is not cut."""
    last_rows = targets[-1].source_rows
    return None if last_rows is None else last_rows.stop


def cut_rows(rows: RowSlice, index: int, count: int) -> RowSlice:
    """One of several equal parts of consecutive rows."""
    size = rows.count // count
    return replace(rows, start=rows.start + index * size, count=size)


def merge_neighbors(slices: Iterable[RowSlice]) -> RowSlices:
    """The same rows, with neighbors in one module merged."""
    merged: list[RowSlice] = []
    for rows in slices:
        before = merged[-1] if merged else None
        if before is not None and are_neighbors(before, rows):
            merged[-1] = replace(before, count=before.count + rows.count)
        else:
            merged.append(rows)
    return tuple(merged)


def are_neighbors(first: RowSlice, second: RowSlice) -> bool:
    """Whether the second slice goes on where the first ends."""
    is_same_kind = first.module == second.module and first.is_swapped == second.is_swapped
    return is_same_kind and first.end == second.start


def to_targets(slices: Sequence[RowSlice]) -> ModuleTargets:
    """The targets of a matrix that holds these rows one after the other."""
    is_cut = len(slices) > 1
    targets: list[ModuleTarget] = []
    first = 0  # row of the file's matrix
    for rows in slices:
        target = ModuleTarget(module=rows.module, swap_halves=rows.is_swapped)
        if is_cut:
            target = replace(target, source_rows=slice(first, first + rows.count))
        if not rows.is_whole:
            target = replace(target, start=rows.start, total=rows.total)
        targets.append(target)
        first += rows.count
    return tuple(targets)
