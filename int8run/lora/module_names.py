"""Names of modules in LoRA files, looked up in the real modules of a model.

Trainers name a module as diffusers does, or as the model's authors do (`models/key_mappings/*.yaml`), with
dots or with every dot written as `_`. So all names that the modules of a model can have are listed once, and
a name from a file is a look-up: nothing is guessed from its spelling. Matrices that one side fuses (q, k and
v in one) are cut by the row counts of the model's own modules.

`int8run.lora.match` asks for the targets of a file's modules; nothing here knows files or adapters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.lora.key_parsing import remove_torch_wrappers
from int8run.lora.row_slices import ModuleTargets, RowSlice, RowSlices, cut_rows, merge_neighbors, to_targets
from int8run.models.key_mapping import KeyMapping, load_lora_mappings
from int8run.models.name_pattern import fill_pattern, find_greatest_number, match_pattern

# levels that wrap a module, anywhere in its name
WRAPPER_LEVELS = ("model", "module")
# objects that hold a denoiser, at the beginning of a name
WRAPPER_FRONTS = (
    "base_model",
    "denoiser",
    "denoising_unet",
    "dit",
    "ema",
    "ema_model",
    "generator",
    "inner_model",
    "net",
    "network",
    "pipe",
    "student",
    "transformer",
    "unet",
    "velocity_model",
)


class NameTable:
    """Every name that the modules of a model can have in a file.

    Args:
        modules: the model's modules by name; those without a weight are passed over.
        mappings: of the names that the model's authors use.
        parameters: those that are not the weight or bias of a module, such as tables of modulations; each
            is looked up like a module.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        mappings: Iterable[KeyMapping],
        parameters: Mapping[str, Tensor] | None = None,
    ):
        shapes = {name: tuple(parameter.shape) for name, parameter in (parameters or {}).items()}
        shapes |= {name: get_weight_shape(module) for name, module in modules.items()}
        row_counts = {name: shape[0] for name, shape in shapes.items() if shape}
        mappings = tuple(mappings)
        slices_by_name = expand_names(map_modules_to_rows(row_counts, mappings), mappings)

        # more than one entry for a name: it has several meanings
        self.targets_by_name: dict[str, list[ModuleTargets]] = {}
        for name, row_slices in slices_by_name.items():
            self.targets_by_name[name] = [to_targets(slices) for slices in row_slices]
        self.targets_by_flat_name: dict[str, list[ModuleTargets]] = {}
        for name, meanings in self.targets_by_name.items():
            known = self.targets_by_flat_name.setdefault(flatten_name(name), [])
            known += [targets for targets in meanings if targets not in known]

    @classmethod
    def from_model(cls, model: nn.Module) -> "NameTable":
        """The table of a model, with the mappings of its class; without any it has its own names only."""
        mappings = load_lora_mappings(type(model).__name__)
        # blocks that were compiled one by one pass attributes on, so that names without a wrapper find them
        modules = {remove_torch_wrappers(name): module for name, module in model.named_modules()}
        return cls(modules, mappings, find_own_parameters(model))

    def find_targets(self, name: str) -> ModuleTargets | None:
        """The modules that a name in a file stands for.

        Args:
            name: without the prefix of its component; as in diffusers or as the authors' own, dotted or
                flattened.

        Returns:
            None for a name that no module has, containers included, and for a part of a fused module whose
            row counts are not known.

        Raises:
            LoraError: when two modules have this name.
        """
        meanings = self.find_meanings(name)
        if len(meanings) > 1:
            modules = " or ".join(sorted({targets[0].module for targets in meanings}))
            raise LoraError(
                f"the name {name} can mean {modules} of this model; "
                "rename the key in the LoRA file to the one that is meant"
            )
        return meanings[0] if meanings else None

    def find_meanings(self, name: str) -> list[ModuleTargets]:
        """Everything that a name can stand for, by the first of its spellings that is known."""
        for flat_name in iter_flat_names(name):
            meanings = self.targets_by_flat_name.get(flat_name)
            if meanings:
                return meanings
        return []

    def find_all_targets(self, names: Iterable[str]) -> dict[str, ModuleTargets | None]:
        """The targets of several names, see `find_targets`."""
        return {name: self.find_targets(name) for name in names}


def find_own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of modules that have no weight, such as tables of modulations."""
    parameters = {}
    for module_name, module in model.named_modules():
        if get_weight_shape(module):
            continue
        prefix = remove_torch_wrappers(module_name)
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            parameters[name] = parameter
    return parameters


def find_target_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module that a name of `NameTable` stands for; None: it is not there."""
    try:
        return find_target(model, name)[0]
    except AttributeError:
        return None


