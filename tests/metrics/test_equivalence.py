"""The equivalence test: how often it errs, by simulation, and what it calls what."""

import math

import numpy as np
import pytest

from int8run.metrics.equivalence import (
    CLOSER,
    EQUIVALENT,
    FURTHER,
    UNDECIDED,
    compare_with_margin,
    compute_tost_p_values,
    count_more_to_decide,
)
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import POWER, bound_by_student
from int8run.metrics.psnr_limit import limit_psnr

SETTINGS = IntervalSettings()
MARGIN = 1.0
RUNS = 4000


def simulate_rejections(true_mean, num_samples, deviation=1.0):
    """The share of simulated tests that call a true difference equivalent."""
    values = np.random.default_rng(11).normal(true_mean, deviation, size=(RUNS, num_samples))
    return float((compute_tost_p_values(values, MARGIN) < 0.05).mean())


@pytest.mark.parametrize("true_mean", [-MARGIN, MARGIN])
@pytest.mark.parametrize("num_samples", [8, 50])
def test_what_is_just_not_equivalent_is_called_so_in_one_of_twenty_tests(true_mean, num_samples):
    assert simulate_rejections(true_mean, num_samples) == pytest.approx(0.05, abs=0.012)


def test_what_is_further_apart_is_hardly_ever_called_equivalent():
    assert simulate_rejections(1.5 * MARGIN, 20) < 0.002


def test_what_is_equivalent_is_found():
    # n = ((z of 0.95 + z of 0.9) · s / margin)² is 11 for a power of 0.8
    assert simulate_rejections(0.0, 11) > 0.8
    assert simulate_rejections(0.0, 40) > 0.999


@pytest.mark.parametrize(
    ("mean", "outcome"), [(0.0, EQUIVALENT), (3.0, CLOSER), (-3.0, FURTHER), (-0.9, UNDECIDED)]
)
def test_an_outcome_is_that_of_both_tests(mean, outcome):
    values = mean + 0.5 * np.sin(np.arange(20.0))

    found = compare_with_margin(list(values), MARGIN, SETTINGS)

    assert found.outcome == outcome
    assert (found.p_value < 0.05) == (outcome == EQUIVALENT)
    assert found.interval.low < found.mean_db < found.interval.high
    assert (found.more_samples is not None) == (outcome == UNDECIDED)


@pytest.mark.parametrize("mean", [0.0, 0.5, -0.5, 1.6])
def test_as_many_samples_decide_as_often_as_promised(mean):
    deviation = 3.0
    needed = 10 + count_more_to_decide(mean, deviation, 10, margin_db=MARGIN, level=0.9)
    values = np.random.default_rng(4).normal(mean, deviation, size=(RUNS, needed))

    low, high = bound_by_student(values, 0.9)

    decided = (low > MARGIN) if mean > MARGIN else (low > -MARGIN) & (high < MARGIN)
    assert decided.mean() == pytest.approx(POWER, abs=0.03)


def test_no_practical_number_of_samples_decides_what_is_on_the_margin():
    assert count_more_to_decide(MARGIN, 1.0, 10, margin_db=MARGIN, level=0.9) is None
    assert count_more_to_decide(0.999 * MARGIN, 1.0, 10, margin_db=MARGIN, level=0.9) is None
    assert count_more_to_decide(0.0, 1e-9, 2, margin_db=MARGIN, level=0.9) == 1


def test_the_interval_is_that_of_twice_the_error_rate():
    values = np.random.default_rng(0).normal(size=15)
    found = compare_with_margin(list(values), MARGIN, SETTINGS)

    reach = 1.761310 * values.std(ddof=1) / math.sqrt(15)  # Student's 0.95 quantile of 14 degrees
    assert found.interval.half_width == pytest.approx(reach, rel=1e-5)


def test_differences_without_scatter_are_decided():
    assert compare_with_margin([0.5] * 4, MARGIN, SETTINGS).p_value == 0.0
    assert compare_with_margin([-5.0] * 4, MARGIN, SETTINGS).outcome == FURTHER


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, math.nan, math.inf]])
def test_fewer_than_two_samples_decide_nothing(differences):
    found = compare_with_margin(differences, MARGIN, SETTINGS)

    assert found.outcome == UNDECIDED and found.p_value is None and found.interval is None


def test_an_infinite_psnr_counts_as_one_step_of_one_color():
    one_step = 10 * math.log10(255**2 * 3 * 8 * 4)

    assert limit_psnr(math.inf, (8, 4)) == pytest.approx(one_step) and limit_psnr(30.0, (8, 4)) == 30.0
