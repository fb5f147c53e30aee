"""Fit one change of a LoRA file to the modules that its name stands for: rows are cut, shapes are checked.

`int8run.lora.match` has found the modules and calls this for each. A matrix that the file fuses (q, k and v
in one) is cut into one change a module; of a matrix that the model fuses only the meant rows change.
"""

from collections.abc import Sequence
from dataclasses import replace

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.joined_columns import JoinedColumns, JoinedPart
from int8run.lora.load import LoraFile
from int8run.lora.model_component import ModelComponent
from int8run.lora.row_slices import ModuleTarget, count_source_rows


def has_matching_shapes(
    change: LoraChange, targets: Sequence[ModuleTarget], component: ModelComponent
) -> bool:
    """Whether a change has the shapes of the modules that its name stands for."""
    if not has_matching_row_count(change, targets):
        return False
    for target in targets:
        try:
            part = slice_for_target(change, target)
        except LoraError:  # its rows cannot be cut that way
            return False
        if part.shape_mismatch(component.get_weight_shape(target)) is not None:
            return False
    return True


def has_matching_row_count(change: LoraChange, targets: Sequence[ModuleTarget]) -> bool:
    """Whether a matrix that is cut into parts has as many rows as the parts together."""
    needed_rows = count_source_rows(targets)
    if needed_rows is None or change.out_features is None:
        return True
    return change.out_features == needed_rows


def find_replaced_reason(
    change: LoraChange, targets: Sequence[ModuleTarget], component: ModelComponent
) -> str | None:
    """Why a change made for the usual class of a model does not fit this one; None where it fits, or should.

    Args:
        change: of the targets.
        targets: the modules that its name stands for.
        component: that they are in.
    """
    reasons = [component.find_replaced_reason(target.module) for target in targets]
    if None in reasons or has_matching_shapes(change, targets, component):
        return None
    return reasons[0]


def check_row_count(file: LoraFile, name: str, change: LoraChange, targets: Sequence[ModuleTarget]) -> None:
    """Check that a matrix does not lose rows when it is cut.

    Raises:
        LoraError: with both numbers.
    """
    if has_matching_row_count(change, targets):
        return
    modules = ", ".join(target.module for target in targets)
    raise LoraError(
        f"{file.title}: {name} has {change.out_features} rows, the model's {modules} have "
        f"{count_source_rows(targets)} together; the LoRA was made for another base model"
    )


def fit_to_target(
    file: LoraFile, change: LoraChange, target: ModuleTarget, component: ModelComponent
) -> LoraChange:
    """The part of a change that belongs to a target, with its shape checked.

    Raises:
        LoraError: when it does not fit, with both shapes.
    """
    where = f"{file.title}: {target.module}"
    try:
        change = slice_for_target(change, target)
    except LoraError as error:
        raise LoraError(f"{where} {error}") from error
    mismatch = change.shape_mismatch(component.get_weight_shape(target))
    if mismatch is not None:
        raise LoraError(f"{where} {mismatch}; the LoRA was made for another base model")
    return change


def join_columns(change: LoraChange, targets: Sequence[ModuleTarget]) -> LoraChange:
    """The change with what its norms of columns run over, where its matrix is cut into several modules.

    Args:
        change: of all targets.
        targets: of one denoiser or text encoder.

    Raises:
        LoraError: when its rows cannot be cut that way.
    """
    delta = change.weight_delta
    if not isinstance(delta, DoRA) or not delta.on_input or len(targets) < 2:
        return change
    parts: list[JoinedPart] = []
    for target in targets:
        inner = slice_for_target(LoraChange(delta.inner), target).weight_delta
        assert inner is not None
        parts.append(JoinedPart(target.module, inner, find_changed_rows(change, target)))
    return replace(change, weight_delta=replace(delta, joined=JoinedColumns(parts)))


def split_by_matrix(targets: Sequence[ModuleTarget]) -> list[list[ModuleTarget]]:
    """The targets by copy of the matrix: of two denoisers each has the whole of it."""
    groups: list[list[ModuleTarget]] = []
    for target in targets:
        is_first = target.source_rows is None or target.source_rows.start == 0
        if is_first or not groups:
            groups.append([])
        groups[-1].append(target)
    return groups


def find_changed_rows(change: LoraChange, target: ModuleTarget) -> range | None:
    """The rows of a target's weight that a change of a file reaches; None: all.

    Args:
        change: as the file has it.
        target: one of those that its name stands for.
    """
    if target.start is None:
        return None
    source = target.source_rows
    num_rows = change.out_features if source is None else source.stop - source.start
    if num_rows is None:
        return None
    return range(target.start, target.start + num_rows)


def slice_for_target(change: LoraChange, target: ModuleTarget) -> LoraChange:
    """The part of a change that belongs to a target.

    Raises:
        LoraError: when its rows cannot be cut that way.
    """
    if target.source_rows is not None:
        change = change.take_rows(target.source_rows)
    if target.swap_halves:
        change = change.swap_halves()
    if target.start is not None and target.total is not None:
        change = change.place_rows(target.start, target.total)
    return change
