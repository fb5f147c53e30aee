"""Read a LoRA file: its keys by module, and the change that each module's tensors make.

Where a key is taken apart is `int8run.lora.key_parsing`, where the tensors of a module become an adapter is
`int8run.lora.parse`. Module names stay as the file has them: which module of a model is meant, only
`int8run.lora.match` knows.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.change import LoraChange
from int8run.lora.key_parsing import parse_key
from int8run.lora.parse import build_change, compute_peaks, dequantize_factors, to_computable_dtype
from int8run.lora.peft_header import PeftHeader
from int8run.lora.sanity_checks import SanityChecks

# component, and the module's name in the file without prefixes
ModuleName = tuple[str, str]


@dataclass(frozen=True)
class LoraFile:
    """What a file holds.

    Args:
        path: of the file.
        changes: component -> module name as in the file, without prefixes -> what is done to that module.
        skipped_keys: keys that are not applied, each with the reason.
        metadata: the metadata of the header, untrusted.
        notes: what a user should know about the file before using it.
    """

    path: Path
    changes: Mapping[str, Mapping[str, LoraChange]]
    skipped_keys: tuple[tuple[str, str], ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def all_changes(self) -> list[LoraChange]:
        """The changes of all components."""
        return [change for by_name in self.changes.values() for change in by_name.values()]

    @property
    def deltas_with_rank(self) -> list[LoraDelta]:
        """The weight changes whose adapter type has a rank."""
        deltas = [change.weight_delta for change in self.all_changes]
        return [delta for delta in deltas if delta is not None and delta.rank is not None]

    @property
    def adapter_types(self) -> Counter[str]:
        """How many modules each adapter type changes."""
        return Counter(change.adapter_type for change in self.all_changes)

    @property
    def ranks(self) -> Counter[int]:
        """How many modules have each rank."""
        ranks = [delta.rank for delta in self.deltas_with_rank]
        return Counter(rank for rank in ranks if rank is not None)

    @property
    def scales(self) -> Counter[float]:
        """How many modules have each alpha / rank."""
        return Counter(delta.scale for delta in self.deltas_with_rank)

    @cached_property
    def identity(self) -> str:
        """A hash of the tensors' bytes: equal for copies of a file, whatever their names and headers say."""
        with self.path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_size)
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class KeyGroups:
    """The keys of a file by module.

    Args:
        modules: module -> part of its adapter -> key.
        skipped: key that is not applied -> reason.
        incomplete: module with such a key -> reason.
    """

    modules: dict[ModuleName, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    incomplete: dict[ModuleName, str] = field(default_factory=dict)


def read_lora(path: Path) -> LoraFile:
    """Read every change in a file, and check what can be checked without the model that it is for.

    The scale is `alpha / rank`, from `<module>.alpha` or the PEFT header (`lora_adapter_metadata`), else 1.

    Raises:
        LoraError: for a damaged file, a module with parts missing or that do not fit each other, integers
            without their scale, a name that is in the file twice, or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return read_modules(path, list(file.keys()), file.get_tensor, metadata)
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is not a readable safetensors file: {error}") from error


def read_modules(
    path: Path, keys: Iterable[str], get_tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> LoraFile:
    """Read the modules of an open file, one after the other, see `read_lora`."""
    groups = group_keys(path, keys)
    header, checks = PeftHeader(metadata), SanityChecks()
    skipped = dict(groups.skipped)
    changes: dict[str, dict[str, LoraChange]] = {}
    for module, keys_by_part in groups.modules.items():
        # without a part that is not applied, the rest would be another LoRA
        skip_reason = groups.incomplete.get(module) or find_skip_reason(keys_by_part.keys())
        if skip_reason is not None:
            skipped |= dict.fromkeys(keys_by_part.values(), skip_reason)
            continue

        component, name = module
        try:
            tensors = {part: to_computable_dtype(part, get_tensor(key)) for part, key in keys_by_part.items()}
            floats = dequantize_factors(tensors)
            peaks = compute_peaks(floats)
            change = build_change(floats, partial(header.get_scale, component, name, floats.get("alpha")))
        except LoraError as error:
            raise LoraError(f"{path}: {name} {error}") from error
        checks.add(name, peaks, change)
        changes.setdefault(component, {})[name] = change

    return LoraFile(
        path=path,
        changes=changes,
        skipped_keys=tuple(skipped.items()),
        metadata=metadata,
        notes=checks.list_notes(),
    )


def group_keys(path: Path, keys: Iterable[str]) -> KeyGroups:
    """Sort the keys of a file by module.

    Raises:
        LoraError: when two keys are the same part of the same module.
    """
    groups = KeyGroups()
    for key in keys:
        component, name, part, reason = parse_key(key)
        module = component, name
        if part is None:
            groups.skipped[key] = groups.incomplete[module] = reason
            continue
        first_key = groups.modules.setdefault(module, {}).setdefault(part, key)
        if first_key != key:
            raise LoraError(
                f"{path}: {name} is in the file twice, as {first_key} and {key}; "
                "which one is meant cannot be told"
            )
    return groups


def find_skip_reason(parts: Iterable[str]) -> str | None:
    """Why the parts of a module do nothing; None: they do something."""
    parts = set(parts)
    if parts == {"alpha"}:
        return "an alpha without a change"
    if "weight" in parts and "on_input" not in parts:
        return "a weight of a model, not a change of one"
    return None
