"""Finds the tensors of a file that are the parameters of a diffusers model.

Files name a denoiser's parameters as diffusers does or as its authors do (`key_mappings/*.yaml`). Some
authors keep in one tensor what is several parameters in diffusers, or in another order or shape. What is
said here of a weight holds for everything that has its rows, a bias and the scales of rows included:
`TensorPart.extract` takes them all.

`to_model` works on names and shapes; the tensors themselves are read by others. `original_names` goes the
other way, for files that are written.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from int8run.errors import FileError
from int8run.models.key_mapping import KeyMapping, KeyMappingSet, load_mappings
from int8run.models.name_pattern import fill_pattern, find_greatest_number, match_pattern
from int8run.models.tensor_part import WHOLE, Portion, Shape, TensorPart, join_shapes

DENOISER_PREFIXES = (
    "model.diffusion_model.",  # whole checkpoints and ComfyUI's save nodes
    "model.model.",  # some older files of ComfyUI
    "net.",  # Cosmos and what is built on it
    "diffusion_model.",  # seen in files, written by no known program
)
# a prefix counts when more keys have it; as many have it by chance (ComfyUI's number)
CHANCE_MATCHES = 5
WRONG_ARCHITECTURE = (
    "the file is of another architecture, or of another size of it; "
    "take the configuration that belongs to the file"
)


@dataclass(frozen=True)
class StateDictLayout:
    """Where a model's parameters are in a file.

    Args:
        parts: for each parameter of the model what it is made of, one part after the other.
        unused: keys of the file that belong to nothing in the model.
        missing: parameters of the model that the file does not have.
        dropped: keys that files of this architecture have and the model has no place for, with the reason.
    """

    parts: Mapping[str, tuple[TensorPart, ...]]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    dropped: Mapping[str, str]


def find_prefix(keys: Iterable[str]) -> str:
    """Return what stands before the denoiser's keys in a file.

    A whole checkpoint has keys of other components besides, without this prefix.

    Returns:
        One of DENOISER_PREFIXES, or `model.` where every key begins with it, else nothing.
    """
    keys = list(keys)
    for prefix in DENOISER_PREFIXES:
        if sum(key.startswith(prefix) for key in keys) > CHANCE_MATCHES:
            return prefix
    return "model." if keys and all(key.startswith("model.") for key in keys) else ""


def find_denoiser_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the denoiser's keys of a file: name without prefix -> key as it is in the file."""
    keys = list(keys)
    prefix = find_prefix(keys)
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def to_model(
    shapes: Mapping[str, Shape], parameters: Mapping[str, Shape], class_name: str
) -> StateDictLayout:
    """Find a model's parameters in a file.

    Args:
        shapes: the file's keys without prefix, and without the keys that belong to quantized layers (scales
            and the like), with their logical shapes.
        parameters: what the model's `state_dict()` holds: names and shapes.
        class_name: the model's class.

    Raises:
        FileError: when a tensor has another shape than its parameters, when the model has only some of the
            parameters that a tensor holds, or when two tensors hold the same parameter.
    """
    mappings = load_mappings(class_name)
    last_blocks = find_last_blocks(mappings, parameters)
    # by parameter: what it is made of, by its portion
    found: dict[str, dict[Portion, TensorPart]] = {}
    unused: list[str] = []
    dropped: dict[str, str] = {}
    for key, shape in shapes.items():
        targets = resolve_key(key, mappings, last_blocks, parameters)
        if not any(target.key in parameters for target in targets):
            reason = find_drop_reason(key, mappings)
            if reason is None:
                unused.append(key)
            else:
                dropped[key] = reason
            continue
        check_targets(key, targets, parameters, class_name)
        check_shape(key, shape, targets=targets, parameters=parameters, class_name=class_name)
        for target, (name, part) in zip(targets, split_tensor(key, targets, parameters), strict=True):
            known = found.setdefault(name, {})
            check_held_once(target, part, known, class_name)
            known[target.portion or WHOLE] = part
    parts = {name: join_portions(known) for name, known in found.items() if is_complete(known)}
    missing = tuple(name for name in parameters if name not in parts)
    return StateDictLayout(parts=parts, unused=tuple(unused), missing=missing, dropped=dropped)


def check_held_once(
    target: TensorPart, part: TensorPart, known: Mapping[Portion, TensorPart], class_name: str
) -> None:
    """Raise FileError where a file holds the same rows of a parameter twice.

    Args:
        target: of the model.
        part: of the file, that holds it.
        known: what the file holds of it already.
        class_name: the model's class.
    """
    index, count = target.portion or WHOLE
    for (known_index, known_count), known_part in known.items():
        if (index, count) == (known_index, known_count) or count != known_count:
            raise FileError(
                f"the file holds {target.key} of the {class_name} twice: "
                f"as {known_part.key} and as {part.key}; remove one"
            )


def is_complete(known: Mapping[Portion, TensorPart]) -> bool:
    """Return whether these are all portions of a parameter."""
    ((_, count), *_) = known
    return len(known) == count


def join_portions(known: Mapping[Portion, TensorPart]) -> tuple[TensorPart, ...]:
    """Return the portions of a parameter one after the other."""
    return tuple(known[portion] for portion in sorted(known))


