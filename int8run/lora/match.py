"""Where the changes of LoRA files land in a model: every name looked up, every shape checked, nothing changed yet."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.key_parsing import DENOISER, parse_key
from int8run.lora.load import LoraFile
from int8run.lora.module_names import ModuleTarget, NameTable, count_source_rows, get_weight_shape
from int8run.models.dual_denoisers import split_denoiser

log = logging.getLogger(__name__)
# components that are one of two denoisers
EXPERTS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Matches:
    """Per component and module, which LoRA of the stack brings which change; and what found no place."""

    by_component: Mapping[str, Mapping[str, Sequence[tuple[int, LoraChange]]]]
    unmatched: Sequence[tuple[int, str, str]]  # LoRA, key or module name, reason

    @property
    def denoiser(self) -> Mapping[str, Sequence[tuple[int, LoraChange]]]:
        """Changes of the denoiser's modules."""
        return self.by_component.get(DENOISER, {})

    @property
    def n_matched(self) -> int:
        """Pairs of a LoRA and a module that it changes."""
        return sum(len(entries) for modules in self.by_component.values() for entries in modules.values())


@dataclass(frozen=True)
class MatchRequest:
    """One LoRA of a stack, as far as matching asks."""

    file: LoraFile
    components: Sequence[str] | None = None  # None: all that the file has

    def includes(self, component: str) -> bool:
        """Whether a part of the file is to be applied."""
        return (
            self.components is None
            or component in self.components
            or (component == DENOISER and bool(self.experts))
        )

    @property
    def experts(self) -> list[str]:
        """Of two denoisers, those that it is for; none named: both."""
        return [c for c in self.components or () if c in EXPERTS]


class ComponentNames:
    """The names of a part's modules in files; the denoisers of one pipeline have the same names, and a name means all of them."""

    def __init__(self, part: nn.Module):
        self.by_prefix = {
            prefix: NameTable.from_model(module) for prefix, module in split_denoiser(part).items()
        }

    def find_all_targets(
        self, names: Iterable[str], experts: Sequence[str] = ()
    ) -> dict[str, tuple[ModuleTarget, ...] | None]:
        """The places of several names, see `NameTable.find`.

        Args:
            experts: of two denoisers, those that are meant; empty: both.
        """
        names = list(names)
        found: dict[str, tuple[ModuleTarget, ...] | None] = dict.fromkeys(names)
        for prefix, table in self.by_prefix.items():
            if not prefix or not experts or prefix.removesuffix(".") in experts:
                for name, places in table.find_all_targets(names).items():
                    if places:
                        found[name] = (
                            *(found[name] or ()),
                            *(replace(place, module=prefix + place.module) for place in places),
                        )
        return found


def match_loras(parts: Mapping[str, nn.Module], stack: Sequence[MatchRequest], strict: bool) -> Matches:
    """Find the module of every change and check the shapes.

    Args:
        parts: `denoiser`, and text encoders by their component's name.

    Raises:
        LoraError: no match at all, a wrong shape, or, when strict, any key without a place.
    """
    tables = {component: ComponentNames(module) for component, module in parts.items()}
    found: dict[str, dict[str, list[tuple[int, LoraChange]]]] = {component: {} for component in parts}
    unmatched: list[tuple[int, str, str]] = []
    for index, wanted in enumerate(stack):
        file = wanted.file
        for expert in wanted.experts:
            known = [prefix.removesuffix(".") for prefix in tables[DENOISER].by_prefix if prefix]
            if expert not in known:
                there = f"has {', '.join(known)}" if known else "has one denoiser: components=[denoiser]"
                raise LoraError(
                    f"{file.path.name}: components={list(wanted.components or ())} names {expert}, this model {there}"
                )
        has = set(file.changes) | {parse_key(key).component for key, _ in file.skipped_keys}
        if wanted.components is not None and not any(map(wanted.includes, has)):
            raise LoraError(
                f"{file.path.name}: components={list(wanted.components)} leaves nothing of it; it has {', '.join(sorted(has)) or 'none'}"
            )
        lost = [(key, why) for key, why in file.skipped_keys if wanted.includes(parse_key(key).component)]
        landed = 0
        for component, changes in file.changes.items():
            if not wanted.includes(component):
                continue
            places, missing = locate_changes(component, changes, parts, tables, wanted.experts)
            lost += missing
            for name, (target, spots) in places.items():
                landed += 1
                check_row_count(file, name, changes[name], spots)
                for spot in spots:
                    change = fit_to_target(file, changes[name], spot, parts[target])
                    found[target].setdefault(spot.module, []).append((index, change))
        report_unmatched(file, landed, lost, strict)
        unmatched += [(index, key, why) for key, why in lost]
    return Matches(found, unmatched)


