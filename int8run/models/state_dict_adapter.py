"""Converts between the keys of a file and the parameters of a diffusers model, in both directions.

Files name a denoiser's parameters as diffusers does or as its authors do (`key_mappings/*.yaml`). Some
authors keep in one tensor what is several parameters in diffusers, or in another order or shape. What is
said here of a weight holds for everything that has its rows, a bias and the scales of rows included:
`TensorPart.extract` takes them all.

`to_model` is for files that are read, `to_original` for files that are written. Both work on names and
shapes; the tensors themselves are read and written by others.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from int8run.errors import ConfigError, FileError
from int8run.models.key_mapping import KeyMapping, KeyMappingSet, load_mappings
from int8run.models.name_pattern import fill_pattern, find_greatest_number, match_pattern

Shape = tuple[int, ...]
# one of several equal parts of a tensor's rows: index and count
Portion = tuple[int, int]
WHOLE: Portion = (0, 1)
DENOISER_PREFIXES = (
    "model.diffusion_model.",  # whole checkpoints and ComfyUI's save nodes
    "model.model.",  # some older files of ComfyUI
    "net.",  # Cosmos and what is built on it
    "diffusion_model.",  # seen in files, written by no known program
)
# a prefix counts when more keys have it; as many have it by chance (ComfyUI's number)
CHANCE_MATCHES = 5
NO_ORIGINAL_NAMES = (
    ": it is built unlike the models that other programs have names for; "
    "save to a folder instead (a path without .safetensors), which keeps the names of diffusers"
)
WRONG_ARCHITECTURE = (
    "the file is of another architecture, or of another size of it; "
    "take the configuration that belongs to the file"
)


@dataclass(frozen=True)
class TensorPart:
    """Rows of one tensor.

    Args:
        key: the tensor.
        rows: which of its rows; None: all.
        swap_halves: whether the two halves of these rows change places.
        shape: what the values are reshaped to, -1 for the number that follows from the rest; None: they keep
            their shape.
        transposed: whether the matrix is transposed.
        portion: index and count where it is one of several equal parts of the rows, until their number is
            known; `rows` says the same then.
    """

    key: str
    rows: slice | None = None
    swap_halves: bool = False
    shape: Shape | None = None
    transposed: bool = False
    portion: Portion | None = None

    def count_rows(self, num_rows: int) -> int:
        """Return how many of a tensor's rows these are."""
        if self.portion is not None:
            return num_rows // self.portion[1]
        first, end, _ = (self.rows or slice(None)).indices(num_rows)
        return end - first

    def extract(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor.

        Args:
            tensor: that of `key`, or one with as many rows: a bias [N], scales [N, 1]. A single value belongs
                to every row and is returned as it is.
        """
        if tensor.numel() == 1 and self.shape is None:
            return tensor
        part = tensor if self.rows is None else tensor[self.rows]
        if self.swap_halves:
            part = part.roll(len(part) // 2, 0)
        if self.transposed:
            part = part.T  # [N, K] -> [K, N]
        return part if self.shape is None else part.reshape(self.shape)


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
        part = TensorPart(
            key,
            rows=None if len(targets) == 1 else slice(start, start + num_rows),
            swap_halves=target.swap_halves,
            shape=None if target.shape is None else shape,
            transposed=target.transposed,
        )
        yield target.key, part
        start += num_rows


def join_shapes(parts: Iterable[TensorPart], shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape of the tensor that whole tensors make, one after the other; None where they cannot.

    Args:
        parts: as `to_original` gives them.
        shapes: of the tensors that they name.
    """
    parts = list(parts)
    if len(parts) == 1:
        return join_single_shape(parts[0], shapes[parts[0].key])
    joined = [tuple(shapes[part.key]) for part in parts]
    row_shape = joined[0][1:]
    if not all(shape and shape[1:] == row_shape for shape in joined):
        return None
    return (sum(shape[0] for shape in joined), *row_shape)


def join_single_shape(part: TensorPart, shape: Shape) -> Shape | None:
    """Return the shape of a tensor that is (rows of) one, transposed and reshaped as the part says.

    None where it cannot be: rows that are not a multiple of their parts.
    """
    if part.portion is not None or part.rows is not None:
        if not shape or (part.portion is not None and shape[0] % part.portion[1]):
            return None
        shape = (part.count_rows(shape[0]), *shape[1:])
    turned = tuple(shape)[::-1] if part.transposed else tuple(shape)
    return turned if part.shape is None else complete_shape(part.shape, prod(turned))


def complete_shape(shape: Shape, count: int) -> Shape | None:
    """Return a shape with its -1 replaced so that it holds `count` values; None when no number does."""
    fixed = prod(size for size in shape if size > 0)
    completed = tuple(count // fixed if size < 0 else size for size in shape)
    return completed if prod(completed) == count else None


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
    return {
        mappings.prefix + original: tuple(select_portion(part, parameters[part.key]) for part in parts)
        for original, parts in in_order
    }


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
        parts = tuple(part for joined in step.keys for part in pending.pop(joined))
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
