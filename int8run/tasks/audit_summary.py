"""What audit.json holds, and audit.html shows: facts in words, findings, layers.

Called by `tasks.audit`; `report.audit_page` shows it. Nothing is read or printed here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from int8run.audit.file_audit import AuditedFile, FileAudit
from int8run.audit.grades import Finding, load_grades
from int8run.audit.layer_audit import LayerAudit
from int8run.audit.layer_findings import join_counts
from int8run.tasks.audit_sources import ReadFile
from int8run.tasks.quantize_common import hash_checkpoint

SCHEMA = 1
UNPROVABLE = (
    "without the float file that this was made from nobody can say how exact the weights are, whether they "
    "are this model's, or whether something was baked in; task.base=FILE names it"
)


def describe_audit(
    audit: FileAudit, audited: AuditedFile, read: ReadFile, base: ReadFile | None
) -> dict[str, Any]:
    """All that was found.

    Args:
        audit: what was found.
        audited: the file, from headers.
        read: the file.
        base: what it was compared with; None: nothing.
    """
    table = load_grades()
    base_path = None if base is None else str(base.files.path)
    return {
        "schema": SCHEMA,
        "file": str(read.files.path),
        "base": base_path,
        "grade": audit.grade,
        "grade_meaning": table.grades[audit.grade],
        "grades": dict(table.grades),
        "facts": [{"name": name, "text": text} for name, text in list_facts(audit, audited, read, base)],
        "unprovable": UNPROVABLE if base is None else "",
        "findings": [describe_finding(finding) for finding in audit.findings],
        "recipes": [
            {"recipe": recipe, "layers": count} for recipe, count in audit.count_recipes().most_common()
        ],
        "changed_floats": dict(audit.changed_floats),
        "provenance": dict(audited.provenance),
        "layers": [layer.to_json() for layer in audit.layers],
    }


def describe_unreadable(path: Path, message: str) -> dict[str, Any]:
    """The same of a file whose layers cannot be read.

    Args:
        path: of the file.
        message: why.
    """
    table = load_grades()
    finding = Finding("unreadable", (), message)
    grade = finding.kind.grade
    return {
        "schema": SCHEMA,
        "file": str(path),
        "base": None,
        "grade": grade,
        "grade_meaning": table.grades[grade],
        "grades": dict(table.grades),
        "facts": [],
        "unprovable": "",
        "findings": [describe_finding(finding)],
        "recipes": [],
        "changed_floats": {},
        "provenance": {},
        "layers": [],
        "reader_warnings": [],
    }


def describe_finding(finding: Finding) -> dict[str, Any]:
    """A finding as audit.json has it."""
    return {
        "code": finding.code,
        "grade": finding.kind.grade,
        "title": finding.kind.title,
        "advice": finding.kind.advice,
        "detail": finding.detail,
        "names": list(finding.names),
        "out_of": finding.out_of,
    }


def list_facts(
    audit: FileAudit, audited: AuditedFile, read: ReadFile, base: ReadFile | None
) -> list[tuple[str, str]]:
    """The file in words, one fact a line.

    Args:
        audit: what was found.
        audited: the file, from headers.
        read: the file.
        base: what it was compared with; None: nothing.
    """
    quantized = audit.quantized
    facts = [
        ("family", read.family),
        ("quantized layers", f"{len(quantized)} of {len(audit.layers)}"),
        ("formats", join_counts(Counter(layer.label for layer in quantized))),
    ]
    if base is not None:
        facts += list_comparison_facts(audit, quantized)
        facts.append(("source", describe_source(audited.provenance, base)))
    saturated = [layer.saturated_share for layer in quantized if layer.saturated_share is not None]
    if saturated:
        mean = 100 * sum(saturated) / len(saturated)
        text = f"{mean:.2f} % of a layer's numbers in the mean, {100 * max(saturated):.2f} % at most"
        facts.append(("at the end of the range", text))
    loras = audited.provenance.get("loras")
    if loras:
        facts.append(("LoRAs by its note", str(loras)))
    return [(name, text) for name, text in facts if text]


def list_comparison_facts(audit: FileAudit, quantized: Sequence[LayerAudit]) -> list[tuple[str, str]]:
    """What the comparison with the base shows.

    Args:
        audit: what was found.
        quantized: the layers that are stored in few bits.
    """
    recipes = audit.count_recipes()
    reproduced = f"{recipes.total()} of {len(quantized)}"
    if recipes:
        reproduced += f" ({join_counts(recipes)})"
    proven = Counter(layer.found_rotation for layer in quantized if layer.is_proven)
    facts = [("reproduced to the bit", reproduced), ("proven rotations", join_counts(proven))]
    sqnr = [layer.sqnr_db for layer in quantized if layer.sqnr_db is not None and layer.is_proven]
    if sqnr:
        facts.append(("weight SQNR, mean / min", f"{sum(sqnr) / len(sqnr):.1f} / {min(sqnr):.1f} dB"))
    equal = audit.num_floats_compared - len(audit.changed_floats)
    facts.append(("float tensors", f"{equal} of {audit.num_floats_compared} equal to the base's"))
    return facts


def describe_source(provenance: Mapping[str, Any], base: ReadFile) -> str:
    """Whether the base is the very file that the note of a file of ours names; empty where it names none."""
    source = provenance.get("source")
    if not isinstance(source, Mapping) or "sha256" not in source:
        return ""
    if source["sha256"] == hash_checkpoint(base.files):
        return "the base is the file that its note names, by the hash"
    return "the base is not the file that its note names, by the hash"
