"""Intervals: that they hold the truth as often as they say, and what they say of two settings."""

import math

import numpy as np
import pytest
from scipy import stats

from int8run.errors import ConfigError
from int8run.metrics.clusters import Clusters, choose_clusters, gather_clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import (
    MAX_SAMPLES,
    POWER,
    bound_by_student,
    bound_means,
    compare_independent,
    compare_pairs,
    compute_interval,
    count_least_samples,
    count_more_samples,
    expand_level,
    name_interval_method,
)
from int8run.report.differences import count_pairs

# few resamples: a simulation has many intervals
QUICK = {method: IntervalSettings(method=method, resamples=999) for method in ("bca", "percentile")}
RUNS = 800


def simulate_coverage(draw, num_samples, settings, mean=0.0):
    """The share of simulated intervals that hold the true mean."""
    values = draw(np.random.default_rng(7), (RUNS, num_samples))
    low, high = bound_means(values, settings)
    return float(((low <= mean) & (mean <= high)).mean())


def draw_normal(rng, shape):
    return rng.normal(size=shape)


def draw_skewed(rng, shape):
    """As skewed as the PSNRs of the shipped model's images: 0.8."""
    return rng.gamma(6.0, size=shape) - 6.0


@pytest.mark.parametrize(
    ("method", "draw", "num_samples"),
    [
        ("bca", draw_normal, 12),
        ("bca", draw_skewed, 20),
        ("percentile", draw_normal, 20),
        ("percentile", draw_skewed, 12),
    ],
)
def test_intervals_hold_the_mean_as_often_as_they_say(method, draw, num_samples):
    coverage = simulate_coverage(draw, num_samples, QUICK[method])

    assert coverage == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("num_samples", [2, 5])
def test_intervals_of_very_few_samples_hold_it_too(num_samples):
    """A bootstrap cannot: of two samples both are on one side of the mean half of the time."""
    coverage = simulate_coverage(draw_normal, num_samples, QUICK["bca"])

    assert name_interval_method(num_samples, QUICK["bca"]) == "student"
    assert coverage == pytest.approx(0.95, abs=0.02)


def test_another_level_is_held_as_well():
    coverage = simulate_coverage(draw_normal, 20, IntervalSettings(level=0.8, resamples=999))

    assert coverage == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("level", "least"), [(0.95, 6), (0.9, 5), (0.99, 8), (0.5, 2)])
def test_a_bootstrap_needs_samples_that_can_all_be_on_one_side(level, least):
    assert count_least_samples(level) == least
    assert 2 * 0.5**least <= 1 - level + 1e-12 < 2 * 0.5 ** (least - 1)


def test_few_samples_ask_for_a_higher_level():
    # normal tail of sqrt(n / (n - 1)) times Student's quantile: 1.1180 · 2.7764 and 1.0260 · 2.0930
    assert (1 - expand_level(0.95, 5)) / 2 == pytest.approx(0.0010, abs=1e-4)
    assert (1 - expand_level(0.95, 20)) / 2 == pytest.approx(0.0159, abs=1e-4)
    assert expand_level(0.95, 100_000) == pytest.approx(0.95, abs=1e-4)


def test_equal_samples_have_equal_intervals_whatever_was_drawn_before():
    values = np.random.default_rng(1).normal(50, 3, size=20)
    first = compute_interval(values, IntervalSettings())
    np.random.default_rng().normal()

    assert compute_interval(values, IntervalSettings()) == first
    assert compute_interval(values, IntervalSettings(seed=1)) != first


def test_samples_that_are_all_the_same_leave_no_doubt():
    interval = compute_interval([3.0] * 8, IntervalSettings())

    assert (interval.low, interval.high) == (3.0, 3.0)


def test_samples_that_differ_by_rounding_alone_have_an_interval():
    """BCa has none for them."""
    values = [0.1 + 0.2] * 5 + [0.3]

    interval = compute_interval(values, IntervalSettings())

    assert interval.low < 0.3 + 1e-15 and interval.high > 0.3 - 1e-15
    assert interval.half_width < 1e-15


