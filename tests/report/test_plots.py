"""The plots: which curves there are, and the text, the colors and the labels of an SVG."""

import itertools
import math
import re

import numpy as np
import pytest
from report.run_folders import make_metrics, write_run, write_runs, write_strengths_by_outlier

from int8run.report import label_placement, plots
from int8run.report.plots import Point, draw_curves, draw_speed_quality
from int8run.report.runs import name_runs
from int8run.report.strength_curves import build_strength_curves
from int8run.tracking.run_record import find_records

# -- curves over LoRA strength -------------------------------------------------------------------------------


def test_curves_have_a_line_per_combination_in_order(tmp_path):
    (curves,) = build_strength_curves(write_strengths_by_outlier(tmp_path, lambda strength, outlier: 50.0))

    assert curves.key == "lora.strength" and curves.excluded == []
    assert {name: [x for x, _ in line] for name, line in curves.lines.items()} == {
        "outlier=none": [0, 0.5, 1],
        "outlier=convrot": [0, 0.5, 1],
    }


def test_each_strength_has_curves_over_the_others(tmp_path):
    for n, (a, b) in enumerate(itertools.product("10", "02")):
        overrides = [f"lora.adapters.0.strength={a}", f"lora.adapters.1.strength={b}"]
        write_run(tmp_path, n, overrides, metrics=make_metrics())

    first, second = build_strength_curves(name_runs(find_records(tmp_path)))

    assert (first.key, list(first.lines)) == ("lora.adapters.0.strength", ["1.strength=0", "1.strength=2"])
    assert (second.key, list(second.lines)) == ("lora.adapters.1.strength", ["0.strength=1", "0.strength=0"])
    assert [x for x, _ in first.lines["1.strength=0"]] == [0, 1]


def test_a_strength_that_is_not_a_number_is_excluded(tmp_path):
    options = ("0", "1", "[[0,1],[0.5,0]]")

    (curves,) = build_strength_curves(
        write_runs(tmp_path, [make_metrics()] * 3, options, key="lora.strength")
    )

    assert curves.excluded == ["#2"] and list(curves.lines) == ["all runs"]


def test_runs_without_a_varying_strength_have_no_curves(tmp_path):
    assert build_strength_curves(write_runs(tmp_path, [make_metrics()] * 2)) == []


# -- SVG -----------------------------------------------------------------------------------------------------


def make_points(*positions):
    """Points at these positions, of which the first is on the front."""
    return [
        Point(x=x, y=y, label=f"#{i} $x$ <b>", description=f"about {i} <&>", is_on_front=i == 0)
        for i, (x, y) in enumerate(positions)
    ]


def draw(points, x_label="speed", faster_is_less=False):
    """The SVG of a small plot of speed against quality."""
    return draw_speed_quality(
        points, x_label, faster_is_less=faster_is_less, has_one_front=True, name="p", width=500
    )


def test_an_svg_keeps_its_text():
    svg = draw(make_points((1, 50), (2, 40)), "speed & more")

    assert ">#0 $x$ &lt;b&gt;</text>" in svg
    assert "speed &amp; more" in svg
    assert "<title>about 1 &lt;&amp;&gt;</title>" in svg


def test_an_svg_has_the_colors_of_the_page_and_nothing_of_its_own():
    svg = draw(make_points((1, 50), (2, 40)), "speed & more")

    without_links = re.sub(r"href=\"[^\"]*\"|url\([^)]*\)", "", svg)
    assert not re.search(r"#[0-9a-f]{6}\b(?!-)", without_links), "a color that is not the page's"
    assert "var(--series-0)" in svg and "var(--ink)" in svg
    assert "<metadata" not in svg and "<style" not in svg and "<?xml" not in svg


def test_the_same_points_give_the_same_svg():
    points = make_points((1, 50), (2, 40))

    assert draw(points) == draw(points)


@pytest.mark.parametrize("psnr", [40, math.inf], ids=["one equal", "all equal"])
def test_identical_images_have_a_place_in_a_scatter_plot(psnr):
    svg = draw(make_points((1, math.inf), (2, psnr)))

    assert ">equal</text>" in svg and "inf" not in svg and "nan" not in svg


def test_identical_images_have_a_place_on_a_curve():
    svg = draw_curves([[(0, math.inf), (1, 50.0)]], x_label="strength", y_label="PSNR", name="p", width=350)

    assert ">equal</text>" in svg


def read_front_corners(svg):
    """The corners of the dashed line, in pixels; y points down."""
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-dasharray[^>]*var\(--series-0\)', svg)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize("faster_is_less", [False, True])
def test_the_front_is_a_falling_step_line(faster_is_less):
    points = [
        Point(x=30 - x if faster_is_less else x, y=y, label=str(x), description="", is_on_front=True)
        for x, y in ((13, 40), (11, 50), (12, 45))
    ]

    corners = read_front_corners(draw(points, faster_is_less=faster_is_less))

    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    assert xs == sorted(xs) and ys == sorted(ys) and len(set(xs)) == 4 and len(set(ys)) == 4
    # the run that comes next is not as close to float until it is reached
    (_, x1, x2, _), (y1, y2, *_) = sorted(set(xs)), sorted(set(ys))
    assert (x1, y2) in corners and (x2, y1) not in corners
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(corners)), (
        "a slanted line would promise runs that do not exist"
    )


# -- labels and axes -----------------------------------------------------------------------------------------

FRAME = (50, 30, 700, 340)


def test_labels_stand_clear_of_each_other_and_inside():
    random_spots = np.random.default_rng(0).uniform((60, 40), (640, 320), (14, 2))
    spots = [(float(x), float(y)) for x, y in random_spots] + [(300.0, 200.0), (302.0, 201.0)]

    boxes = label_placement.place_labels(spots, [(90, 13)] * len(spots), FRAME)

    for a, b in itertools.combinations(boxes, 2):
        assert label_placement.compute_overlap(a, b) == 0
    for left, bottom, right, top in boxes:
        assert FRAME[0] <= left and FRAME[1] <= bottom and right <= FRAME[2] and top <= FRAME[3]


def test_a_label_at_the_edge_stays_inside():
    (box,) = label_placement.place_labels([(690, 335)], [(90, 13)], FRAME)

    assert box[2] <= 700


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0]])
def test_equal_values_leave_room_on_an_axis(values):
    low, high = plots.pad_limits(values, 0.1)

    assert low < values[0] < high
