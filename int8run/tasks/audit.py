"""`task=audit`: grade a quantized file, beside the float file that it was made from.

`options.Audit` calls `run_audit`. `audit_sources` finds out what belongs together, `int8run.audit` compares,
and here the result is written and printed.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8run import __version__
from int8run.audit.base_weight import BaseReadError
from int8run.audit.file_audit import AuditedFile, FileAudit, audit_file
from int8run.audit.grades import Finding, GradeTable, load_grades
from int8run.checkpoints.declared_format import UNDECLARED, DeclaredFormat
from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import AuditError, FileError
from int8run.jobs.execute import collect_warnings
from int8run.metrics.memory import read_peak_bytes
from int8run.models.resolve_weights import resolve_weights
from int8run.report.audit_page import write_audit_page
from int8run.report.console import Progress, print_lines
from int8run.report.formatting import format_megabytes, format_pairs
from int8run.report.run_files import write_json
from int8run.tasks.audit_sources import ReadFile, check_is_quantized, plan_audit, read_checkpoint
from int8run.tasks.audit_summary import describe_audit, describe_unreadable
from int8run.tasks.local_paths import hide_local_paths
from int8run.tasks.quantize_checkpoint import choose_location
from int8run.tasks.quantize_common import MEGABYTE, MegabyteProgress, count_bytes
from int8run.tracking.setting_names import split_override
from int8run.utils.paths import expand_path

log = logging.getLogger(__name__)
JSON_NAME, PAGE_NAME = "audit.json", "audit.html"


@dataclass(frozen=True)
class AuditRequest:
    """What is to be graded.

    Args:
        path: of the quantized file, or of the folder of one checkpoint.
        base: the float file or model; None: the model that the command line names, if it names one.
        component: of the base, where it has several denoisers.
        min_grade: a worse grade is an error.
    """

    path: str
    base: str | None
    component: str | None
    min_grade: str


def run_audit(spec: RunSpec, job: Job, request: AuditRequest) -> dict[str, Any]:
    """Audit a file; leaves audit.json and audit.html in the output folder.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        request: what is to be graded.

    Returns:
        What audit.json holds.

    Raises:
        AuditError: for a worse grade than `min_grade`.
        FileError: the file or the base cannot be read, or do not belong together.
    """
    started = time.perf_counter()
    warnings: list[str] = []
    with ExitStack() as stack, collect_warnings(warnings):
        files = stack.enter_context(TensorFiles.open(expand_path(request.path)))
        declared = DeclaredFormat(spec.model.quant_format, spec.model.sdnq)
        with graded_when_unreadable(job, files):
            read = read_checkpoint(files, declared)
        check_is_quantized(read)
        base = open_base(spec, job, request, stack)
        audited = plan_audit(read, base, spec.model_type)
        with graded_when_unreadable(job, files):
            audit = audit_with_progress(audited, spec)
    summary = describe_audit(audit, audited, read, base)
    summary["reader_warnings"] = list(dict.fromkeys(warnings))
    summary["min_grade"] = request.min_grade
    summary["int8run"] = __version__
    summary["measured"] = {
        "seconds": time.perf_counter() - started,
        "read_bytes": count_bytes(files) + (0 if base is None else count_bytes(base.files)),
        "peak_bytes": read_peak_bytes(torch.device("cpu")),
    }
    write_results(job.output_dir, summary)
    print_audit(audit, summary, job.output_dir)
    check_grade(audit, request, job.output_dir)
    return summary


def open_base(spec: RunSpec, job: Job, request: AuditRequest, stack: ExitStack) -> ReadFile | None:
    """Find the float file, and read its headers.

    Args:
        spec: the settings.
        job: whose command line may name a model.
        request: what is to be graded.
        stack: closes the files.

    Returns:
        None where there is none.
    """
    location = request.base or find_named_model(spec, job.overrides)
    if location is None:
        log.info("there is no base to compare with: task.base=FILE or model=NAME names it")
        return None
    chosen, component = choose_location(location, request.component)
    source = resolve_weights(chosen, spec.model.revision, component)
    files = stack.enter_context(TensorFiles.open(source.path))
    return read_checkpoint(files, UNDECLARED)


def find_named_model(spec: RunSpec, overrides: Sequence[str]) -> Any:
    """`model.location` where the command line names a model; None: it does not.

    Args:
        spec: the settings.
        overrides: the words of the command line.
    """
    keys = [split_override(word)[0] for word in overrides]
    if "model" in keys or "model.location" in keys:
        return spec.model.location
    return None


@contextmanager
def graded_when_unreadable(job: Job, files: TensorFiles) -> Iterator[None]:
    """Write a grade for a file that cannot be read, before the error goes on; not for errors of the base."""
    try:
        yield
    except BaseReadError:
        raise
    except FileError as error:
        write_results(job.output_dir, describe_unreadable(files.path, str(error)))
        raise


def audit_with_progress(audited: AuditedFile, spec: RunSpec) -> FileAudit:
    """Audit, with a bar of megabytes.

    Args:
        audited: the file and its base.
        spec: the settings.
    """
    num_megabytes = max(1, audited.count_bytes() // MEGABYTE)
    with Progress(enabled=spec.progress).track_loop("Auditing megabytes", num_megabytes) as advance:
        return audit_file(audited, MegabyteProgress(advance))


def write_results(folder: Path, summary: dict[str, Any]) -> None:
    """Write audit.json, and audit.html, which may be shown to others: without folders of this machine.

    Args:
        folder: the output folder.
        summary: what was found.
    """
    write_json(summary, folder / JSON_NAME)
    shown = json.loads(hide_local_paths(json.dumps(summary, default=str)))
    write_audit_page(shown, folder / PAGE_NAME)


def print_audit(audit: FileAudit, summary: dict[str, Any], folder: Path) -> None:
    """Print the grade, what is wrong, and where the page is.

    Args:
        audit: what was found.
        summary: the same as audit.json has it.
        folder: the output folder.
    """
    print_lines(f"grade {audit.grade}: {load_grades().grades[audit.grade]}")
    for finding in audit.findings:
        print_lines(f"  {finding.kind.grade}  {format_finding(finding)}")
    print_lines(format_pairs([(fact["name"], fact["text"]) for fact in summary["facts"]]))
    measured = summary["measured"]
    print_lines(
        format_pairs(
            [
                ("time", f"{measured['seconds']:.1f} s"),
                ("read", format_megabytes(measured["read_bytes"])),
                ("peak memory", format_megabytes(measured["peak_bytes"])),
            ]
        ),
        f"files:    {folder / PAGE_NAME}, {folder / JSON_NAME}",
    )


def format_finding(finding: Finding) -> str:
    """A finding in one line."""
    parts = [finding.kind.title]
    if finding.names:
        more = len(finding.names) - 1
        names = finding.names[0] if not more else f"{finding.names[0]} and {more} more"
        parts.append(f"{len(finding.names)} of {finding.out_of}: {names}")
    if finding.detail:
        parts.append(finding.detail)
    return "; ".join(parts)


def check_grade(audit: FileAudit, request: AuditRequest, folder: Path) -> None:
    """Raise AuditError for a worse grade than was asked for."""
    table: GradeTable = load_grades()
    if not table.is_below(audit.grade, request.min_grade):
        return
    reasons = [finding.kind.title for finding in audit.findings] or [table.grades[audit.grade]]
    raise AuditError(
        f"{request.path} has grade {audit.grade}, task.min_grade={request.min_grade} asks for more: "
        f"{reasons[0]}; {folder / PAGE_NAME} says all of it"
    )
