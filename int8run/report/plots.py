"""Plots as SVG that stands inside the page: text stays text, and every color is one of the page's, so light and dark need one drawing."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# colors that stand for the page's until the drawing is done
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#05{i:02x}05" for i in range(8))
PAGE_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)},
}
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 2), (9, 2, 2, 2))
WIDE, NARROW = 760, 350  # px; one for a screen, one for a phone
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
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Point:
    """A run in the plane of speed and quality."""

    x: float
    y: float  # dB; infinite where pictures are equal
    label: str
    description: str
    is_on_front: bool  # on the front


def draw_speed_quality(
    points: Sequence[Point], x_label: str, faster_is_less: bool, name: str, width: int
) -> str:
    """PSNR against speed with the front as a step line; up and right is better whatever the speed is measured in."""
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = create_figure(width, 380)
        top = place_infinite([p.y for p in points])
        heights = [min(p.y, top) for p in points]
        axes.set_xlabel(x_label)
        axes.set_ylabel("PSNR to float, dB")
        axes.set_xlim(*pad_limits([p.x for p in points], 0.16))
        axes.set_ylim(*pad_limits([*heights], 0.14))
        if faster_is_less:
            axes.invert_xaxis()
        steps = sorted(
            ((p.x, y) for p, y in zip(points, heights, strict=True) if p.is_on_front),
            key=lambda point: (point[0], -point[1]),
        )
        steps = steps[::-1] if faster_is_less else steps
        # from the left edge at the level of the closest run, down under the fastest
        left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
        corners = [(left, max(heights)), *steps, (steps[-1][0], bottom)]
        axes.step(
            *zip(*corners, strict=True), where="pre", color=SERIES[0], linewidth=1.6, dashes=(5, 3), zorder=2
        )
        for i, (point, y) in enumerate(zip(points, heights, strict=True)):
            edge, face = (SERIES[0], SERIES[0]) if point.is_on_front else (MUTED, "none")
            (dot,) = axes.plot(
                point.x, y, "o", markersize=8, markeredgecolor=edge, markerfacecolor=face, zorder=3
            )
            dot.set_gid(f"about-{i}")
        axes.xaxis.set_major_locator(MaxNLocator(4 if width < 500 else 7))
        set_y_ticks(axes, top, any(math.isinf(p.y) for p in points))
        label_points(figure, axes, points, heights, corners)
        return to_svg(
            figure,
            name,
            f"PSNR to float against {x_label}",
            {f"about-{i}": p.description for i, p in enumerate(points)},
        )


def draw_curves(
    lines: Sequence[Sequence[tuple[float, float]]], x_label: str, y_label: str, name: str, width: int
) -> str:
    """A metric against a strength; the line i has the color and the dashes of number i."""
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = create_figure(width, 260)
        values = [y for line in lines for _, y in line]
        top = place_infinite(values)
        for i, line in enumerate(lines):
            dashes = (0, DASHES[i % len(DASHES)] or None)
            heights = [min(y, top) for _, y in line]
            axes.plot(
                [x for x, _ in line],
                heights,
                "o",
                color=SERIES[i % len(SERIES)],
                linestyle=dashes,
                linewidth=1.8,
                markersize=5,
            )
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", color=INK)
        axes.set_ylim(*pad_limits([min(v, top) for v in values], 0.1))
        set_y_ticks(axes, top, any(map(math.isinf, values)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return to_svg(figure, name, f"{y_label} against {x_label}", {})


def create_figure(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of this many CSS pixels, with a canvas that can measure text."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def place_infinite(values: Sequence[float]) -> float:
    """Where infinite values are drawn: a tenth of the range above the finite ones."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 1.0
    return (
        max(finite) + max(1.0, 0.25 * (max(finite) - min(finite)))
        if len(finite) < len(values)
        else max(finite)
    )


def pad_limits(values: Sequence[float], share: float) -> tuple[float, float]:
    """Limits with room on both sides, and some where all values are one."""
    low, high = min(values), max(values)
    # less than a percent is noise, which an axis must not blow up to its full height
    room = max(share * (high - low), 0.01 * abs(high), 1e-9)
    return low - room, high + room


