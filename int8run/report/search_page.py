"""The page of a search: what it found, cost against quality with the Pareto front, every trial; no script.

`tasks.search_results` calls `write_search_page` with plain facts. Style and template stand beside this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from int8run.report.page_plots import ResponsivePlot
from int8run.report.plots import NARROW, WIDE, Point, draw_speed_quality
from int8run.report.templates import load_template, read_asset, write_text_file
from int8run.utils.text import make_visible

MAX_LABELS = 12  # points with a label that is more than their number


@dataclass(frozen=True)
class CostAxis:
    """What one plot has quality against.

    Args:
        cost: `seconds` or `bytes`.
        unit: that it is shown in.
        scale: a number in that unit over the same in seconds or bytes.
        label: of the axis.
    """

    cost: str
    unit: str
    scale: float
    label: str


AXES = (
    CostAxis("seconds", "ms", 1e3, "time per image, ms (faster to the right)"),
    CostAxis("bytes", "MB", 1e-6, "weights, MB (smaller to the right)"),
)


def write_search_page(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the page. It holds everything it shows.

    Args:
        path: of the HTML file.
        facts: as `tasks.search_results` collects them.

    Raises:
        OSError: something else than a file is there.
    """
    write_text_file(path, render_search_page(facts))


def render_search_page(facts: Mapping[str, Any]) -> str:
    """The HTML of the page."""
    rows = sorted(facts["rows"], key=rank_row)
    template = load_template("search.html.jinja")
    return template.render(
        facts=facts,
        rows=rows,
        style=read_asset("page.css"),
        plots=[plot for axis in AXES if (plot := build_plot(facts, axis)) is not None],
        format_cost=format_cost,
        axes=AXES,
    )


def rank_row(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    """The order of the table: measured trials from the cheapest on, then the others."""
    return "cost" not in row, row.get("cost", 0.0), row["number"]


def build_plot(facts: Mapping[str, Any], axis: CostAxis) -> ResponsivePlot | None:
    """Quality against one cost; None with fewer than two trials, or where all cost the same."""
    rows = [row for row in facts["rows"] if "quality_db" in row]
    if len({row[axis.cost] for row in rows}) < 2:
        return None
    front = [row for row in rows if axis.cost in row["fronts"]]
    labelled = front if len(front) <= MAX_LABELS else []
    wide = [make_point(row, axis, make_label(row, with_recipe=row in labelled)) for row in rows]
    narrow = [make_point(row, axis, make_label(row, with_recipe=False)) for row in rows]
    draw = partial(draw_speed_quality, x_label=axis.label, faster_is_less=True, has_one_front=True)
    return ResponsivePlot(
        wide=draw(wide, name=f"{axis.cost}-wide", width=WIDE),
        narrow=draw(narrow, name=f"{axis.cost}-narrow", width=NARROW),
    )


def make_label(row: Mapping[str, Any], *, with_recipe: bool) -> str:
    """The label of a point: its number, on the front its recipe, too."""
    number = f"#{row['number']}"
    return make_visible(f"{number} {row['recipe']}") if with_recipe else number


def make_point(row: Mapping[str, Any], axis: CostAxis, label: str) -> Point:
    """The point of a trial."""
    cost = row[axis.cost] * axis.scale
    name = make_label(row, with_recipe=True)
    return Point(
        x=cost,
        y=row["quality_db"],
        label=label,
        description=f"{name}: {cost:.4g} {axis.unit}, {row['quality_db']:.2f} dB",
        is_on_front=axis.cost in row["fronts"],
        interval=None if row["quality_low"] is None else (row["quality_low"], row["quality_high"]),
    )


def format_cost(row: Mapping[str, Any], axis: CostAxis) -> str:
    """A cost with its interval, where it has one."""
    value = row[axis.cost] * axis.scale
    low, high = row.get(f"{axis.cost}_low"), row.get(f"{axis.cost}_high")
    if low is None or high is None or low == high:
        return f"{value:.1f} {axis.unit}"
    return f"{value:.1f} {axis.unit} [{low * axis.scale:.1f}, {high * axis.scale:.1f}]"
