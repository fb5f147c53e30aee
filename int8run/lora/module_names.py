"""Names of modules in LoRA files, looked up in the real modules of a model.

Trainers name a module as diffusers does, or as the model's authors do (`key_mappings/*.yaml`), with dots or with every dot
written as `_`. So all names that a model's modules can have are listed once, and a name from a file is a look-up: nothing is
guessed from its spelling. Matrices that one side fuses (q, k and v in one) are cut by the row counts of the model's own modules.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.models.key_mapping import KeyMapping, load_lora_mappings
from int8run.models.name_pattern import fill_pattern, find_greatest_number, match_pattern


@dataclass(frozen=True)
class ModuleTarget:
    """Where the rows of a file's matrix belong. Halves are swapped after the rows are taken.

    Args:
        module: the module's name in the model.
        take: rows of the file's matrix; None: all.
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
    """Consecutive rows of a module's weight."""

    module: str
    start: int
    count: int
    total: int
    swapped: bool = False

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.start + self.count


class NameTable:
    """Every name that the modules of a model can have in a file.

    Args:
        modules: the model's modules by name; those without a weight are passed over.
        rules: naming rules of the model's class.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rules: Iterable[KeyMapping]):
        shapes = {name: get_weight_shape(module) for name, module in modules.items()}
        rules = tuple(rules)
        known = expand_names(
            map_modules_to_rows({name: shape[0] for name, shape in shapes.items() if shape}, rules), rules
        )
        self.targets_by_name: Mapping[str, list[tuple[ModuleTarget, ...]]] = {
            name: [to_targets(r) for r in all_rows] for name, all_rows in known.items()
        }
        self.targets_by_flat_name: dict[str, list[tuple[ModuleTarget, ...]]] = {}
        for name, meanings in self.targets_by_name.items():
            there = self.targets_by_flat_name.setdefault(flatten_name(name), [])
            there += [m for m in meanings if m not in there]

    @classmethod
    def from_model(cls, model: nn.Module) -> "NameTable":
        """The table of a model, with the rules of its class; a class without rules has its own names only."""
        return cls(dict(model.named_modules()), load_lora_mappings(type(model).__name__))

    def find_targets(self, name: str) -> tuple[ModuleTarget, ...] | None:
        """The places of a name, without its component's prefix: as in diffusers or native, dotted or flattened.

        Returns None for a name that no module has, containers included, and for a part of a fused module of unknown row counts.

        Raises:
            LoraError: when two modules have this name.
        """
        found = self.targets_by_flat_name.get(flatten_name(name), [])
        if len(found) > 1:
            modules = " or ".join(sorted({meaning[0].module for meaning in found}))
            raise LoraError(
                f"the name {name} can mean {modules} of this model; rename the key in the LoRA file to the one that is meant"
            )
        return found[0] if found else None

    def find_all_targets(self, names: Iterable[str]) -> dict[str, tuple[ModuleTarget, ...] | None]:
        """The places of several names, see `find`."""
        return {name: self.find_targets(name) for name in names}


def get_weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a module's weight, also when it is quantized; empty for a module without one."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns  # an INT8 layer keeps its weight in its backend's own layout
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def count_source_rows(places: Sequence[ModuleTarget]) -> int | None:
    """How many rows a file's matrix must have that is cut into these places; None where it goes to one place uncut."""
    cut = places[-1].source_rows
    return None if cut is None else cut.stop


def flatten_name(name: str) -> str:
    """A name as kohya's trainer writes it: dots become underscores."""
    return name.replace(".", "_")


def map_modules_to_rows(
    counts: Mapping[str, int], rules: Iterable[KeyMapping]
) -> dict[str, tuple[RowSlice, ...]]:
    """The rows behind each module name. Where the model itself has a fused module, its parts are rows of that one.

    After diffusers' `fuse_qkv_projections()` the separate `to_q`, `to_k`, `to_v` are still there but no longer used: a change of
    them would do nothing. They tell how many rows each part has. Without them, or when they do not add up to the fused rows,
    the parts have no known place and so no name.
    """
    known: dict[str, tuple[RowSlice, ...]] = {
        name: (RowSlice(name, 0, count, count),) for name, count in counts.items()
    }
    fusions = [rule for rule in rules if len(rule.targets) > 1]
    for name, total in counts.items():
        for rule in fusions:
            values = match_pattern(rule.original, name)
            if values is None:
                continue
            parts = [fill_pattern(target, values) for target in rule.targets]
            if not all(part in counts for part in parts) or sum(counts[part] for part in parts) != total:
                for part in parts:
                    known.pop(part, None)
                continue
            start = 0
            for part in parts:
                known[part] = (RowSlice(name, start, counts[part], total),)
                start += counts[part]
    return known


def expand_names(
    modules: Mapping[str, tuple[RowSlice, ...]], rules: Sequence[KeyMapping]
) -> dict[str, list[tuple[RowSlice, ...]]]:
    """All names: the modules' own, and what the rules, read from right to left, make of names that are there.

    A rule counts once on the way to a name, so that a rule that adds a level ends. A rule with several targets needs all of them.
    Returns the rows of each name; more than one entry: the name has several meanings.
    """
    known = {name: [rows] for name, rows in modules.items()}
    used: dict[str, frozenset[int]] = dict.fromkeys(known, frozenset())
    last = {
        rule: find_greatest_number(rule.targets[0], modules) for rule in rules if rule.swap_halves == "last"
    }
    newest = list(known)
    while newest:
        found: dict[str, frozenset[int]] = {}
        for name in newest:
            for i, rule in enumerate(rules):
                values = None if i in used[name] else match_pattern(rule.targets[0], name)
                if values is None:
                    continue
                parts = [fill_pattern(target, values) for target in rule.targets]
                if not all(part in known for part in parts):
                    continue
                rows = merge_neighbors(r for part in parts for r in known[part][0])
                if rule.swap_halves is True or (
                    rule.swap_halves == "last" and int(values[0][0]) == last[rule]
                ):
                    rows = tuple(replace(r, swapped=not r.swapped) for r in rows)
                native = fill_pattern(rule.original, values)
                if native not in known:
                    found[native] = used[name] | {i}
                if rows not in known.setdefault(native, []):
                    known[native].append(rows)
        used |= found
        newest = list(found)
    return known


def merge_neighbors(rows: Iterable[RowSlice]) -> tuple[RowSlice, ...]:
    """The same rows, neighbours in one module made one."""
    joined: list[RowSlice] = []
    for r in rows:
        before = joined[-1] if joined else None
        if before and (before.module, before.end, before.swapped) == (r.module, r.start, r.swapped):
            joined[-1] = replace(before, count=before.count + r.count)
        else:
            joined.append(r)
    return tuple(joined)


def to_targets(rows: Sequence[RowSlice]) -> tuple[ModuleTarget, ...]:
    """The places of a matrix that holds these rows one after the other."""
    found, first = [], 0
    for r in rows:
        whole = r.count == r.total
        take = None if len(rows) == 1 else slice(first, first + r.count)
        found.append(
            ModuleTarget(r.module, take, None if whole else r.start, None if whole else r.total, r.swapped)
        )
        first += r.count
    return tuple(found)