def locate_changes(
    component: str,
    changes: Mapping[str, LoraChange],
    parts: Mapping[str, nn.Module],
    tables: Mapping[str, ComponentNames],
    experts: Sequence[str],
) -> tuple[dict[str, tuple[str, tuple[ModuleTarget, ...]]], list[tuple[str, str]]]:
    """The places of one component's changes: in the part of that name, for text encoders else in another one that has such modules.

    A file's `te2` is CLIP-G for some trainers and T5 for others; the names inside tell.
    """
    candidates = (
        [component]
        if component == DENOISER
        else [component, *(p for p in parts if p not in (component, DENOISER))]
    )
    places: dict[str, tuple[str, tuple[ModuleTarget, ...]]] = {}
    for candidate in candidates:
        if candidate in tables:
            spots = tables[candidate].find_all_targets(
                [name for name in changes if name not in places], experts
            )
            places |= {
                name: (candidate, found)
                for name, found in spots.items()
                if found
                and (candidate == component or has_matching_shapes(changes[name], found, parts[candidate]))
            }
    reason = (
        "no such module"
        if component in parts or (component != DENOISER and len(parts) > 1)
        else f"the model has no {component}"
    )
    return places, [
        (f"{component}: {name}" if component != DENOISER else name, reason)
        for name in changes
        if name not in places
    ]


def has_matching_shapes(change: LoraChange, spots: Sequence[ModuleTarget], part: nn.Module) -> bool:
    """Whether a change has the shapes of the modules at its places."""
    if not has_matching_row_count(change, spots):
        return False
    try:
        return all(
            slice_for_target(change, spot).shape_mismatch(get_weight_shape(part.get_submodule(spot.module)))
            is None
            for spot in spots
        )
    except LoraError:  # its rows cannot be cut that way
        return False


def has_matching_row_count(change: LoraChange, spots: Sequence[ModuleTarget]) -> bool:
    """Whether a matrix that is cut into parts has as many rows as the parts together."""
    wanted = count_source_rows(spots)
    return wanted is None or change.out_features is None or change.out_features == wanted


def check_row_count(file: LoraFile, name: str, change: LoraChange, spots: Sequence[ModuleTarget]) -> None:
    """Refuse a matrix that would lose rows when it is cut.

    Raises:
        LoraError: with both numbers.
    """
    if not has_matching_row_count(change, spots):
        modules = ", ".join(spot.module for spot in spots)
        raise LoraError(
            f"{file.path.name}: {name} has {change.out_features} rows, the model's {modules} have {count_source_rows(spots)} together; "
            "the LoRA was made for another base model"
        )


def fit_to_target(file: LoraFile, change: LoraChange, spot: ModuleTarget, part: nn.Module) -> LoraChange:
    """The part of a change that belongs to a place, its shape checked.

    Raises:
        LoraError: when it does not fit, with both shapes.
    """
    try:
        change = slice_for_target(change, spot)
    except LoraError as error:
        raise LoraError(f"{file.path.name}: {spot.module} {error}") from error
    if why := change.shape_mismatch(get_weight_shape(part.get_submodule(spot.module))):
        raise LoraError(f"{file.path.name}: {spot.module} {why}; the LoRA was made for another base model")
    return change


def slice_for_target(change: LoraChange, spot: ModuleTarget) -> LoraChange:
    """The part of a change that belongs to a place."""
    if spot.source_rows is not None:
        change = change.take_rows(spot.source_rows)
    if spot.swap_halves:
        change = change.swap_halves()
    if spot.start is not None and spot.total is not None:
        change = change.place_rows(spot.start, spot.total)
    return change


def report_unmatched(file: LoraFile, landed: int, lost: Sequence[tuple[str, str]], strict: bool) -> None:
    """Say what of a file found no place.

    Raises:
        LoraError: when nothing did, or, when strict, anything did not.
    """
    total = landed + len(lost)
    reasons = "; ".join(f"{n} × {why}" for why, n in Counter(why for _, why in lost).items())
    first = f" (first: {lost[0][0]})" if lost else ""
    if not landed:
        raise LoraError(
            f"{file.path.name}: none of its {total} modules and keys is in the model{first}{f': {reasons}' if reasons else ''}; "
            "the LoRA was made for another architecture, or its kind is not supported"
        )
    if lost and strict:
        raise LoraError(
            f"{file.path.name}: {len(lost)} of {total} modules and keys have no place in the model: {reasons}{first}; "
            "lora.strict=false applies the rest"
        )
    if lost:
        left_out = f"{len(lost)} of {total} modules and keys have no place in the model and are left out: {reasons}{first}"
        log.warning("%s: %s", file.path.name, left_out)
