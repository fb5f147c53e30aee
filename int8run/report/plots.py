"""The plots of pages, as SVG elements. Draws what it is given; knows nothing of runs."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from int8run.report.label_placement import (
    Box,
    Position,
    place_labels,
    surround_dot,
    surround_step_line,
)
from int8run.report.plot_svg import INK, LINE, MUTED, SERIES, to_svg

DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 2), (9, 2, 2, 2))

WIDE, NARROW = 760, 350  # px; one for a screen, one for a phone
SCATTER_HEIGHT, CURVES_HEIGHT = 380, 260  # px
LABEL_FONT_SIZE = 11
LEADER_DISTANCE = 14  # px; a label that is further from its point is joined to it by a line

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "figure.dpi": 72,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Point:
    """A run in the plane of speed and quality.

    Args:
        x: speed.
        y: PSNR in dB; infinite for identical images.
        label: stands beside the point; empty: none.
        description: shown when the pointer rests on the point.
        is_on_front: whether it is on the Pareto front.
        interval: of `y`; None: none is drawn.
    """

    x: float
    y: float
    label: str
    description: str
    is_on_front: bool
    interval: tuple[float, float] | None = None


def draw_speed_quality(
    points: Sequence[Point], x_label: str, *, faster_is_less: bool, has_one_front: bool, name: str, width: int
) -> str:
    """PSNR against speed. Up and right is better.

    Args:
        points: one per run.
        x_label: what the speed is.
        faster_is_less: whether x is a time, so that the axis is turned round.
        has_one_front: whether the points of the front are those of a single one, which a step line joins.
        name: begins the ids of the SVG's parts.
        width: in CSS pixels.

    Returns:
        an SVG element.
    """
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = create_figure(width, SCATTER_HEIGHT)
        level_of_equal = choose_level_of_equal([point.y for point in points])
        heights = [min(point.y, level_of_equal) for point in points]

        axes.set_xlabel(x_label)
        axes.set_ylabel("PSNR to float, dB")
        axes.set_xlim(*pad_limits([point.x for point in points], 0.16))
        axes.set_ylim(*pad_limits([*heights, *list_limits(points)], 0.14))
        if faster_is_less:
            axes.invert_xaxis()

        corners: list[Position] = []
        if has_one_front:
            corners = find_front_corners(axes, points, heights, faster_is_less=faster_is_less)
            draw_step_line(axes, corners)
        draw_dots(axes, points, heights)
        most_ticks = 4 if width < 500 else 7
        axes.xaxis.set_major_locator(MaxNLocator(most_ticks))
        set_y_ticks(axes, level_of_equal, has_equal=any(math.isinf(point.y) for point in points))
        label_points(figure, axes, points, heights, corners)

        titles = {f"about-{i}": point.description for i, point in enumerate(points)}
        return to_svg(figure, name, f"PSNR to float against {x_label}", titles)


def list_limits(points: Sequence[Point]) -> list[float]:
    """The ends of all intervals."""
    limits: list[float] = []
    for point in points:
        limits += point.interval or ()
    return limits


def find_front_corners(
    axes: Axes, points: Sequence[Point], heights: Sequence[float], *, faster_is_less: bool
) -> list[Position]:
    """The corners of the front's step line.

    It begins at the left edge at the level of the run that is closest to float, and ends below the fastest
    run.
    """
    front = [(point.x, y) for point, y in zip(points, heights, strict=True) if point.is_on_front]
    front.sort(key=lambda position: (position[0], -position[1]))
    if faster_is_less:
        front.reverse()
    left_edge, bottom_edge = axes.get_xlim()[0], axes.get_ylim()[0]
    highest = max(y for _, y in front)
    fastest = front[-1][0]
    return [(left_edge, highest), *front, (fastest, bottom_edge)]


def draw_step_line(axes: Axes, corners: Sequence[Position]) -> None:
    """Join the corners of the front, across and then down."""
    axes.step(
        [x for x, _ in corners],
        [y for _, y in corners],
        where="pre",
        color=SERIES[0],
        linewidth=1.6,
        dashes=(5, 3),
        zorder=2,
    )


def draw_dots(axes: Axes, points: Sequence[Point], heights: Sequence[float]) -> None:
    """A dot per run, filled where it is on the front; its id lets `to_svg` add a title."""
    for i, (point, y) in enumerate(zip(points, heights, strict=True)):
        edge, face = (SERIES[0], SERIES[0]) if point.is_on_front else (MUTED, "none")
        if point.interval is not None:
            axes.vlines(point.x, *point.interval, color=edge, linewidth=1.0, zorder=2)
        (dot,) = axes.plot(
            point.x,
            y,
            "o",
            markersize=8,
            markeredgecolor=edge,
            markerfacecolor=face,
            zorder=3,
        )
        dot.set_gid(f"about-{i}")


def draw_curves(
    lines: Sequence[Sequence[Position]], *, x_label: str, y_label: str, name: str, width: int
) -> str:
    """A metric against a LoRA strength.

    Args:
        lines: points of each line; line i has color and dashes number i.
        x_label: the strength's name.
        y_label: what the metric is.
        name: begins the ids of the SVG's parts.
        width: in CSS pixels.

    Returns:
        an SVG element.
    """
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = create_figure(width, CURVES_HEIGHT)
        values = [y for line in lines for _, y in line]
        level_of_equal = choose_level_of_equal(values)
        for i, line in enumerate(lines):
            dashes = DASHES[i % len(DASHES)] or None  # None: a solid line
            axes.plot(
                [x for x, _ in line],
                [min(y, level_of_equal) for _, y in line],
                "o",
                color=SERIES[i % len(SERIES)],
                linestyle=(0, dashes),
                linewidth=1.8,
                markersize=5,
            )
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", color=INK)
        axes.set_ylim(*pad_limits([min(value, level_of_equal) for value in values], 0.1))
        set_y_ticks(axes, level_of_equal, has_equal=any(map(math.isinf, values)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return to_svg(figure, name, f"{y_label} against {x_label}", {})


# -- axes ----------------------------------------------------------------------------------------------------


def create_figure(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of this many CSS pixels, with a canvas that can measure text."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def choose_level_of_equal(values: Sequence[float]) -> float:
    """Where infinite values are drawn: above the finite ones, by a quarter of their range and at least 1."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 1.0
    highest = max(finite)
    if len(finite) == len(values):
        return highest
    return highest + max(1.0, 0.25 * (highest - min(finite)))