@pytest.mark.parametrize("values", [[], [50.0]])
def test_one_sample_has_no_interval(values):
    assert compute_interval(values, IntervalSettings()) is None


# -- two settings --------------------------------------------------------------------------------------------


def make_pairs(gap, num_samples, seed=3):
    """PSNRs that scatter by 5 dB from sample to sample, and by 0.5 dB around a gap within each."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(50, 5, size=num_samples)
    return list(samples + gap + rng.normal(0, 0.5, size=num_samples)), list(samples)


def test_pairs_tell_what_means_would_not():
    first, second = make_pairs(0.5, 30)

    difference = compare_pairs(first, second, IntervalSettings())

    assert difference.sign == 1 and difference.num_samples == 30 and difference.more_samples is None
    assert compare_independent(first, second, IntervalSettings()).sign == 0
    assert compare_pairs(second, first, IntervalSettings()).sign == -1


def test_what_is_not_told_apart_says_how_many_more_would():
    first, second = make_pairs(0.1, 10)

    difference = compare_pairs(first, second, IntervalSettings())

    gaps = np.subtract(first, second)
    quantiles = 1.959964 + 0.841621
    needed = math.ceil((quantiles * gaps.std(ddof=1) / gaps.mean()) ** 2)
    assert difference.sign == 0 and difference.more_samples == needed - 10


def test_as_many_samples_tell_a_difference_as_often_as_promised():
    deviation, distance = 1.0, 0.4
    needed = 10 + count_more_samples(distance, deviation, 10, level=0.95)
    values = np.random.default_rng(5).normal(distance, deviation, size=(4000, needed))

    found = stats.ttest_1samp(values, 0, axis=-1).pvalue < 0.05

    assert found.mean() == pytest.approx(POWER, abs=0.03)


@pytest.mark.parametrize("distance", [0.0, 1e-9])
def test_no_practical_number_tells_equal_settings_apart(distance):
    assert count_more_samples(distance, 1.0, 10, level=0.95) is None
    assert count_more_samples(0.03, 1.0, 10, level=0.95) <= MAX_SAMPLES


def test_pairs_without_two_numbers_are_left_out():
    first, second = [1.0, math.nan, 3.0, math.inf], [0.5, 1.0, math.nan, 2.0]

    difference = compare_pairs(first, second, IntervalSettings())

    assert difference.num_samples == 1 and difference.mean == 0.5
    assert difference.interval is None and difference.sign == 0


def test_settings_without_a_pair_have_no_difference():
    difference = compare_pairs([], [], IntervalSettings())

    assert difference.num_samples == 0 and math.isnan(difference.mean) and difference.sign == 0


def test_independent_groups_are_compared_as_welch_does():
    rng = np.random.default_rng(2)
    first, second = rng.normal(1, 1, size=9), rng.normal(0, 3, size=14)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)

    difference = compare_independent(first, second, IntervalSettings())

    assert (difference.interval.low, difference.interval.high) == pytest.approx((expected.low, expected.high))
    assert difference.num_samples == 9 and difference.more_samples > 0


@pytest.mark.parametrize(("first", "second"), [([], [1.0]), ([1.0], [2.0, 3.0])])
def test_groups_of_one_are_not_told_apart(first, second):
    assert compare_independent(first, second, IntervalSettings()).sign == 0


def test_times_without_scatter_are_told_apart():
    assert compare_independent([2.0, 2.0], [1.0, 1.0], IntervalSettings()).sign == 1


def test_of_ten_equal_settings_none_is_called_worse_than_the_best():
    """The best is chosen on the same samples; of a thousand such tables one in twenty may be wrong."""
    num_settings, num_samples, num_tables = 10, 12, 1000
    values = np.random.default_rng(8).normal(size=(num_tables, num_settings, num_samples))
    best = values.mean(axis=-1).argmax(axis=-1)
    gaps = values[np.arange(num_tables), best][:, None] - values

    def count_wrong(settings):
        low, _ = bound_means(gaps, settings)
        return float((low > 0).any(axis=-1).mean())

    shared = QUICK["bca"].share_among(count_pairs(num_settings))
    assert shared.level == pytest.approx(1 - 0.05 / 45)
    assert count_wrong(shared) <= 0.05 + 3 * 0.007
    low, _ = bound_by_student(gaps, 0.95)
    assert (low > 0).any(axis=-1).mean() > 0.3, "each at the level for itself"


def test_a_level_that_few_draws_reach_is_students():
    assert name_interval_method(20, QUICK["bca"]) == "bca"
    assert name_interval_method(20, QUICK["bca"].share_among(45)) == "student"
    assert name_interval_method(40, IntervalSettings().share_among(3)) == "bca"


def test_a_share_of_the_error_rate_has_limits():
    assert IntervalSettings(level=0.9).share_among(10).level == pytest.approx(0.99)
    assert IntervalSettings().share_among(0) == IntervalSettings().share_among(1) == IntervalSettings()
    assert IntervalSettings().share_among(10**9).level < 1


# -- clusters ------------------------------------------------------------------------------------------------


def test_seeds_of_one_prompt_do_not_narrow_an_interval():
    """Of 8 prompts with 6 seeds that hardly differ, an interval is that of 8 numbers."""
    rng = np.random.default_rng(4)
    runs = rng.normal(0, 1, size=(400, 8, 1)) + rng.normal(0, 0.1, size=(400, 8, 6))
    labels = [number // 6 for number in range(48)]

    gathered = np.array([gather_clusters(list(run.ravel()), labels) for run in runs])
    low, high = bound_by_student(gathered, 0.95)
    naive_low, naive_high = bound_by_student(runs.reshape(400, 48), 0.95)

    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(0.95, abs=0.035)
    assert ((naive_low <= 0) & (naive_high >= 0)).mean() < 0.7
    clusters = Clusters(labels, "prompt")
    difference = compare_pairs(list(runs[0].ravel()), [0.0] * 48, IntervalSettings(), clusters)
    assert (difference.num_samples, difference.num_units, difference.unit) == (48, 8, "prompt")


def test_unequal_clusters_keep_the_mean_of_all():
    values, labels = [1.0, 2.0, 3.0, 10.0, math.nan], ["a", "a", "a", "b", "c"]

    gathered = gather_clusters(values, labels)

    # the residuals of the ratio 16 / 4, 6 - 3 * 4 and 10 - 1 * 4, over the mean size 2
    assert gathered == pytest.approx([4 - 6 / 2, 4 + 6 / 2])


@pytest.mark.parametrize(
    ("prompts", "inputs", "unit", "count"),
    [
        (["a", "a", "b"], ["", "", ""], "prompt", 2),
        (["a", "b", "c"], ["", "", ""], "sample", 3),
        (["", "", ""], ["x", "y", "x"], "input", 2),
        (["", "", ""], ["x", "y", "z"], "sample", 3),
        (["a", "a", "a"], ["", "", ""], "sample", 3),
        ([], [], "sample", 0),
    ],
)
def test_what_is_independent_are_prompts_else_inputs(prompts, inputs, unit, count):
    clusters = choose_clusters(prompts, inputs)

    assert (clusters.unit, clusters.count) == (unit, count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "basic"}, r"^metrics\.intervals\.method is 'basic'; .*bca, percentile"),
        ({"level": 1}, r"^metrics\.intervals\.level is 1; "),
        ({"level": 0.2}, r"^metrics\.intervals\.level is 0\.2; "),
        ({"resamples": 10}, r"^metrics\.intervals\.resamples is 10; "),
        ({"seed": -1}, r"^metrics\.intervals\.seed is -1; "),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        IntervalSettings(**settings)
