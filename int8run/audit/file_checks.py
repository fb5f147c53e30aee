"""What is wrong with a file as a whole: labels, markers, its note, and what is missing beside the base.

`file_audit` calls `list_file_findings`. Numbers of weights are not read here.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from int8run.audit.base_weight import BaseFiles, BaseTensor
from int8run.audit.damage import check_hash, is_all_reproduced
from int8run.audit.float_tensors import holds_nan
from int8run.audit.grades import Finding, load_grades
from int8run.audit.layer_audit import LayerAudit
from int8run.audit.layer_findings import is_other_model, join_counts, shorten_name
from int8run.checkpoints.format_names import name_granularity, promised_granularities
from int8run.checkpoints.int8_transform import is_transformed_by_tensors
from int8run.checkpoints.layer import FLOAT, INT8, CheckpointLayer
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles
from int8run.utils.plurals import count_noun

WEIGHT, BIAS = ".weight", ".bias"
ABSMAX = "absmax"
MAX_SHOWN_SHARE = 10.0  # damaged numbers differ by any power of ten


class KnownFile(Protocol):
    """What this module uses of an `AuditedFile`, which is defined above it."""

    @property
    def layers(self) -> Mapping[str, CheckpointLayer]:
        """Weights by name."""
        ...

    @property
    def markers(self) -> Mapping[str, Marker]:
        """What the file says of each layer."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How int8run made it."""
        ...

    @property
    def base(self) -> BaseFiles | None:
        """To compare with."""
        ...

    @property
    def matches(self) -> Mapping[str, BaseTensor]:
        """What the base has for each key."""
        ...

    @property
    def base_prefix(self) -> str:
        """Before the base's keys of the model."""
        ...

    def list_float_keys(self) -> list[str]:
        """The float tensors of the model, but what belongs to quantized layers."""
        ...


def list_file_findings(
    files: TensorFiles, known: KnownFile, layers: Sequence[LayerAudit], changed: Mapping[str, float]
) -> Iterator[Finding]:
    """What is wrong with a file as a whole.

    Args:
        files: the file.
        known: of it, from headers.
        layers: audited.
        changed: float tensor -> how far it is from the base's.
    """
    yield from check_labels(known)
    yield from check_provenance(known, layers)
    if known.base is None:
        yield from check_hash(files)
        yield from check_numbers(files, known)
        return
    # of a file that is reproduced every number is known: it is not read a second time
    if not is_all_reproduced(layers, changed, known.list_float_keys()):
        yield from check_hash(files)
    yield from check_floats(known, changed)
    yield from check_completeness(known, layers)


def check_labels(known: KnownFile) -> Iterator[Finding]:
    """Markers that contradict the shape of the scales, and INT8 layers without one."""
    wrong = Counter[str]()
    wrong_names, unmarked = [], []
    for name, layer in known.layers.items():
        marker = known.markers.get(name)
        if marker is None:
            needs_marker = layer.storage_dtype == INT8 and not is_transformed_by_tensors(layer.part_keys)
            if needs_marker:
                unmarked.append(name)
            continue
        text = find_wrong_label(layer, marker)
        if text:
            wrong[text] += 1
            wrong_names.append(name)
    if wrong:
        yield Finding("wrong_label", tuple(wrong_names), join_counts(wrong), len(known.layers))
    if unmarked:
        yield Finding("no_marker", tuple(unmarked), "", len(known.layers))


def find_wrong_label(layer: CheckpointLayer, marker: Marker) -> str:
    """What of a marker the shape of the scales contradicts; empty where nothing."""
    if not layer.granularity:
        return ""
    granularity = name_granularity(layer.granularity, layer.rows, layer.columns, marker)
    per_row = marker.fields.get("per_row")
    if granularity not in promised_granularities(marker):
        return f"labeled {marker.format_name or 'int8'}, with scales by {granularity}"
    if per_row is not None and per_row != (granularity == "row"):
        return f"labeled per_row={str(per_row).lower()}, with scales by {granularity}"
    return ""


def check_provenance(known: KnownFile, layers: Sequence[LayerAudit]) -> Iterator[Finding]:
    """What int8run's note says and the numbers deny."""
    note = known.provenance
    if not note:
        return
    details = []
    compared = [layer for layer in layers if layer.is_compared]
    if is_other_model(compared):  # of the source that the note means, this base shows nothing
        compared = []
    changed = [layer for layer in compared if "low_rank_change" in layer.codes]
    if changed and note.get("loras") == []:
        details.append(f"it says that no LoRA was baked in, and {count_noun(len(changed), 'layer')} hold one")
    others = [layer for layer in compared if layer.storage_dtype == INT8 and ABSMAX not in layer.recipe]
    if others and not changed and note.get("rounding") == ABSMAX and note.get("loras") == []:
        count = count_noun(len(others), "layer", "are")
        details.append(f"it says rounding=absmax of the source, and {count} not")
    kept_float = note.get("kept_float")
    if isinstance(kept_float, Mapping):
        quantized = [layer.name for layer in layers if layer.is_quantized and layer.name in kept_float]
        if quantized:
            details.append(f"it says that {quantized[0]} was kept float, and it is quantized")
    if details:
        yield Finding("wrong_provenance", (), "; ".join(details))