def pad_limits(values: Sequence[float], share: float) -> Position:
    """Limits of an axis with room on both sides, and some where all values are the same.

    Args:
        values: at least one.
        share: of their range, left free on each side.
    """
    low, high = min(values), max(values)
    # Less than a percent is noise, which an axis must not blow up to its full height.
    room = max(share * (high - low), 0.01 * abs(high), 1e-9)
    return low - room, high + room


def set_y_ticks(axes: Axes, level_of_equal: float, *, has_equal: bool) -> None:
    """A few ticks, with `equal` at the level of the infinite values where there are some."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    if has_equal:
        room = (high - low) / 12
        ticks = [tick for tick in ticks if tick < level_of_equal - room] + [level_of_equal]

        def format_tick(value: float, _: int | None) -> str:
            return "equal" if value == level_of_equal else f"{value:g}"

        axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.set_yticks(ticks)


# -- labels --------------------------------------------------------------------------------------------------


def label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Point],
    heights: Sequence[float],
    corners: Sequence[Position],
) -> None:
    """Write the labels beside the points, clear of each other and of the step line where there is room.

    Args:
        figure: measures the labels.
        axes: of the points.
        points: with their labels.
        heights: y of each point as drawn.
        corners: of the step line.
    """
    # From here on the axes stay where they are: labels are placed in pixels.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    window = axes.get_window_extent(renderer)
    frame = (window.x0, window.y0, window.x1 + 8, window.y1 + 8)

    to_pixels = axes.transData.transform
    labelled: list[tuple[Point, Position]] = []
    obstacles: list[Box] = []
    for point, y in zip(points, heights, strict=True):
        spot = tuple(to_pixels((point.x, y)))
        if point.label:
            labelled.append((point, spot))
        else:
            obstacles.append(surround_dot(spot))
    obstacles += surround_step_line([tuple(to_pixels(corner)) for corner in corners])

    sizes = [measure_label(figure, point.label, renderer) for point, _ in labelled]
    boxes = place_labels([spot for _, spot in labelled], sizes, frame, obstacles)
    for (point, spot), box in zip(labelled, boxes, strict=True):
        draw_label(axes, point, spot, box)


def measure_label(figure: Figure, label: str, renderer: Any) -> Position:
    """Width and height of a label in pixels."""
    text = figure.text(0, 0, label, fontsize=LABEL_FONT_SIZE)
    with warnings.catch_warnings():
        # A glyph that this font lacks is drawn in the browser's.
        warnings.filterwarnings("ignore", message="Glyph")
        box = text.get_window_extent(renderer)
    text.remove()
    return box.width, box.height


def draw_label(axes: Axes, point: Point, spot: Position, box: Box) -> None:
    """Write a label into its box, joined to its point by a line where the two are far apart.

    Args:
        axes: of the point.
        point: with its label.
        spot: of the point, in pixels.
        box: of the label, in pixels.
    """
    x, y = spot
    left, bottom, right, top = box
    to_data = axes.transData.inverted().transform
    nearest = min(max(x, left), right), min(max(y, bottom), top)
    if math.dist(nearest, spot) > LEADER_DISTANCE:
        ends = to_data([spot, nearest])
        axes.plot(ends[:, 0], ends[:, 1], color=MUTED, linewidth=0.7, zorder=1)
    text_x, text_y = to_data((left, bottom))
    axes.text(
        text_x,
        text_y,
        point.label,
        fontsize=LABEL_FONT_SIZE,
        va="bottom",
        color=INK if point.is_on_front else MUTED,
        zorder=4,
    )
