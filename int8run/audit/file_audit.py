"""Audit a whole file: every layer in the order of its bytes, then what is wrong with them, then the grade.

`tasks.audit` finds out which tensors of the base belong to those of the file, and calls `audit_file`. One
layer at a time is in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from int8run.audit.base_weight import FLOAT_DTYPES, BaseFiles, BaseTensor
from int8run.audit.compare_layer import compare_layer
from int8run.audit.damage import leave_out_damage
from int8run.audit.file_checks import list_file_findings
from int8run.audit.float_tensors import measure_change
from int8run.audit.grades import Finding, choose_grade, load_grades
from int8run.audit.layer_audit import LayerAudit, judge_layer
from int8run.audit.layer_findings import list_layer_findings
from int8run.audit.layer_source import LayerSource
from int8run.audit.stored_numbers import describe_stored, inspect_numbers, suggest_rotations
from int8run.checkpoints.layer import FLOAT, CheckpointLayer
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles


@dataclass(frozen=True, kw_only=True)
class AuditedFile:
    """A file to be audited, and all that is known of it from headers.

    Args:
        files: the file.
        layers: its weights by name.
        prefix: before the keys of the model.
        markers: what it says of each layer.
        provenance: how int8run made it; empty when another program did.
        base: to compare with; None: there is none.
        matches: key of the file -> what the base has for it.
        base_prefix: before the base's keys of the model.
        rules: layer -> why the family's rules keep it float, `layer_findings.QUANTIZED` where they do not;
            None: no family is known.
    """

    files: TensorFiles
    layers: Mapping[str, CheckpointLayer]
    prefix: str
    markers: Mapping[str, Marker]
    provenance: Mapping[str, Any]
    base: BaseFiles | None = None
    matches: Mapping[str, BaseTensor] = field(default_factory=dict)
    base_prefix: str = ""
    rules: Mapping[str, str] | None = None

    def list_quantized(self) -> list[CheckpointLayer]:
        """The layers that are stored in few bits, in the order of the file."""
        return [layer for layer in self.layers.values() if layer.storage_dtype != FLOAT]

    def list_float_keys(self) -> list[str]:
        """The float tensors of the model, but what belongs to quantized layers."""
        siblings = {key for layer in self.layers.values() for key in layer.sibling_keys}
        quantized = {layer.key for layer in self.list_quantized()}
        return [
            key
            for key, info in self.files.items()
            if key.startswith(self.prefix)
            and key not in siblings
            and key not in quantized
            and info.dtype in FLOAT_DTYPES
        ]

    def count_bytes(self) -> int:
        """How many bytes an audit reads, about."""
        own = sum(info.nbytes for info in self.files.values())
        keys = {key for match in self.matches.values() for key in match.keys}
        of_base = 0 if self.base is None else sum(self.base.files[key].nbytes for key in keys)
        return own + of_base


@dataclass(frozen=True, kw_only=True)
class FileAudit:
    """What an audit found.

    Args:
        grade: a letter.
        findings: what is wrong, the worst first.
        layers: all weights, in the order of the file.
        changed_floats: key of a float tensor -> how far it is from the base's, of those that differ at all.
        num_floats_compared: float tensors that were compared.
        has_base: whether there was a base.
    """

    grade: str
    findings: Sequence[Finding]
    layers: Sequence[LayerAudit]
    changed_floats: Mapping[str, float]
    num_floats_compared: int
    has_base: bool

    @property
    def quantized(self) -> list[LayerAudit]:
        """The layers that are stored in few bits."""
        return [layer for layer in self.layers if layer.is_quantized]

    def count_recipes(self) -> Counter[str]:
        """Recipe -> layers that it gives to the bit."""
        return Counter(layer.recipe for layer in self.quantized if layer.is_reproduced)


def audit_file(audited: AuditedFile, on_bytes: Callable[[int], None] = lambda count: None) -> FileAudit:
    """Audit a file.

    Args:
        audited: the file and its base.
        on_bytes: called with the number of bytes read, for progress.

    Raises:
        FileError: when a tensor cannot be read.
    """
    layers = list(audit_layers(audited, on_bytes))
    changed = compare_floats(audited, on_bytes)
    findings = [
        *list_layer_findings(layers),
        *list_file_findings(audited.files, audited, layers, changed),
    ]
    misfits = list_misfits(audited)
    if misfits:
        findings.append(Finding("other_shape", tuple(misfits), "", len(audited.list_float_keys())))
    findings = leave_out_damage(findings, layers)
    order = list(load_grades().grades)
    findings.sort(key=lambda finding: -order.index(finding.kind.grade))
    quantized = [layer for layer in layers if layer.is_quantized]
    grade = choose_grade(
        findings,
        has_base=audited.base is not None,
        is_reproduced=bool(quantized) and all(layer.is_reproduced for layer in quantized),
    )
    return FileAudit(
        grade=grade,
        findings=findings,
        layers=layers,
        changed_floats={key: change for key, change in changed.items() if change > 0},
        num_floats_compared=len(changed),
        has_base=audited.base is not None,
    )


def audit_layers(audited: AuditedFile, on_bytes: Callable[[int], None]) -> Iterator[LayerAudit]:
    """Audit the weights with two dimensions, and all quantized ones, one after the other.

    Args:
        audited: the file and its base.
        on_bytes: called with the number of bytes read.
    """
    quantized = {layer.name for layer in audited.list_quantized()}
    suggestions = {}
    if audited.base is None:
        suggestions = suggest_rotations(audited.files, audited.list_quantized())
    for layer in audited.layers.values():
        match = audited.matches.get(layer.key)
        if layer.name not in quantized:
            audit = describe_stored(audited.files, layer)
        else:
            audit = audit_quantized(audited, layer, match, suggestions.get(layer.name, ""))
            on_bytes(audited.files[layer.key].nbytes + (0 if match is None else match.nbytes))
        if audited.rules is not None:
            audit.rule = audited.rules.get(layer.name, "")
        yield audit


def audit_quantized(
    audited: AuditedFile, layer: CheckpointLayer, match: BaseTensor | None, suggestion: str
) -> LayerAudit:
    """Audit one quantized layer.

    Args:
        audited: the file.
        layer: of it.
        match: what the base has for it; None: nothing.
        suggestion: the rotation that the tails of its numbers suggest; empty: none.
    """
    limits = load_grades().limits
    if match is None:
        audit = inspect_numbers(audited.files, layer)
        audit.found_rotation = suggestion
    elif not fits_base(layer, match.shape):
        audit = inspect_numbers(audited.files, layer)
        audit.codes = ["other_shape"]
        return audit
    else:
        audit = compare_layer(LayerSource(audited.files, layer, match), limits)
    audit.codes = judge_layer(audit, limits)
    return audit


def fits_base(layer: CheckpointLayer, shape: tuple[int, ...] | None) -> bool:
    """Whether a layer can be the base's weight of this shape; None: the base has none that makes sense."""
    if shape is None:
        return False
    if len(layer.shape) != 2:
        return layer.shape == shape
    return layer.fits_shape(shape)


def list_misfits(audited: AuditedFile) -> list[str]:
    """The float tensors that the base has with another number of elements, and which cannot be compared."""
    misfits = []
    for key in audited.list_float_keys():
        match = audited.matches.get(key)
        if match is None or match.shape is None:
            continue
        if prod(match.shape) != prod(audited.files[key].shape):
            misfits.append(key)
    return misfits


def compare_floats(audited: AuditedFile, on_bytes: Callable[[int], None]) -> dict[str, float]:
    """Compare the float tensors that the base has in the same shape.

    Args:
        audited: the file and its base.
        on_bytes: called with the number of bytes read.

    Returns:
        Key -> how far it is from the base's; 0: equal.
    """
    changes = {}
    for key in audited.list_float_keys():
        match = audited.matches.get(key)
        if match is None or match.shape != audited.files[key].shape:
            continue
        changes[key] = measure_change(audited.files, key, match)
        on_bytes(audited.files[key].nbytes + match.nbytes)
    return changes
