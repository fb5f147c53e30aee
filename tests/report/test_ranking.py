"""The Pareto front, what speeds are compared by, and how runs are grouped into candidates."""

import math

import numpy as np
import pytest
from report.run_folders import make_metrics, write_runs, write_strengths_by_outlier

from int8run.report.columns import PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.ranking import choose_speed_metric, find_fronts, find_pareto_front, group_candidates


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([None], []),
        ([(1, 1)], [0]),
        ([(1, 5), (2, 4), (3, 1), (2, 3)], [0, 1, 2]),
        ([(2, 2), (1, 1)], [0]),
        ([(2, 2), (2, 1)], [0]),  # as fast and worse
        ([(2, 2), (1, 2)], [0]),  # as close and slower
        ([(2, 2), (2, 2)], [0, 1]),  # neither beats the other
        ([(1, math.inf), (2, 60), (0.5, math.inf)], [0, 1]),
        ([None, (-5, 3), (-4, 2)], [1, 2]),  # step times
    ],
    ids=str,
)
def test_the_front_has_the_points_that_no_other_beats(points, front):
    assert find_pareto_front(points) == front


def test_the_front_of_many_points_matches_its_definition():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 8, (60, 2)).tolist()]
    expected = [p for p in points if all(q == p or q[0] < p[0] or q[1] < p[1] for q in points)]

    assert [points[index] for index in find_pareto_front(points)] == expected


class CountedNumber(float):
    """A number that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        CountedNumber.comparisons += 1
        return float(self) < float(other)

    def __gt__(self, other):
        CountedNumber.comparisons += 1
        return float(self) > float(other)

    def __eq__(self, other):
        CountedNumber.comparisons += 1
        return float(self) == float(other)

    __hash__ = float.__hash__


def test_the_front_of_a_thousand_runs_is_found_by_sorting():
    numbers = np.random.default_rng(0).random((1000, 2)).tolist()
    CountedNumber.comparisons = 0

    find_pareto_front([(CountedNumber(a), CountedNumber(b)) for a, b in numbers])

    assert CountedNumber.comparisons < 1000 * 50, "not each with each other"


def test_speeds_are_compared_by_ratio_where_all_runs_have_one(tmp_path):
    all_ratios = write_runs(tmp_path / "a", [make_metrics(), make_metrics()])
    one_ratio = write_runs(tmp_path / "b", [make_metrics(), make_metrics(ratio=None)])
    nothing = write_runs(tmp_path / "c", [{}, {}])

    assert choose_speed_metric(all_ratios) == SPEED_RATIO
    assert choose_speed_metric(one_ratio) == STEP_MS
    assert choose_speed_metric(nothing) is None


def test_candidates_are_medians_over_strengths(tmp_path):
    runs = write_strengths_by_outlier(
        tmp_path, lambda strength, outlier: 60 - 10 * strength + 2 * (outlier == "convrot")
    )

    found = group_candidates(runs)

    assert found.content_keys == ["lora.strength"]
    assert [(c.name, len(c.runs), c.get_metric(PSNR_DB)) for c in found.candidates] == [
        ("outlier=none", 3, 55),
        ("outlier=convrot", 3, 57),
    ]


def test_candidates_are_compared_on_contents_that_all_have(tmp_path):
    # convrot has no run with strength 0
    runs = write_strengths_by_outlier(tmp_path, lambda strength, outlier: 60 - 10 * strength, left_out=[1])

    found = group_candidates(runs)

    strengths = [[run.varied_settings["lora.strength"] for run in c.runs] for c in found.candidates]
    assert strengths == [["0.5", "1"], ["0.5", "1"]]


def test_runs_that_differ_in_strength_alone_are_one_candidate(tmp_path):
    metrics = [make_metrics(psnr=58.0), make_metrics(psnr=44.0)]
    runs = write_runs(tmp_path, metrics, ("0", "1"), key="lora.strength")

    found = group_candidates(runs)

    (only,) = found.candidates
    assert (only.name, only.get_metric(PSNR_DB)) == ("INT8", 51.0)
    assert found.content_keys == ["lora.strength"]


def test_the_median_with_identical_images_is_a_number(tmp_path):
    runs = write_strengths_by_outlier(
        tmp_path, lambda strength, outlier: math.inf if strength == 0 else 50.0, left_out=[4, 5]
    )

    assert [c.get_metric(PSNR_DB) for c in group_candidates(runs).candidates] == [50.0, 50.0]


def test_each_strength_has_a_front_of_its_own(tmp_path):
    # at each strength convrot is slower and closer to float, but for the last, where it is as far away
    runs = write_strengths_by_outlier(
        tmp_path, lambda strength, outlier: 60 - 10 * strength + (outlier == "convrot" and strength < 1)
    )

    fronts = find_fronts(runs)

    assert fronts.members == {0, 1, 2, 3, 4}
    assert (fronts.count, fronts.num_groups) == (3, 3)


def test_strengths_alone_have_no_front(tmp_path):
    runs = write_runs(tmp_path, [make_metrics(psnr=58.0), make_metrics()], ("0", "1"), key="lora.strength")

    assert find_fronts(runs).members == set()


@pytest.mark.parametrize(("weight_sqnr", "is_ranked"), [(None, False), (math.inf, False), (41.0, True)])
def test_a_run_that_is_its_own_baseline_is_on_no_front(tmp_path, weight_sqnr, is_ranked):
    own = make_metrics(9, 2.2, 60, **{"quality/float_layers_from_same_file": 38})
    if weight_sqnr is not None:
        own["quant/weight_sqnr_db_min"] = weight_sqnr
    runs = write_runs(tmp_path, [make_metrics(), make_metrics(), own], ("a", "b", "c"))

    assert (2 in find_fronts(runs).members) == is_ranked
