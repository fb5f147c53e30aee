"""The plots of a report page: speed against quality, and curves over LoRA strength.

Each is drawn twice, for a screen and for a phone. Chooses what is drawn; `plots` draws it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from int8run.report.columns import PSNR_DB, SPEED_RATIO, STEP_MS, format_psnr
from int8run.report.plot_svg import SERIES
from int8run.report.plots import DASHES, NARROW, WIDE, Point, draw_curves, draw_speed_quality
from int8run.report.ranking import choose_speed_metric, find_fronts, list_speed_quality
from int8run.report.runs import Run, find_varying_settings, format_tags, parse_number
from int8run.report.strength_curves import StrengthCurves
from int8run.tracking.setting_names import shorten_keys
from int8run.utils.text import make_visible

HALF = 500  # px; two plots beside each other
MAX_LINES = 16  # of curves in one plot
MAX_PLOTS = 2  # for each strength

# More points, or one with a longer label, and all are labelled with their tag alone.
MAX_LABELS = 14
# With more points only those of the Pareto front are labelled, so many at most; the others have a title.
MAX_TAGS = 60
MAX_LABEL_LENGTH = 30

CURVE_METRICS = (
    (PSNR_DB, "PSNR to float, dB"),
    (STEP_MS, "step time, ms"),
    (SPEED_RATIO, "speed, × the float model's"),
)


@dataclass(frozen=True)
class ResponsivePlot:
    """One plot as SVG in two widths: for a screen and for a phone."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class LegendEntry:
    """One line of a plot.

    Args:
        label: what it shows.
        series: number of its color on the page.
        dash: its `stroke-dasharray`.
    """

    label: str
    series: int
    dash: str


@dataclass(frozen=True)
class CurvePlots:
    """The plots over one strength.

    Args:
        key: the strength's name on the command line.
        plots: one per metric.
        legend: of all plots; empty with a single line.
        notes: what is not drawn.
    """

    key: str
    plots: list[ResponsivePlot]
    legend: list[LegendEntry]
    notes: list[str]


def build_speed_quality_plot(runs: Sequence[Run]) -> ResponsivePlot | None:
    """Speed against PSNR; None with fewer than two points."""
    metric = choose_speed_metric(runs)
    positions = list_speed_quality(runs)
    shown = [index for index, position in enumerate(positions) if position is not None]
    if metric is None or len(shown) < 2:
        return None

    fronts = find_fronts(runs)
    shown_runs = [runs[index] for index in shown]
    keys = find_varying_settings(shown_runs)
    has_room = len(shown) <= MAX_LABELS and all(len(run.label) <= MAX_LABEL_LENGTH for run in shown_runs)
    labelled = choose_labelled(shown, fronts.members)
    points = []
    for index in shown:
        run = runs[index]
        label = ""
        if index in labelled:
            label = f"{run.tag} {label_run(run, keys)}" if has_room else run.tag
        points.append(build_point(run, metric, label, is_on_front=index in fronts.members))

    faster_is_less = metric == STEP_MS
    x_label = "speed, × the float model's"
    if faster_is_less:
        x_label = "step time, ms (faster to the right)"
    draw = partial(
        draw_speed_quality,
        x_label=x_label,
        faster_is_less=faster_is_less,
        has_one_front=fronts.count == 1 and fronts.num_groups == 1,
    )
    tag_points = [replace(point, label=point.label.partition(" ")[0]) for point in points]
    return ResponsivePlot(
        wide=draw(points, name="sq-wide", width=WIDE),
        narrow=draw(tag_points, name="sq-narrow", width=NARROW),
    )


def choose_labelled(shown: Sequence[int], front: Collection[int]) -> set[int]:
    """The points that have a label: all, or where they are too many some of the Pareto front."""
    if len(shown) <= MAX_TAGS:
        return set(shown)
    return set([index for index in shown if index in front][:MAX_TAGS])


def build_point(run: Run, speed_metric: str, label: str, *, is_on_front: bool) -> Point:
    """The point of a run that has a speed and a PSNR."""
    speed, psnr = run.get_metric(speed_metric) or 0.0, run.get_metric(PSNR_DB) or 0.0
    unit = "ms" if speed_metric == STEP_MS else "× float"
    return Point(
        x=speed,
        y=psnr,
        label=make_visible(label),
        description=f"{make_visible(run.name)}: {speed:.3g} {unit}, PSNR {format_psnr(psnr)}",
        is_on_front=is_on_front,
    )


def label_run(run: Run, keys: Sequence[str]) -> str:
    """The values that set a run apart: names of options alone, numbers after their setting."""
    short_keys = shorten_keys(keys)
    texts = []
    for key in keys:
        value = run.varied_settings[key]
        if parse_number(value) is not None:
            # a number says nothing without its key
            value = f"{short_keys[key]} {value}"
        texts.append(value)
    return ", ".join(texts)


def build_curve_plots(curves: StrengthCurves, number: int) -> CurvePlots:
    """PSNR and speed over one strength, with their legend.

    Args:
        curves: the runs over this strength.
        number: of the strength on the page; keeps the ids of the plots apart.
    """
    lines = dict(islice(curves.lines.items(), MAX_LINES))
    x_label = make_visible(curves.key)
    plots: list[ResponsivePlot] = []
    for metric, y_label in CURVE_METRICS:
        points = [list_curve_points(line, metric) for line in lines.values()]
        if not any(points) or len(plots) == MAX_PLOTS:
            continue
        name = f"curve-{number}-{metric.rpartition('/')[2]}"
        draw = partial(draw_curves, points, x_label=x_label, y_label=y_label)
        plots.append(
            ResponsivePlot(
                wide=draw(name=f"{name}-half", width=HALF),
                narrow=draw(name=f"{name}-narrow", width=NARROW),
            )
        )
    legend = build_legend(list(lines)) if len(lines) > 1 else []
    return CurvePlots(key=curves.key, plots=plots, legend=legend, notes=list_curve_notes(curves))


def list_curve_points(line: Sequence[tuple[float, Run]], metric: str) -> list[tuple[float, float]]:
    """The points of one line that can be drawn; of the infinite values a PSNR alone, that of equal images."""
    points = []
    for strength, run in line:
        value = run.get_metric(metric)
        if value is None:
            continue
        is_equal = metric == PSNR_DB and value == math.inf
        if is_equal or math.isfinite(value):
            points.append((strength, value))
    return points


def build_legend(labels: Sequence[str]) -> list[LegendEntry]:
    """Color and dashes of each line, as `draw_curves` draws them."""
    entries = []
    for i, label in enumerate(labels):
        dash = " ".join(map(str, DASHES[i % len(DASHES)]))
        entries.append(LegendEntry(label=label, series=i % len(SERIES), dash=dash))
    return entries


def list_curve_notes(curves: StrengthCurves) -> list[str]:
    """What the plots of a strength leave out."""
    notes = []
    num_hidden = len(curves.lines) - MAX_LINES
    if num_hidden > 0:
        notes.append(f"{num_hidden} more combinations are not drawn; the table lists them.")
    if curves.excluded:
        tags = format_tags(curves.excluded)
        notes.append(f"Not drawn: {tags}, whose strength is not set or changes during sampling.")
    return notes
