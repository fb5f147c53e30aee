"""Which module of a model each change of a stack of LoRA files belongs to.

Every name is looked up and every shape checked; the model is not changed yet. `LoraStack.match_entries` calls
`match_loras`, `int8run.lora.apply` then applies what was matched. How a change is cut to the shape of a
module is in `int8run.lora.fit_change`, how names are looked up in `int8run.lora.module_names`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.config import EXPERTS
from int8run.lora.file_match import FileMatch, NamedChange, describe_missing_module, report_unmatched
from int8run.lora.fit_change import (
    check_row_count,
    find_changed_rows,
    find_replaced_reason,
    fit_to_target,
    has_matching_shapes,
    join_columns,
    split_by_matrix,
)
from int8run.lora.key_groups import describe_copies
from int8run.lora.key_parsing import DENOISER, parse_key
from int8run.lora.load import LoraFile
from int8run.lora.model_component import ModelComponent
from int8run.lora.row_slices import ModuleTargets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matches:
    """What a stack changes in a model. A LoRA is meant by its index in the stack.

    Args:
        by_component: component -> module -> (index of the LoRA in the stack, its change).
        unmatched: (index of the LoRA, key or module name, reason) of everything that is not applied.
    """

    by_component: Mapping[str, Mapping[str, Sequence[tuple[int, LoraChange]]]]
    unmatched: Sequence[tuple[int, str, str]]

    @property
    def denoiser(self) -> Mapping[str, Sequence[tuple[int, LoraChange]]]:
        """Changes of the denoiser's modules."""
        return self.by_component.get(DENOISER, {})

    @property
    def n_matched(self) -> int:
        """Pairs of a LoRA and a module that it changes."""
        num_pairs = 0
        for modules in self.by_component.values():
            num_pairs += sum(len(changes) for changes in modules.values())
        return num_pairs

    def count_modules(self, index: int) -> dict[str, int]:
        """How many modules of each component a LoRA changes."""
        counts = {}
        for component, modules in self.by_component.items():
            counts[component] = 0
            for changes in modules.values():
                counts[component] += sum(changing == index for changing, _ in changes)
        return counts

    def count_unmatched(self, index: int) -> int:
        """How much of a LoRA is not applied."""
        return sum(lora == index for lora, _, _ in self.unmatched)

    def changes_text_encoder(self, index: int) -> bool:
        """Whether a LoRA changes a text encoder."""
        counts = self.count_modules(index)
        return any(count for component, count in counts.items() if component != DENOISER)


@dataclass(frozen=True)
class MatchRequest:
    """One LoRA of a stack, as far as matching needs it.

    Args:
        file: what it holds.
        components: the parts of it that are applied; None: all.
    """

    file: LoraFile
    components: Sequence[str] | None = None

    def includes(self, component: str) -> bool:
        """Whether a part of the file is to be applied."""
        if self.components is None or component in self.components:
            return True
        return component == DENOISER and bool(self.experts)

    @property
    def experts(self) -> list[str]:
        """Of two denoisers, those that it is for; none named: both."""
        return [component for component in self.components or () if component in EXPERTS]


@dataclass(frozen=True)
class Location:
    """The modules of one component that a module of a file stands for."""

    component: str
    targets: ModuleTargets


def match_loras(parts: Mapping[str, nn.Module], stack: Sequence[MatchRequest], *, strict: bool) -> Matches:
    """Find the module of every change and check the shapes.

    Args:
        parts: `denoiser`, and text encoders by the name of their component.
        stack: the LoRAs, in order.
        strict: anything that does not match is an error, and not a warning.

    Raises:
        LoraError: when nothing of a file matches, a shape is wrong, or, when strict, anything does not match.
    """
    components = {name: ModelComponent(model) for name, model in parts.items()}
    found: dict[str, dict[str, list[tuple[int, LoraChange]]]] = {name: {} for name in parts}
    unmatched: list[tuple[int, str, str]] = []
    known_experts = components[DENOISER].experts if DENOISER in components else []
    for index, request in enumerate(stack):
        check_requested_components(request, known_experts)
        file_match = match_file(request, components)
        report_unmatched(request.file, file_match, strict=strict)
        for line in describe_copies(file_match.n_copies):
            log.info("%s: %s", request.file.title, line)
        for component, module, change in file_match.changes:
            found[component].setdefault(module, []).append((index, change))
        unmatched += [(index, name, reason) for name, reason in file_match.unmatched]
    return Matches(found, unmatched)