def check_numbers(files: TensorFiles, known: KnownFile) -> Iterator[Finding]:
    """Float tensors with NaN; beside a base, which has none, they are among those that differ."""
    keys = known.list_float_keys()
    broken = [key for key in keys if holds_nan(files, key)]
    if broken:
        places = join_counts(Counter(map(shorten_name, broken)))
        yield Finding("not_a_number", tuple(broken), places, len(keys))


def check_floats(known: KnownFile, changed: Mapping[str, float]) -> Iterator[Finding]:
    """Float tensors that are not the base's; a bias beside a quantized weight may be corrected for it.

    Args:
        known: of the file, from headers.
        changed: float tensor -> how far it is from the base's.
    """
    limit = load_grades().limits.max_float_error
    by_code: dict[str, dict[str, float]] = {"changed_float": {}, "corrected_bias": {}}
    for key, change in changed.items():
        if change > limit:
            code = "corrected_bias" if is_quantized_bias(known, key) else "changed_float"
            by_code[code][key] = change
    for code, found in by_code.items():
        if found:
            places = join_counts(Counter(shorten_name(key) for key in found))
            detail = f"{describe_changes(found.values())}: {places}"
            yield Finding(code, tuple(found), detail, len(changed))


def describe_changes(changes: Collection[float]) -> str:
    """By how much float tensors differ at most, and how many are beyond any share of the base's."""
    finite = [change for change in changes if math.isfinite(change)]
    texts = []
    if finite:
        texts.append(f"by up to {format_change(max(finite))}")
    num_others = len(changes) - len(finite)
    if num_others:
        texts.append(f"{num_others} from zeros, or by NaN or infinity")
    return ", ".join(texts)


def format_change(change: float) -> str:
    """A difference as a share of the base's size, or as a multiple of it where it is far larger."""
    if change < MAX_SHOWN_SHARE:
        return f"{100 * change:.0f} %"
    return f"{change:.3g} times their size"


def is_quantized_bias(known: KnownFile, key: str) -> bool:
    """Whether a tensor is the bias of a quantized layer."""
    layer = known.layers.get(key.removesuffix(BIAS))
    return key.endswith(BIAS) and layer is not None and layer.storage_dtype != FLOAT


def check_completeness(known: KnownFile, layers: Sequence[LayerAudit]) -> Iterator[Finding]:
    """Weights and other float tensors that only one of the two has."""
    assert known.base is not None
    used = {key for match in known.matches.values() for key in match.keys}
    base_layers = {
        name: layer for name, layer in known.base.layers.items() if name.startswith(known.base_prefix)
    }
    missing = [name for name, layer in base_layers.items() if layer.key not in used]
    yield from make_finding("missing_layer", missing, len(base_layers))
    base_floats = known.base.list_float_keys(known.base_prefix)
    missing_floats = [key for key in base_floats if key not in used]
    yield from make_finding("missing_float", leave_out_known(missing_floats, missing), len(base_floats))

    extra = [layer.name for layer in layers if f"{layer.name}{WEIGHT}" not in known.matches]
    yield from make_finding("extra_layer", extra, len(layers))
    weights = {layer.key for layer in known.layers.values()}
    own_floats = [key for key in known.list_float_keys() if key not in weights]
    extra_floats = [key for key in own_floats if key not in known.matches]
    yield from make_finding("extra_float", leave_out_known(extra_floats, extra), len(own_floats))


def leave_out_known(keys: Iterable[str], layers: Collection[str]) -> list[str]:
    """Tensors but biases of layers that are a finding themselves, and what models compute.

    Args:
        keys: of the tensors.
        layers: that are a finding.
    """
    table = load_grades()
    return [key for key in keys if key.removesuffix(BIAS) not in layers and not table.is_computed(key)]


def make_finding(code: str, names: Sequence[str], out_of: int) -> Iterator[Finding]:
    """A finding about some layers or tensors, with the places where they are; none where there are none.

    Args:
        code: of `grades.yaml`.
        names: of the layers or tensors.
        out_of: how many could have been about.
    """
    if names:
        yield Finding(code, tuple(names), join_counts(Counter(map(shorten_name, names))), out_of)
