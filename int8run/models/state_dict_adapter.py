"""Which rows of which tensor of a file make which parameter of a model, and the way back to the names of the model's authors.

Files name a denoiser's parameters as diffusers does or as its authors do (`key_mappings/*.yaml`). Some authors keep in one tensor what
is several parameters in diffusers, or in another order or shape. What is said here of a weight holds for everything that has its
rows, a bias and the scales of rows included: `Part.cut` takes them all.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from int8run.errors import ConfigError, FileError
from int8run.models.key_mapping import KeyMapping, KeyMappingSet, load_mappings
from int8run.models.name_pattern import fill_pattern, find_greatest_number, match_pattern

Shape = tuple[int, ...]
# whole checkpoints and ComfyUI's save nodes; some of its older files; Cosmos and what is built on it; nobody's rule, but seen
DENOISER_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "diffusion_model.")
# as many keys have it by chance (ComfyUI's number)
CHANCE_MATCHES = 5


@dataclass(frozen=True)
class TensorPart:
    """Rows of one tensor.

    Args:
        key: the tensor.
        rows: rows of it; None: all.
        swap_halves: the two halves of these rows change places.
        shape: what the values are reshaped to, -1 for the number that follows from the rest; None: they keep their shape.
        transposed: the matrix is turned: its columns are the rows of the tensor.
    """

    key: str
    rows: slice | None = None
    swap_halves: bool = False
    shape: Shape | None = None
    transposed: bool = False

    def extract(self, tensor: Tensor) -> Tensor:
        """This part of `key`'s tensor, or of one with as many rows ([N], [N, 1] scales); a single value belongs to every row."""
        if tensor.numel() == 1 and self.shape is None:
            return tensor
        rows = tensor if self.rows is None else tensor[self.rows]
        if self.swap_halves:
            rows = rows.roll(len(rows) // 2, 0)
        if self.transposed:
            rows = rows.T
        return rows if self.shape is None else rows.reshape(self.shape)


@dataclass(frozen=True)
class StateDictLayout:
    """Where a model's parameters are in a file.

    Args:
        parts: for each parameter of the model its rows, one part after the other.
        unused: keys of the file that mean nothing to the model and are no known companions of such files.
        missing: parameters of the model that the file does not have.
        dropped: keys that files of this architecture have and the model has no place for, with the reason.
    """

    parts: Mapping[str, tuple[TensorPart, ...]]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    dropped: Mapping[str, str]


def find_prefix(keys: Iterable[str]) -> str:
    """What stands before the denoiser's keys in a file: one of PREFIXES, or `model.` before every key, else nothing.

    A whole checkpoint has keys of other components besides, without this prefix.
    """
    keys = list(keys)
    for prefix in DENOISER_PREFIXES:
        if sum(key.startswith(prefix) for key in keys) > CHANCE_MATCHES:
            return prefix
    return "model." if keys and all(key.startswith("model.") for key in keys) else ""


def find_denoiser_keys(keys: Iterable[str]) -> dict[str, str]:
    """The denoiser's keys of a file: name without prefix -> key as it is in the file."""
    keys = list(keys)
    prefix = find_prefix(keys)
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def to_model(
    shapes: Mapping[str, Shape], parameters: Mapping[str, Shape], class_name: str
) -> StateDictLayout:
    """Find a model's parameters in a file.

    Args:
        shapes: the file's keys without prefix and without companions of quantized layers, with their logical shapes.
        parameters: what the model's `state_dict()` holds: names and shapes.
        class_name: the model's class.

    Raises:
        FileError: when a tensor has another shape than its parameters, when the model has only some of the parameters that a
            tensor holds, or when two tensors mean the same parameter.
    """
    names = load_mappings(class_name)
    last = find_last_blocks(names, parameters)
    parts: dict[str, tuple[TensorPart, ...]] = {}
    unused, dropped = [], {}
    for key, shape in shapes.items():
        meant = resolve_key(key, names, last, parameters)
        known = [part.key in parameters for part in meant]
        if not any(known):
            reason = find_drop_reason(key, names)
            if reason is None:
                unused.append(key)
            else:
                dropped[key] = reason
            continue
        if not all(known):
            there = [f"{'has' if k else 'has no'} {part.key}" for k, part in zip(known, meant, strict=True)]
            raise FileError(
                f"{key} of the file holds several parameters, but the {class_name} {', '.join(there)}: {WRONG_ARCHITECTURE}"
            )
        for name, part in split_tensor(key, shape, meant, parameters, class_name):
            if name in parts:
                raise FileError(
                    f"the file holds {name} of the {class_name} twice: as {parts[name][0].key} and as {key}; remove one"
                )
            parts[name] = (part,)
    missing = tuple(name for name in parameters if name not in parts)
    return StateDictLayout(parts, tuple(unused), missing, dropped)


NO_ORIGINAL_NAMES = (
    ": it is built unlike the models that other programs have names for; save to a folder instead (a path without .safetensors), which "
    "keeps the names of diffusers"
)
WRONG_ARCHITECTURE = "the file is of another architecture, or of another size of it; take the configuration that belongs to the file"


def split_tensor(
    key: str, shape: Shape, meant: tuple[TensorPart, ...], parameters: Mapping[str, Shape], class_name: str
) -> Iterable[tuple[str, TensorPart]]:
    """The parts of one tensor of a file: the parameter, and what of the tensor makes it.

    Raises:
        FileError: when the shapes do not agree.
    """
    wanted = join_shapes(meant, parameters)
    if tuple(shape) != wanted:
        what = " + ".join(f"{part.key} {list(parameters[part.key])}" for part in meant)
        needs = "rows that do not go together" if wanted is None else f"{list(wanted)}"
        raise FileError(
            f"{key} of the file has the shape {list(shape)}, but {what} of the {class_name} need {needs}: {WRONG_ARCHITECTURE}"
        )
    first = 0
    for part in meant:
        own = tuple(parameters[part.key])
        rows = None if len(meant) == 1 else slice(first, first + own[0])
        yield (
            part.key,
            TensorPart(key, rows, part.swap_halves, None if part.shape is None else own, part.transposed),
        )
        first += own[0] if own else 0


def join_shapes(parts: Iterable[TensorPart], shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the tensor that whole tensors of these shapes make one after the other; None when they do not go together.

    Args:
        parts: as `to_native` gives them.
        shapes: of the tensors that they name.
    """
    parts = list(parts)
    joined = [tuple(shapes[part.key]) for part in parts]
    if len(parts) == 1:
        shape, own = parts[0].shape, joined[0][::-1] if parts[0].transposed else joined[0]
        return own if shape is None else complete_shape(shape, prod(own))
    if any(len(shape) == 0 or shape[1:] != joined[0][1:] for shape in joined):
        return None
    return (sum(shape[0] for shape in joined), *joined[0][1:])


def complete_shape(shape: Shape, count: int) -> Shape | None:
    """A shape with its -1 replaced so that it holds `count` values; None when no number does."""
    fixed = prod(n for n in shape if n > 0)
    found = tuple(count // fixed if n < 0 else n for n in shape)
    return found if prod(found) == count else None


def to_original(parameters: Mapping[str, Shape], class_name: str) -> dict[str, tuple[TensorPart, ...]]:
    """The keys of a file for ComfyUI and others that read the authors' names, in the order of the model's parameters.

    FLUX and most others get bare names, as their files have them: ComfyUI takes these with and without a prefix, diffusers' converter
    of FLUX.2 only without. UNets of Stable Diffusion get `model.diffusion_model.` and Cosmos `net.` (the files' `prefix`), because
    diffusers looks for them behind it, and so do older programs.

    Args:
        parameters: what the model's `state_dict()` holds: names and shapes.
        class_name: the model's class; one without rules keeps its names.

    Returns:
        For each key the parameters whose values it holds, one after the other; their `shape` is the one in the file.

    Raises:
        ConfigError: when the model is built unlike those that the names are for: two parameters would get one name, or some of
            those that are one tensor there are missing here.
    """
    names = load_mappings(class_name)
    rules = (*names.parameters, *names.names)
    last = find_last_blocks(names, parameters)
    modules = {get_module_name(name) for name in parameters}
    unlike = [f"has no {name}" for name in names.needs if name not in modules] + [
        f"has {name}" for name in names.lacks if name in modules
    ]
    if unlike:
        raise ConfigError(f"this {class_name} {unlike[0]}{NO_ORIGINAL_NAMES}")
    rules = tuple(
        rule
        for rule in rules
        if not (rule.without and any(match_pattern(rule.without, module) for module in modules))
    )
    pool: dict[str, tuple[TensorPart, ...]] = {name: (TensorPart(name),) for name in parameters}
    used: dict[str, frozenset[KeyMapping]] = dict.fromkeys(pool, frozenset())
    found: dict[str, tuple[TensorPart, ...]] = {}
    while pool:
        key = next(iter(pool))
        step = find_original_name(key, [rule for rule in rules if rule not in used[key]], pool, class_name)
        if step is None:
            found[key] = pool.pop(key)
            continue
        rule, native, group, number = step
        swap = rule.swap_halves is True or (rule.swap_halves == "last" and number == last[rule])
        parts = tuple(part for name in group for part in pool.pop(name))
        if native in pool or native in found:
            other = (pool | found)[native][0].key
            raise ConfigError(
                f"{parts[0].key} and {other} of this {class_name} would both be called {native}{NO_ORIGINAL_NAMES}"
            )
        pool[native] = tuple(apply_mapping(p, rule, swap) for p in parts)
        used[native] = used[key] | {rule}
    place = {name: i for i, name in enumerate(parameters)}
    ordered = sorted(found.items(), key=lambda item: place[item[1][0].key])
    return {names.prefix + native: parts for native, parts in ordered}


def find_targets(keys: Iterable[str], class_name: str) -> dict[str, tuple[str, ...]]:
    """The parameters that each key of a file stands for, by names alone; nothing for a key that is left out.

    Args:
        keys: without prefix, and without companions of quantized layers.
        class_name: the class of the model.
    """
    names = load_mappings(class_name)
    return {
        key: ()
        if find_drop_reason(key, names)
        else tuple(part.key for part in resolve_key(key, names, {}, ()))
        for key in keys
    }


def find_drop_reason(key: str, names: KeyMappingSet) -> str | None:
    """The reason why a key of a file has no place in the model; None when it has one or is unknown."""
    return next((reason for pattern, reason in names.drop.items() if match_pattern(pattern, key)), None)


def find_last_blocks(names: KeyMappingSet, parameters: Iterable[str]) -> dict[KeyMapping, int]:
    """For each rule about the last block its number in the model."""
    modules = {get_module_name(name) for name in parameters}
    return {
        rule: find_greatest_number(rule.targets[0], modules)
        for rule in names.names
        if rule.swap_halves == "last"
    }


def resolve_key(
    key: str,
    names: KeyMappingSet,
    last: Mapping[KeyMapping, int],
    known: Container[str],
    used: frozenset[KeyMapping] = frozenset(),
) -> tuple[TensorPart, ...]:
    """The parameters whose values a key of a file holds, in their order; the key itself where no rule is for it.

    The first rule that fits is applied, then the first that fits the result, and so on, each once, up to a parameter of the model.

    Args:
        last: the number of the last block, for the rules that ask for it; a rule that is not in it swaps nothing.
        known: the model's parameters.
        used: rules that led to this key.

    Returns:
        One part for each parameter; its `shape` is the one in the file.
    """
    if key in known:
        return (TensorPart(key),)
    for rule in (*names.parameters, *names.names):
        values = None if rule in used else match_pattern(rule.original, rule.extract_name(key))
        if values is None:
            continue
        swap = rule.swap_halves is True or (
            rule.swap_halves == "last" and int(values[0][0]) == last.get(rule)
        )
        inner = (
            resolve_key(rule.complete_key(fill_pattern(t, values), key), names, last, known, used | {rule})
            for t in rule.targets
        )
        return tuple(apply_mapping(p, rule, swap) for parts in inner for p in parts)
    return (TensorPart(key),)


def apply_mapping(part: TensorPart, rule: KeyMapping, swap: bool) -> TensorPart:
    """A part after one more rule."""
    transposed = part.transposed != rule.transposed
    return replace(
        part, swap_halves=part.swap_halves != swap, shape=rule.shape or part.shape, transposed=transposed
    )


def find_original_name(
    key: str, rules: Iterable[KeyMapping], known: Container[str], class_name: str
) -> tuple[KeyMapping, str, tuple[str, ...], int | None] | None:
    """The first rule that gives a key another name: the rule, the name, all keys that become one by it, the first `*`'s number.

    Raises:
        ConfigError: when not all of these keys are there.
    """
    for rule in rules:
        for target in rule.targets:
            values = match_pattern(target, rule.extract_name(key))
            if values is None:
                continue
            group = tuple(rule.complete_key(fill_pattern(t, values), key) for t in rule.targets)
            absent = [name for name in group if name not in known]
            if absent:
                raise ConfigError(
                    f"this {class_name} has {key}, but no {absent[0]} to be one tensor with it{NO_ORIGINAL_NAMES}"
                )
            number = int(values[0][0]) if values[0] else None
            return rule, rule.complete_key(fill_pattern(rule.original, values), key), group, number
    return None


def get_module_name(key: str) -> str:
    """The module that a parameter belongs to."""
    return key.rpartition(".")[0]