def find_target(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What a name of `NameTable` stands for: a module and `weight`, or a module and another parameter."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    target = getattr(owner, attribute)
    if isinstance(target, nn.Module):
        return target, "weight"
    return owner, attribute


def get_target_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of what a name of `NameTable` stands for."""
    module, attribute = find_target(model, name)
    if attribute == "weight":
        return get_weight_shape(module)
    return tuple(getattr(module, attribute).shape)


def iter_flat_names(name: str) -> Iterator[str]:
    """A name with underscores for dots, then without the objects around the model that a trainer had.

    They are taken off last, because a model may have a module of such a name.
    """
    yield flatten_name(name)
    pieces = name.split(".")
    if len(pieces) > 1:
        inner = [piece for piece in pieces if piece not in WRAPPER_LEVELS]
        while len(inner) > 1 and inner[0] in WRAPPER_FRONTS:
            inner = inner[1:]
        yield flatten_name(".".join(inner))
        return
    while True:
        front = next((level for level in WRAPPER_LEVELS if name.startswith(f"{level}_")), None)
        if front is None:
            return
        name = name.removeprefix(f"{front}_")
        yield name


def get_weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a module's weight, also when it is quantized; empty for a module without one."""
    rows = getattr(module, "out_features", None)
    columns = getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns  # an INT8 layer keeps its weight in its backend's own layout
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def flatten_name(name: str) -> str:
    """A name as kohya's trainer writes it: dots become underscores."""
    return name.replace(".", "_")


def map_modules_to_rows(
    row_counts: Mapping[str, int], mappings: Iterable[KeyMapping]
) -> dict[str, RowSlices]:
    """The rows behind each module name; parts of a module that the model has fused are rows of that one.

    After diffusers' `fuse_qkv_projections()` the separate `to_q`, `to_k`, `to_v` are still there but no
    longer used: a change of them would do nothing. They tell how many rows each part has. Without them, or
    when they do not add up to the fused rows, it is unknown which rows are theirs, and they get no name.

    Args:
        row_counts: module -> rows of its weight.
        mappings: those with several targets say which modules can be fused.
    """
    known: dict[str, RowSlices] = {}
    for name, num_rows in row_counts.items():
        known[name] = (RowSlice(name, start=0, count=num_rows, total=num_rows),)
    fusions = [mapping for mapping in mappings if len(mapping.targets) > 1]
    for fused, total in row_counts.items():
        for fusion in fusions:
            values = match_pattern(fusion.original, fused)
            if values is None:
                continue
            parts = [fill_pattern(target, values) for target in fusion.targets]
            if not add_up_to(total, parts, row_counts):
                for part in parts:
                    known.pop(part, None)
                continue
            start = 0
            for part in parts:
                known[part] = (RowSlice(fused, start=start, count=row_counts[part], total=total),)
                start += row_counts[part]
    return known


def add_up_to(total: int, parts: Sequence[str], row_counts: Mapping[str, int]) -> bool:
    """Whether all parts of a fused module are known, and have as many rows as it has."""
    if not all(part in row_counts for part in parts):
        return False
    return sum(row_counts[part] for part in parts) == total


def expand_names(
    modules: Mapping[str, RowSlices], mappings: Sequence[KeyMapping]
) -> dict[str, list[RowSlices]]:
    """All names: the modules' own, and what the mappings, read from right to left, make of known names.

    A mapping counts once on the way to a name, so that one that adds a level ends. One with several targets
    needs all of them.

    Returns:
        The rows behind each name; more than one entry: the name has several meanings.
    """
    known = {name: [slices] for name, slices in modules.items()}
    used: dict[str, frozenset[int]] = dict.fromkeys(known, frozenset())  # name -> mappings on the way to it
    last_indices = {
        mapping: find_greatest_number(mapping.targets[0], modules)
        for mapping in mappings
        if mapping.swap_halves == "last"
    }
    newest = list(known)
    while newest:
        found: dict[str, frozenset[int]] = {}
        for name in newest:
            for i, mapping in enumerate(mappings):
                if i in used[name]:
                    continue
                result = map_to_original(name, mapping, known, last_indices.get(mapping))
                if result is None:
                    continue
                original, slices = result
                if original not in known:
                    found[original] = used[name] | {i}
                meanings = known.setdefault(original, [])
                if slices not in meanings:
                    meanings.append(slices)
        used |= found
        newest = list(found)
    return known


def map_to_original(
    name: str, mapping: KeyMapping, known: Mapping[str, Sequence[RowSlices]], last_index: int | None
) -> tuple[str, RowSlices] | None:
    """The authors' name that a mapping makes of a known one, and the rows behind it.

    Args:
        name: the first of the mapping's targets, if it matches.
        mapping: the one to read from right to left.
        known: the rows behind each name so far.
        last_index: the greatest index of such modules, for `swap_halves: last`.

    Returns:
        None when the name does not match, or another target is missing.
    """
    values = match_pattern(mapping.targets[0], name)
    if values is None:
        return None
    parts = [fill_pattern(target, values) for target in mapping.targets]
    if not all(part in known for part in parts):
        return None

    part_slices: list[RowSlice] = []
    for part in parts:
        part_slices += known[part][0]
    slices = merge_neighbors(part_slices)
    if mapping.part is not None:
        if len(slices) != 1 or slices[0].count % mapping.part[1]:
            return None
        slices = (cut_rows(slices[0], *mapping.part),)
    is_swapped = mapping.swap_halves is True
    if mapping.swap_halves == "last":
        is_swapped = int(values[0][0]) == last_index
    if is_swapped:
        slices = tuple(replace(rows, is_swapped=not rows.is_swapped) for rows in slices)
    return fill_pattern(mapping.original, values), slices