def check_requested_components(request: MatchRequest, known_experts: Sequence[str]) -> None:
    """Check that the model and the file have what `components` names.

    Raises:
        LoraError: for a denoiser that the model does not have, or when nothing of the file is left.
    """
    if request.components is None:
        return
    file, given = request.file, list(request.components)
    for expert in request.experts:
        if expert not in known_experts:
            known = ", ".join(known_experts) or "one denoiser: components=[denoiser]"
            raise LoraError(f"{file.title}: components={given} names {expert}, this model has {known}")

    in_file = set(file.changes)
    in_file |= {parse_key(key).component for key, _ in file.skipped_keys}
    if not any(request.includes(component) for component in in_file):
        present = ", ".join(sorted(in_file)) or "none"
        raise LoraError(f"{file.title}: components={given} leaves nothing of it; it has {present}")


def match_file(request: MatchRequest, components: Mapping[str, ModelComponent]) -> FileMatch:
    """Find the modules of one file's changes.

    Raises:
        LoraError: when a change does not have the shape of its module.
    """
    file, match = request.file, FileMatch()
    for key, reason in file.skipped_keys:
        if request.includes(parse_key(key).component):
            match.unmatched.append((key, reason))

    for component, changes in file.changes.items():
        if not request.includes(component):
            continue
        located = locate_changes(component, changes, components, request.experts)
        replaced = find_replaced_changes(changes, located, components)
        locations = {name: location for name, location in located.items() if name not in replaced}
        for name, location in locations.items():
            change, model_component = changes[name], components[location.component]
            check_row_count(file, name, change, location.targets)
            for targets in split_by_matrix(location.targets):
                joined = join_columns(change, targets)
                for target in targets:
                    fitted = fit_to_target(file, joined, target, model_component)
                    named = NamedChange(name, fitted, find_changed_rows(change, target))
                    match.add(file, location.component, target.module, named)

        match.n_matched += len(locations)
        missing = describe_missing_module(component, components)
        for name in changes:
            if name not in locations:
                full_name = name if component == DENOISER else f"{component}: {name}"
                match.unmatched.append((full_name, replaced.get(name, missing)))
    return match


def locate_changes(
    component: str,
    changes: Mapping[str, LoraChange],
    components: Mapping[str, ModelComponent],
    experts: Sequence[str],
) -> dict[str, Location]:
    """Find the modules of one component of a file.

    A file's `te2` is CLIP-G for some trainers and T5 for others, which the names inside tell. So changes of a
    text encoder are looked for in the one of that name, then in the others.

    Args:
        component: the one that the file names.
        changes: its changes, by module name.
        components: those of the model.
        experts: of two denoisers, those that are meant; empty: both.

    Returns:
        Module name -> location; names that the model does not have are missing.
    """
    candidates = [component]
    if component != DENOISER:
        candidates += [name for name in components if name not in (component, DENOISER)]

    locations: dict[str, Location] = {}
    for candidate in candidates:
        if candidate not in components:
            continue
        model_component = components[candidate]
        open_names = [name for name in changes if name not in locations]
        for name, targets in model_component.find_all_targets(open_names, experts).items():
            if not targets:
                continue
            if candidate == component or has_matching_shapes(changes[name], targets, model_component):
                locations[name] = Location(candidate, targets)
    return locations


def find_replaced_changes(
    changes: Mapping[str, LoraChange],
    locations: Mapping[str, Location],
    components: Mapping[str, ModelComponent],
) -> dict[str, str]:
    """The changes of layers that this model has in another form than its usual class, each with the reason.

    Args:
        changes: of one component of a file, by module name.
        locations: as `locate_changes` gives them.
        components: those of the model.
    """
    replaced = {}
    for name, location in locations.items():
        reason = find_replaced_reason(changes[name], location.targets, components[location.component])
        if reason is not None:
            replaced[name] = reason
    return replaced
