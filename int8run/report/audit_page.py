"""The page of an audit: grade, what is wrong, every layer; one HTML file without a script.

`tasks.audit` calls `write_audit_page` with what audit.json holds. Style and template stand beside this file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from int8run.report.templates import load_template, read_asset, write_text_file

MAX_NAMES = 400  # of layers that a finding lists
HIGH_SQNR_DB = 200.0  # above it two weights are equal but for the last bit


def write_audit_page(audit: Mapping[str, Any], path: Path) -> None:
    """Write the page. It holds everything it shows.

    Args:
        audit: as audit.json has it.
        path: of the HTML file.

    Raises:
        OSError: something else than a file is there.
    """
    write_text_file(path, render_audit_page(audit))


def render_audit_page(audit: Mapping[str, Any]) -> str:
    """The HTML of the page. audit: as audit.json has it."""
    template = load_template("audit.html.jinja")
    return template.render(
        audit=audit,
        title=f"Audit of {Path(audit['file']).name}",
        style=read_asset("page.css") + read_asset("audit.css"),
        headings=choose_headings(audit["layers"]),
        provenance=json.dumps(audit["provenance"], indent=2) if audit["provenance"] else "",
        max_names=MAX_NAMES,
        format_cell=format_cell,
        is_number=is_number,
    )


# key of a layer in audit.json -> heading of its column
HEADINGS = {
    "shape": "shape",
    "label": "stored as",
    "granularity": "scales by",
    "declared_rotation": "rotation by marker",
    "found_rotation": "by the numbers",
    "sqnr_db": "SQNR dB",
    "excess_db": "dB over rounding",
    "gain": "factor to base",
    "saturated_share": "at end of range",
    "unused_share": "range unused",
    "scale_spread": "scale max / median",
    "rank": "rank above noise",
    "recipe": "recipe",
    "differing": "numbers that differ",
    "rule": "family's rule",
}
NUMBERS = frozenset(
    {"sqnr_db", "excess_db", "gain", "saturated_share", "unused_share", "scale_spread", "rank", "differing"}
)


def choose_headings(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns that some layer has something in."""
    return {
        key: heading
        for key, heading in HEADINGS.items()
        if any(layer.get(key) not in (None, "") for layer in layers)
    }


def format_cell(key: str, value: Any) -> str:
    """What a cell of the table of layers says."""
    if value is None or value == "":
        return "–"
    if key == "shape":
        return " × ".join(map(str, value))
    if key in ("saturated_share", "unused_share"):
        return f"{100 * value:.2f} %"
    if key == "sqnr_db" and (math.isinf(value) or value > HIGH_SQNR_DB):
        return "equal"
    if isinstance(value, float):
        return f"{value:.3f}" if key == "gain" else f"{value:.1f}"
    return str(value)


def is_number(key: str) -> bool:
    """Whether a column of the table holds numbers."""
    return key in NUMBERS
