"""Read a LoRA file: its keys by module, and the change that each module's tensors make.

Where a key is taken apart is `int8run.lora.key_parsing`, which keys make a module `int8run.lora.key_groups`,
where the tensors of a module become an adapter `int8run.lora.parse`. Module names stay as the file has them:
which module of a model is meant, only `int8run.lora.match` knows.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8run.checkpoints.header import read_header
from int8run.errors import FileError, LoraError
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.change import LoraChange
from int8run.lora.find import get_file_title
from int8run.lora.initial_factors import (
    find_initial_adapter,
    relative_base_error,
    split_initial_keys,
    subtract_initial,
)
from int8run.lora.key_groups import ModuleKeys, choose_keys, describe_copies, group_keys
from int8run.lora.key_parsing import PEFT_OFT_PART, parse_key
from int8run.lora.parse import (
    build_change,
    compute_peaks,
    dequantize_factors,
    get_part_name,
    to_computable_dtype,
)
from int8run.lora.part_dtypes import check_dtype
from int8run.lora.peft_config import check_parts, check_settings, find_relative_initialization
from int8run.lora.sanity_checks import SanityChecks
from int8run.lora.scale import ModuleNames, Scales
from int8run.lora.size_limits import check_peaks, check_product
from int8run.lora.written_settings import (
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    WrittenSettings,
    list_unread_alphas,
    read_settings,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraFile:
    """What a file holds.

    Args:
        path: of the file.
        changes: component -> module name as in the file, without prefixes -> what is done to that module.
        skipped_keys: keys that are not applied, each with the reason.
        metadata: the metadata of the header, untrusted.
        notes: what a user should know about the file before using it.
        outside: what is part of the changes and not of the file's tensors: (component, module, scale) of
            scales that stand elsewhere, (component, setting, value) of PEFT's OFT, and the identity of a file
            with initial factors.
    """

    path: Path
    changes: Mapping[str, Mapping[str, LoraChange]]
    skipped_keys: tuple[tuple[str, str], ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    outside: tuple[object, ...] = ()

    @property
    def title(self) -> str:
        """What messages call the file."""
        return get_file_title(self.path)

    @property
    def all_changes(self) -> list[LoraChange]:
        """The changes of all components."""
        changes: list[LoraChange] = []
        for change_by_name in self.changes.values():
            changes += change_by_name.values()
        return changes

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
        """A hash of the tensors' bytes and of `outside`: equal for copies of a file, whatever the names in
        it are."""
        with self.path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_size)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.outside:
            return digest
        return hashlib.sha256(repr((digest, self.outside)).encode()).hexdigest()


@dataclass(frozen=True)
class OpenLora:
    """A file that is being read.

    Args:
        path: of the file.
        dtypes: key -> safetensors' name of its dtype.
        metadata: of its header, untrusted.
        get_tensor: key -> tensor.
        written: what its writer says outside of the tensors.
        is_initial: only its low-rank pairs are needed, as factors that are subtracted from another file's.
    """

    path: Path
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]
    get_tensor: Callable[[str], Tensor]
    written: WrittenSettings
    is_initial: bool = False


@contextmanager
def open_lora(path: Path) -> Iterator[OpenLora]:
    """Open a file, and read what its writer says outside of the tensors.

    Raises:
        LoraError: when it is damaged, or the settings beside it are.
    """
    try:
        entries, metadata = read_header(path)
        with safe_open(path, framework="pt") as file:
            yield OpenLora(
                path=path,
                dtypes={key: entry["dtype"] for key, entry in entries.items()},
                metadata=metadata,
                get_tensor=file.get_tensor,
                written=read_settings(path, metadata),
            )
    except LoraError:
        raise
    except (SafetensorError, OSError, FileError) as error:
        reason = str(error).removeprefix(str(path)).removeprefix(":").strip()
        raise LoraError(f"{path} is not a readable safetensors file: {reason}") from error


def read_lora(path: Path) -> LoraFile:
    """Read every change in a file, and check what can be checked without the model that it is for.

    The scale is `alpha / rank`, from `<module>.alpha`, `adapter_config.json` beside the file or its header,
    else 1. A LoRA that is relative to a changed base (PiSSA, ...) has its initial factors subtracted.

    Raises:
        LoraError: for a damaged file, a module with parts missing or that do not fit each other, integers
            without their scale, a name that is in the file twice, values that are not finite, places that
            contradict each other about the scale, or a change that is relative to another base.
    """
    with open_lora(path) as opened:
        initialization = check_written_settings(opened, list_components(opened))
        if initialization is None:
            return read_modules(opened, opened.dtypes)
        keys, initial_keys = split_initial_keys(opened.dtypes)
        initial = read_initial_factors(opened, initial_keys, initialization)
        return subtract_initial_factors(read_modules(opened, keys), initial)


def list_components(opened: OpenLora) -> set[str]:
    """The components whose settings are to be checked; none where nothing is written about any."""
    if not opened.written.places:
        return set()
    return {parse_key(key).component for key in opened.dtypes}


def check_written_settings(opened: OpenLora, components: Iterable[str]) -> str | None:
    """Check the PEFT settings of a file; what is seen and not applied is a warning.

    Returns:
        The initialization that changed the base weights; None: the change is relative to the model.

    Raises:
        LoraError: for settings that make another change than is computed here.
    """
    warnings = list(opened.written.warnings)
    initialization = None
    try:
        for place in opened.written.places:
            for component in sorted(components):
                if place.is_peft:
                    warnings += check_settings(place, component)
                initialization = initialization or find_relative_initialization(place, component)
    except LoraError as error:
        raise LoraError(f"{opened.path}: {error}") from error
    warn(opened.path, warnings)
    return initialization


def read_initial_factors(opened: OpenLora, initial_keys: Mapping[str, str], initialization: str) -> LoraFile:
    """The initial factors of a LoRA, from the same file or beside it.

    Args:
        opened: the LoRA.
        initial_keys: key -> key in the same file; empty: it has none.
        initialization: for messages.

    Raises:
        LoraError: when they are nowhere.
    """
    if initial_keys:
        renamed = replace(
            opened,
            dtypes={key: opened.dtypes[there] for key, there in initial_keys.items()},
            get_tensor=lambda key: opened.get_tensor(initial_keys[key]),
            is_initial=True,
        )
        return read_modules(renamed, renamed.dtypes)
    initial_path = find_initial_adapter(opened.path)
    if initial_path is None:
        raise LoraError(f"{opened.path} {relative_base_error(initialization)}")
    title = get_file_title(opened.path)
    log.info("%s: initialized by %s; initial factors from %s", title, initialization, initial_path)
    with open_lora(initial_path) as initial:
        # a bare file has the settings of the LoRA that it belongs to
        written = initial.written if initial.written.has_settings else opened.written
        return read_modules(replace(initial, written=written, is_initial=True), initial.dtypes)


def subtract_initial_factors(file: LoraFile, initial: LoraFile) -> LoraFile:
    """A LoRA without what its initial factors had taken out of the base.

    Raises:
        LoraError: when they are not those of this LoRA.
    """
    changes: dict[str, dict[str, LoraChange]] = {}
    for component, changes_by_name in file.changes.items():
        for name, change in changes_by_name.items():
            start = initial.changes.get(component, {}).get(name)
            try:
                changes.setdefault(component, {})[name] = subtract_initial(change, start)
            except LoraError as error:
                raise LoraError(f"{file.path}: {name} {error}") from error
    return replace(file, changes=changes, outside=(*file.outside, initial.identity))


def warn(path: Path, lines: Sequence[str]) -> None:
    """Log what a user should know about the settings of a file."""
    for line in dict.fromkeys(lines):
        log.warning("%s: %s", get_file_title(path), line)


def read_modules(opened: OpenLora, keys: Iterable[str]) -> LoraFile:
    """Read the modules of an open file, one after the other, see `read_lora`."""
    groups = group_keys(opened.path, keys)
    scales = Scales(opened.written)
    checks = SanityChecks()
    num_copies = 0  # modules whose tensors are in the file more than once
    changes: dict[str, dict[str, LoraChange]] = {}
    for module in groups.modules:
        try:
            key_by_part = choose_keys(module, opened.get_tensor)
            change, peaks = read_module(opened, module, key_by_part, scales)
        except LoraError as error:
            raise LoraError(f"{opened.path}: {module.name} {error}") from error
        checks.add(module.name, peaks, change)
        if len(module.keys) > len(key_by_part):
            num_copies += 1
        changes.setdefault(module.component, {})[module.name] = change

    outside_scales = sorted((*module, scale) for module, scale in scales.outside.items())
    oft_settings = list_oft_settings(opened.written, groups.modules)
    warn(opened.path, list_scale_warnings(opened, scales))
    return LoraFile(
        path=opened.path,
        changes=changes,
        skipped_keys=tuple(groups.skipped.items()),
        metadata=opened.metadata,
        notes=(*describe_copies(num_copies), *checks.list_notes()),
        outside=(*outside_scales, *oft_settings),
    )


def read_module(
    opened: OpenLora, module: ModuleKeys, key_by_part: Mapping[str, str], scales: Scales
) -> tuple[LoraChange, dict[str, float]]:
    """The change of one module, and the largest magnitude of each of its parts.

    Raises:
        LoraError: see `read_lora`; a sentence without its subject.
    """
    component, name = module.component, module.name
    for part, key in key_by_part.items():
        check_dtype(part, get_part_name(part), opened.dtypes[key])
    if not opened.is_initial:
        for place in opened.written.places:
            check_parts(place.get_settings(component), place.name, key_by_part)

    tensors = {part: to_computable_dtype(part, opened.get_tensor(key)) for part, key in key_by_part.items()}
    floats = dequantize_factors(tensors)
    peaks = compute_peaks(floats)
    check_peaks(peaks)
    first_key = next(iter(key_by_part.values()))
    names = ModuleNames(name, find_full_name(name, first_key))
    get_scale = partial(scales.get_scale, component, names, floats.get("alpha"))
    oft_settings = opened.written.get_oft_settings(component) if PEFT_OFT_PART in floats else {}
    change = build_change(floats, get_scale, oft_settings)
    check_product(peaks, change)
    return change, peaks


def list_oft_settings(written: WrittenSettings, modules: Iterable[ModuleKeys]) -> list[tuple[str, str, str]]:
    """Component, setting and value of what makes rotations of PEFT's OFT, and stands in no tensor."""
    components = {module.component for module in modules if PEFT_OFT_PART in module.by_part}
    found = []
    for component in sorted(components):
        for name, value in written.get_oft_settings(component).items():
            found.append((component, name, repr(value)))
    return found


def find_full_name(name: str, key: str) -> str:
    """The name of a module as it stands in one of its keys, prefixes included."""
    before, found, _ = key.partition(name)
    return before + found


def list_scale_warnings(opened: OpenLora, scales: Scales) -> list[str]:
    """What is odd about where the scales of a file come from."""
    lines = scales.list_warnings()
    if not scales.num_without_alpha:
        return lines
    lines += list_unread_alphas(opened.metadata)
    is_from_peft = any(key.startswith(PEFT_PREFIX) for key in opened.dtypes)
    if is_from_peft and not opened.written.places:
        lines.append(
            f"its names are PEFT's, which writes alpha into {ADAPTER_CONFIG}, and there is none beside it: "
            "alpha / rank is taken as 1"
        )
    return lines
