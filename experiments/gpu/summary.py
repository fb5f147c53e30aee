"""From the reports of the steps to the targets and the table that `run.py` prints. It runs nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE = "bf16 cuBLAS"
OURS = "int8run triton"
BEST_TILE = f"{OURS}, best tile"
LORA = f"{OURS}, LoRA r64"
STEP = f"{OURS} compile=blocks"
LEAST_LINEAR_RATIO, LEAST_STEP_RATIO, MOST_LORA_SHARE = 1.45, 1.25, 0.06
MOST_GROUPED_RATIO = 1.15


@dataclass(frozen=True)
class Target:
    """One target, and whether it was met.

    Args:
        name: what is asked for.
        found: what was measured, as text; empty: nothing.
        is_met: None: not measured.
        limit: what limits a target that was missed.
    """

    name: str
    found: str
    is_met: bool | None
    limit: str = ""


def judge_targets(found: Mapping[str, Mapping[str, Any]], statuses: Mapping[str, str]) -> list[Target]:
    """Every target of the first run on a GPU.

    Args:
        found: reports by step.
        statuses: by step.
    """
    return [
        judge_exactness(statuses.get("exact tests", "not run"), found.get("exact tests", {})),
        judge_linears(found.get("linears", {})),
        judge_step(found.get("steps", {})),
        judge_lora(found.get("linears", {})),
        judge_grouped(found.get("grouped", {})),
    ]


def judge_exactness(status: str, counts: Mapping[str, int]) -> Target:
    """The exact tests pass; a test that was skipped has shown nothing, though pytest ends well.

    Args:
        status: of the step.
        counts: `tests`, `failures`, `errors` and `skipped`, as far as they are known.
    """
    name = "exact everywhere"
    if status == "failed":
        return Target(name, status, is_met=False)
    tests, skipped = counts.get("tests", 0), counts.get("skipped", 0)
    passed = tests - skipped - counts.get("failures", 0) - counts.get("errors", 0)
    text = f"{status}: {passed} of {tests} tests passed, {skipped} skipped"
    is_met = True if status == "done" and passed == tests > 0 else None
    return Target(name, text, is_met)


def judge_linears(report: Mapping[str, Any]) -> Target:
    """Time of all Linears of a step with more than one row, quantization included."""
    name = f"FLUX's Linears at least {LEAST_LINEAR_RATIO}x cuBLAS bf16"
    base_us, own_us, slowest = 0.0, 0.0, ("", 0.0)
    for size in report.get("sizes", []):
        methods, layers = size["methods"], size["layers"]
        if layers[0]["m"] == 1:
            continue
        timed = [methods[key] for key in (OURS, BEST_TILE) if "us" in methods.get(key, {})]
        if not timed or "us" not in methods.get(BASE, {}):
            return Target(name, "", None)
        best = min(timed, key=lambda record: record["us"])
        calls = sum(layer["calls"] for layer in layers)
        base_us += calls * methods[BASE]["us"]
        own_us += calls * best["us"]
        share = f"{100 * best['limit_share']:.0f} % of the limit by {best['limited_by']}"
        if calls * best["us"] > slowest[1]:
            slowest = (f"{layers[0]['name']} reaches {share}", calls * best["us"])
    if not own_us:
        return Target(name, "", None)
    ratio = base_us / own_us
    return Target(name, f"{ratio:.2f}x", ratio >= LEAST_LINEAR_RATIO, slowest[0])


def judge_step(report: Mapping[str, Any]) -> Target:
    """A compiled step against a compiled step in bfloat16."""
    name = f"a step at least {LEAST_STEP_RATIO}x bf16, both compiled"
    times = report.get("timed", {}).get(STEP)
    if times is None:
        return Target(name, "", None)
    ratio = times["same_mode"]["median"]
    return Target(name, f"{ratio:.2f}x", ratio >= LEAST_STEP_RATIO, "attention stays bf16")


def judge_lora(report: Mapping[str, Any]) -> Target:
    """What a branch of rank 64 adds to the layers with more than one row, weighted by their time."""
    name = f"LoRA of rank 64 at most {100 * MOST_LORA_SHARE:.0f} %"
    plain_us = lora_us = 0.0
    for size in report.get("sizes", []):
        methods, layers = size["methods"], size["layers"]
        if layers[0]["m"] == 1:
            continue
        if not all("us" in methods.get(key, {}) for key in (OURS, LORA)):
            return Target(name, "", None)
        calls = sum(layer["calls"] for layer in layers)
        plain_us += calls * methods[OURS]["us"]
        lora_us += calls * methods[LORA]["us"]
    if not plain_us:
        return Target(name, "", None)
    share = lora_us / plain_us - 1
    return Target(name, f"{100 * share:+.1f} %", share <= MOST_LORA_SHARE, "the branch's two products")


def judge_grouped(report: Mapping[str, Any]) -> Target:
    """Weights of 4 and 6 bits: results equal to those of the int8 weight, and the slowest size beside it."""
    name = f"4 and 6 bits at most {MOST_GROUPED_RATIO}x INT8's time, equal results"
    rows = report.get("rows", [])
    if not rows:
        return Target(name, "", None)
    slowest = max(rows, key=lambda row: row["ratio"])
    unequal = [f"{row['bits']} bits {row['size']}" for row in rows if not row["equal"]]
    found = f"at most {slowest['ratio']:.2f}x ({slowest['bits']} bits {slowest['size']})"
    if unequal:
        return Target(name, f"{found}; not equal: {', '.join(unequal)}", is_met=False)
    return Target(name, found, slowest["ratio"] <= MOST_GROUPED_RATIO, "decoding in each tile")


def format_summary(
    steps: Sequence[tuple[str, str, float, str]],
    targets: Sequence[Target],
    found: Mapping[str, Mapping[str, Any]],
    *,
    is_dry: bool,
) -> str:
    """Steps, targets and short reports as Markdown.

    Args:
        steps: name, status, seconds and reason of each.
        targets: judged.
        found: reports by step.
        is_dry: whether it was a dry run, whose times mean nothing.
    """
    lines = ["# First run on a GPU", ""]
    if is_dry:
        lines = ["# Dry run on a CPU: tiny sizes, no number means anything", ""]
    machine = found.get("import", {})
    if machine:
        lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| target | found | met | what limits it |", "|---|---|---|---|"]
    words = {True: "yes", False: "no", None: "not measured"}
    for target in targets:
        limit = target.limit if target.is_met is False else ""
        met = "a dry run" if is_dry else words[target.is_met]
        lines.append(f"| {target.name} | {target.found} | {met} | {limit} |")
    lines += ["", "| step | how it ended | seconds | why |", "|---|---|---|---|"]
    lines += [f"| {name} | {status} | {seconds:.0f} | {reason} |" for name, status, seconds, reason in steps]
    for name in ("compile", "grouped", "attention", "convolutions", "bandwidth", "offload", "int_mm"):
        rows = found.get(name, {}).get("rows", [])
        if rows:
            lines += ["", f"## {name}", "", *format_rows(rows)]
    return "\n".join(lines)


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Records as a table, a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(format_cell(row.get(column, '')) for column in columns)} |")
    return lines


def format_cell(value: object) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
