"""The names of a denoiser's authors for the parameters of a diffusers model, for files that are written.

`export` and `task=quantize` call `to_original`; `state_dict_adapter` goes the other way. Names and shapes
alone are known here.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from int8run.errors import ConfigError
from int8run.models.key_mapping import KeyMapping, KeyMappingSet, load_mappings
from int8run.models.name_pattern import fill_pattern, match_pattern
from int8run.models.state_dict_adapter import (
    apply_mapping,
    find_last_blocks,
    get_module_name,
    has_swapped_halves,
)
from int8run.models.tensor_part import Shape, TensorPart

NO_ORIGINAL_NAMES = (
    ": it is built unlike the models that other programs have names for; "
    "save to a folder instead (a path without .safetensors), which keeps the names of diffusers"
)


@dataclass(frozen=True)
class RenamingStep:
    """One key mapping applied to a model's parameters, from the model's names to the authors'.

    Args:
        mapping: the key mapping.
        original: the name that it gives.
        keys: all keys that become one tensor of that name, in the order of their rows.
        number: what the first `*` of the mapping stands for; None where it has none.
    """

    mapping: KeyMapping
    original: str
    keys: tuple[str, ...]
    number: int | None


def to_original(parameters: Mapping[str, Shape], class_name: str) -> dict[str, tuple[TensorPart, ...]]:
    """Return the keys of a file in the authors' names, which ComfyUI and others read.

    FLUX and most others get bare names, as their files have them: ComfyUI takes these with and without a
    prefix, diffusers' converter of FLUX.2 only without. UNets of Stable Diffusion get
    `model.diffusion_model.` and Cosmos `net.` (the files' `prefix`), because diffusers and older programs
    look for them behind it.

    Args:
        parameters: what the model's `state_dict()` holds: names and shapes.
        class_name: the model's class; one without key mappings keeps its names.

    Returns:
        For each key the parameters whose values it holds, one after the other; their `shape` is the one in
        the file. In the order of the model's parameters.

    Raises:
        ConfigError: when the model is built unlike those that the names are for: two parameters would get one
            name, or some of those that are one tensor there are missing here.
    """
    mappings = load_mappings(class_name)
    modules = {get_module_name(name) for name in parameters}
    check_architecture(mappings, modules, class_name)
    usable = [m for m in (*mappings.parameters, *mappings.names) if not is_excluded(m, modules)]
    renamed = rename_parameters(parameters, usable, find_last_blocks(mappings, parameters), class_name)
    order = {name: i for i, name in enumerate(parameters)}
    in_order = sorted(renamed.items(), key=lambda item: order[item[1][0].key])
    found = {}
    for original, parts in in_order:
        portions = tuple(select_portion(part, parameters[part.key]) for part in parts)
        found[mappings.prefix + original] = portions
    return found


def select_portion(part: TensorPart, shape: Shape) -> TensorPart:
    """Return a part with its rows in the place of its portion.

    Raises:
        ConfigError: when the tensor has no such parts.
    """
    if part.portion is None:
        return part
    index, count = part.portion
    if not shape or shape[0] % count:
        raise ConfigError(f"{part.key} {list(shape)} cannot be {count} tensors{NO_ORIGINAL_NAMES}")
    num_rows = shape[0] // count
    rows = slice(index * num_rows, (index + 1) * num_rows)
    return replace(part, rows=rows, portion=None)


def is_excluded(mapping: KeyMapping, modules: Iterable[str]) -> bool:
    """Return whether a model has a module that a key mapping is only for models without."""
    return mapping.without != "" and any(match_pattern(mapping.without, module) for module in modules)


def rename_parameters(
    parameters: Iterable[str],
    mappings: Sequence[KeyMapping],
    last_blocks: Mapping[KeyMapping, int],
    class_name: str,
) -> dict[str, tuple[TensorPart, ...]]:
    """Apply key mappings to a model's parameters until none applies, each once on the way to a name.

    Args:
        parameters: names of the model's parameters.
        mappings: in the order in which they are tried.
        last_blocks: as `find_last_blocks` gives them.
        class_name: the model's class, for messages.

    Returns:
        For each of the authors' names the parameters whose values it holds.

    Raises:
        ConfigError: when two parameters get one name, or some of those that are one tensor are missing.
    """
    # names to which a mapping may still apply, and the mappings that led to each
    pending: dict[str, tuple[TensorPart, ...]] = {name: (TensorPart(name),) for name in parameters}
    used: dict[str, frozenset[KeyMapping]] = dict.fromkeys(pending, frozenset())
    finished: dict[str, tuple[TensorPart, ...]] = {}
    while pending:
        key = next(iter(pending))
        unused = [mapping for mapping in mappings if mapping not in used[key]]
        step = find_renaming_step(key, unused, pending, class_name)
        if step is None:
            finished[key] = pending.pop(key)
            continue
        if step.mapping.part is not None:
            # each of the authors' tensors is a name of its own
            (part,) = pending.pop(key)
            for original, mapping in list_portions(key, step.mapping, unused):
                check_name_is_free(original, part, pending, finished, class_name=class_name)
                pending[original] = (apply_mapping(part, mapping, swap=False),)
                used[original] = used[key] | {mapping}
            continue
        parts: list[TensorPart] = []
        for joined in step.keys:
            parts += pending.pop(joined)
        check_name_is_free(step.original, parts[0], pending, finished, class_name=class_name)
        swap = has_swapped_halves(step.mapping, step.number, last_blocks)
        pending[step.original] = tuple(apply_mapping(part, step.mapping, swap=swap) for part in parts)
        used[step.original] = used[key] | {step.mapping}
    return finished


def check_name_is_free(
    original: str,
    part: TensorPart,
    *others: Mapping[str, tuple[TensorPart, ...]],
    class_name: str,
) -> None:
    """Raise ConfigError when a name is that of other parameters already.

    Args:
        original: the name.
        part: what it would be the name of.
        others: the names so far, with what they are the names of.
        class_name: the model's class, for messages.
    """
    for names in others:
        if original in names:
            raise ConfigError(
                f"{part.key} and {names[original][0].key} of this {class_name} would both be called "
                f"{original}{NO_ORIGINAL_NAMES}"
            )


def list_portions(
    key: str, first: KeyMapping, mappings: Iterable[KeyMapping]
) -> Iterator[tuple[str, KeyMapping]]:
    """Yield the authors' names of a parameter that is several tensors of theirs, each with its mapping.

    Args:
        key: the parameter's name so far.
        first: one of the mappings.
        mappings: all that may apply; the first of each part counts.
    """
    found: dict[tuple[int, int] | None, KeyMapping] = {}
    for mapping in mappings:
        if mapping.targets == first.targets and mapping.part is not None:
            found.setdefault(mapping.part, mapping)
    for mapping in found.values():
        match = match_pattern(mapping.targets[0], mapping.extract_name(key))
        assert match is not None
        yield mapping.complete_key(fill_pattern(mapping.original, match), key), mapping


def check_architecture(mappings: KeyMappingSet, modules: Container[str], class_name: str) -> None:
    """Raise ConfigError when a model is built unlike those that the authors' names are for."""
    for name in mappings.needs:
        if name not in modules:
            raise ConfigError(f"this {class_name} has no {name}{NO_ORIGINAL_NAMES}")
    for name in mappings.lacks:
        if name in modules:
            raise ConfigError(f"this {class_name} has {name}{NO_ORIGINAL_NAMES}")


def find_renaming_step(
    key: str, mappings: Iterable[KeyMapping], pending: Container[str], class_name: str
) -> RenamingStep | None:
    """Return the first key mapping that gives a key another name; None where there is none.

    Args:
        key: the name so far.
        mappings: those that may apply.
        pending: the names so far of all parameters.
        class_name: the model's class, for messages.

    Raises:
        ConfigError: when some of the keys that become one tensor are not there.
    """
    for mapping in mappings:
        for target in mapping.targets:
            match = match_pattern(target, mapping.extract_name(key))
            if match is None:
                continue
            joined = tuple(mapping.complete_key(fill_pattern(t, match), key) for t in mapping.targets)
            absent = [name for name in joined if name not in pending]
            if absent:
                raise ConfigError(
                    f"this {class_name} has {key}, but no {absent[0]} to be one tensor with it"
                    f"{NO_ORIGINAL_NAMES}"
                )
            original = mapping.complete_key(fill_pattern(mapping.original, match), key)
            return RenamingStep(mapping=mapping, original=original, keys=joined, number=match.first_number)
    return None