def check_targets(
    key: str, targets: Sequence[TensorPart], parameters: Container[str], class_name: str
) -> None:
    """Raise FileError when a model has only some of the parameters that a tensor of a file holds."""
    if all(target.key in parameters for target in targets):
        return
    each = []
    for target in targets:
        verb = "has" if target.key in parameters else "has no"
        each.append(f"{verb} {target.key}")
    raise FileError(
        f"{key} of the file holds several parameters, but the {class_name} {', '.join(each)}: "
        f"{WRONG_ARCHITECTURE}"
    )


def check_shape(
    key: str, shape: Shape, *, targets: Sequence[TensorPart], parameters: Mapping[str, Shape], class_name: str
) -> None:
    """Raise FileError when a tensor of a file has not the shape that its parameters make."""
    needed = join_shapes(targets, parameters)
    if tuple(shape) == needed:
        return
    held = " + ".join(f"{target.key} {list(parameters[target.key])}" for target in targets)
    needs = "rows that do not go together" if needed is None else str(list(needed))
    raise FileError(
        f"{key} of the file has the shape {list(shape)}, but {held} of the {class_name} need {needs}: "
        f"{WRONG_ARCHITECTURE}"
    )


def split_tensor(
    key: str, targets: Sequence[TensorPart], parameters: Mapping[str, Shape]
) -> Iterator[tuple[str, TensorPart]]:
    """Yield the parameters that one tensor of a file holds, and what of the tensor makes each.

    Args:
        key: the tensor in the file.
        targets: as `resolve_key` gives them.
        parameters: names and shapes of the model's parameters.
    """
    start = 0
    for target in targets:
        shape = tuple(parameters[target.key])
        num_rows = shape[0] if shape else 0
        rows = None
        if len(targets) > 1:
            rows = slice(start, start + num_rows)
        part = TensorPart(
            key,
            rows=rows,
            swap_halves=target.swap_halves,
            shape=None if target.shape is None else shape,
            transposed=target.transposed,
        )
        yield target.key, part
        start += num_rows


def find_targets(keys: Iterable[str], class_name: str) -> dict[str, tuple[str, ...]]:
    """Return the parameters that each key of a file stands for, by names alone; none for a dropped key.

    Args:
        keys: without prefix, and without the keys that belong to quantized layers.
        class_name: the class of the model.
    """
    mappings = load_mappings(class_name)
    targets: dict[str, tuple[str, ...]] = {}
    for key in keys:
        if find_drop_reason(key, mappings):
            targets[key] = ()
        else:
            targets[key] = tuple(part.key for part in resolve_key(key, mappings))
    return targets


def find_drop_reason(key: str, mappings: KeyMappingSet) -> str | None:
    """Return the reason why a key of a file has no place in the model; None when it has one or is unknown."""
    for pattern, reason in mappings.drop.items():
        if match_pattern(pattern, key):
            return reason
    return None


def find_last_blocks(mappings: KeyMappingSet, parameters: Iterable[str]) -> dict[KeyMapping, int]:
    """Return the number of the model's last block for each key mapping that swaps halves only there."""
    modules = {get_module_name(name) for name in parameters}
    last_blocks = {}
    for mapping in mappings.names:
        if mapping.swap_halves == "last":
            last_blocks[mapping] = find_greatest_number(mapping.targets[0], modules)
    return last_blocks


def resolve_key(
    key: str,
    mappings: KeyMappingSet,
    last_blocks: Mapping[KeyMapping, int] | None = None,
    parameters: Container[str] = (),
    used: frozenset[KeyMapping] = frozenset(),
) -> tuple[TensorPart, ...]:
    """Return the parameters whose values a key of a file holds, in their order.

    The first mapping that fits is applied, then the first that fits the result, and so on, each once, up to a
    parameter of the model. A key that no mapping fits stands for itself.

    Args:
        key: without prefix.
        mappings: of the model's class.
        last_blocks: as `find_last_blocks` gives them; without them no halves of a last block are swapped.
        parameters: the names of the model's parameters; none: every mapping that fits is applied.
        used: mappings that led to this key.

    Returns:
        One part for each parameter; its `shape` is the one in the file.
    """
    if key in parameters:
        return (TensorPart(key),)
    for mapping in (*mappings.parameters, *mappings.names):
        match = match_pattern(mapping.original, mapping.extract_name(key))
        if match is None or mapping in used:
            continue
        swap = has_swapped_halves(mapping, match.first_number, last_blocks or {})
        parts: list[TensorPart] = []
        for target in mapping.targets:
            target_key = mapping.complete_key(fill_pattern(target, match), key)
            parts += resolve_key(target_key, mappings, last_blocks, parameters, used | {mapping})
        return tuple(apply_mapping(part, mapping, swap=swap) for part in parts)
    return (TensorPart(key),)


def has_swapped_halves(
    mapping: KeyMapping, number: int | None, last_blocks: Mapping[KeyMapping, int]
) -> bool:
    """Return whether a key mapping swaps halves in the block of this number."""
    if mapping.swap_halves == "last":
        return number == last_blocks.get(mapping)
    return bool(mapping.swap_halves)


def apply_mapping(part: TensorPart, mapping: KeyMapping, *, swap: bool) -> TensorPart:
    """Return a part after one more key mapping; two swaps or two transposes undo each other."""
    return replace(
        part,
        swap_halves=part.swap_halves != swap,
        shape=mapping.shape or part.shape,
        transposed=part.transposed != mapping.transposed,
        portion=mapping.part or part.portion,
    )


def get_module_name(key: str) -> str:
    """Return the module that a parameter belongs to."""
    return key.rpartition(".")[0]