def set_y_ticks(axes: Axes, top: float, has_equal: bool) -> None:
    """Few ticks; `equal` where infinite values stand."""
    low, high = axes.get_ylim()
    ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
    if has_equal:
        between = (high - low) / 12
        ticks = [t for t in ticks if t < top - between] + [top]
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: "equal" if v == top else f"{v:g}"))
    axes.set_yticks(ticks)


def label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Point],
    heights: Sequence[float],
    corners: Sequence[tuple[float, float]],
) -> None:
    """Words beside the points, none over another or over the line through `corners` where there is room."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    spots = [tuple(axes.transData.transform((p.x, y))) for p, y in zip(points, heights, strict=True)]
    sizes = []
    for p in points:
        text = figure.text(0, 0, p.label, fontsize=11)
        with warnings.catch_warnings():  # a glyph that this font lacks is drawn by the browser's
            warnings.filterwarnings("ignore", message="Glyph")
            box = text.get_window_extent(renderer)
        sizes.append((box.width, box.height))
        text.remove()
    turns = [tuple(axes.transData.transform(corner)) for corner in corners]
    across = [(min(a[0], b[0]), b[1] - 2, max(a[0], b[0]), b[1] + 2) for a, b in pairwise(turns)]
    down = [(a[0] - 2, min(a[1], b[1]), a[0] + 2, max(a[1], b[1])) for a, b in pairwise(turns)]
    boxes = place_labels(spots, sizes, (frame.x0, frame.y0, frame.x1 + 8, frame.y1 + 8), [*across, *down])
    for point, (x, y), (left, bottom, right, top) in zip(points, spots, boxes, strict=True):
        near_x, near_y = min(max(x, left), right), min(max(y, bottom), top)
        if math.hypot(near_x - x, near_y - y) > 14:
            ends = axes.transData.inverted().transform([(x, y), (near_x, near_y)])
            axes.plot(ends[:, 0], ends[:, 1], color=MUTED, linewidth=0.7, zorder=1)
        where = axes.transData.inverted().transform((left, bottom))
        axes.text(
            where[0],
            where[1],
            point.label,
            fontsize=11,
            va="bottom",
            color=INK if point.is_on_front else MUTED,
            zorder=4,
        )


def place_labels(
    spots: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A box for each label: inside the frame, near its point, clear of what is taken, of points and of other labels, as far as can be had.

    Lengths are in pixels; y points up. The first labels choose first.
    """
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    placed: list[Box] = []
    for (x, y), (w, h) in zip(spots, sizes, strict=True):
        w = min(w, frame[2] - frame[0])
        options: list[tuple[float, int, Box]] = []
        for distance in (9, 16, 26, 38, 52, 70, 90):
            for dx, dy in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                left = x + dx * distance - (w if dx < 0 else w / 2 if dx == 0 else 0)
                bottom = y + dy * distance - (h if dy < 0 else h / 2 if dy == 0 else 0)
                left = min(max(left, frame[0]), frame[2] - w)
                bottom = min(max(bottom, frame[1]), frame[3] - h)
                box = (left, bottom, left + w, bottom + h)
                options.append(
                    (
                        sum(compute_overlap(box, other) for other in [*placed, *dots, *taken]),
                        len(options),
                        box,
                    )
                )
        placed.append(min(options)[2])
    return placed


def compute_overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def to_svg(figure: Figure, name: str, about: str, titles: Mapping[str, str]) -> str:
    """The figure as an SVG element; `titles` are shown when the pointer rests on the parts of that id."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's
    text = re.sub("|".join(PAGE_COLORS), lambda m: PAGE_COLORS[m.group()], text)
    # several plots stand on one page, where every id is there once
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for key, title in titles.items():
        text = text.replace(f'<g id="{name}-{key}">', f'<g id="{name}-{key}"><title>{escape(title)}</title>')
    width, height = (72 * inches for inches in figure.get_size_inches())
    box, most = f"0 0 {width:g} {height:g}", f"max-width:{width:g}px"
    head = f'<svg class="plot" role="img" aria-label="{escape(about)}" viewBox="{box}" style="{most}">'
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :])
