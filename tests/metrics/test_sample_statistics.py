"""What the samples of a run say of its metrics: intervals, medians, the worst, and what is no number."""

import logging
import math

import pytest

from int8run.generate.generate import Generation
from int8run.metrics.clusters import Clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import compute_interval
from int8run.metrics.names import METRICS
from int8run.metrics.quality import SampleQuality
from int8run.metrics.sample_statistics import summarize_samples
from int8run.metrics.speed import bound_speed_ratio, pair_blocks

SETTINGS = IntervalSettings(resamples=999)


def summarize(name, values):
    """The statistics of samples that have one metric."""
    samples = [SampleQuality({name: value}, []) for value in values]
    return summarize_samples(samples, [f"s{index}" for index in range(len(values))], SETTINGS)


def test_every_metric_of_samples_has_mean_interval_and_median():
    statistics = summarize("psnr_db", [50.0, 52.0, 54.0, 56.0, 58.0, 60.0, 90.0])

    metrics = statistics.flatten()
    entry = statistics.to_json()["metrics"]["quality/psnr_db"]

    assert metrics["quality/psnr_db"] == 60 and metrics["quality/psnr_db_median"] == 56
    assert metrics["quality/psnr_db_low"] < 60 < metrics["quality/psnr_db_high"]
    assert metrics["quality/samples"] == 7 and metrics.keys() <= METRICS.keys()
    assert entry["worst"] == ["s0", "s1", "s2", "s3", "s4"] and entry["method"] == "bca"


def test_of_a_distance_the_largest_are_the_worst():
    statistics = summarize("lpips", [0.1, 0.4, 0.2])

    assert statistics.by_metric["quality/lpips"].worst == ["s1", "s2", "s0"]
    assert summarize("drift", [0.1, 0.4]).by_metric["quality/drift"].worst == []


def test_one_sample_has_no_interval_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        metrics = summarize("psnr_db", [50.0]).flatten()

    assert metrics == {"quality/psnr_db": 50, "quality/psnr_db_median": 50, "quality/samples": 1}
    assert "one sample has no interval" in caplog.text


def test_identical_images_are_counted_and_left_out_of_the_interval():
    found = summarize("psnr_db", [math.inf, 50.0, 52.0, math.inf]).by_metric["quality/psnr_db"]

    assert (found.mean, found.median) == (51, 52)
    assert (found.num_samples, found.num_infinite) == (2, 2)
    assert found.interval.low < 51 < found.interval.high and found.method == "student"


def test_an_interval_is_over_prompts_where_they_have_several_seeds():
    values = [50.0, 50.1, 52.0, 52.1, 54.0, 54.1]
    samples = [SampleQuality({"psnr_db": value}, []) for value in values]
    clusters = Clusters(["a", "a", "b", "b", "c", "c"], "prompt")

    found = summarize_samples(samples, list("uvwxyz"), SETTINGS, clusters)

    entry = found.by_metric["quality/psnr_db"]
    expected = compute_interval([50.05, 52.05, 54.05], SETTINGS)
    assert (entry.num_samples, entry.num_units, entry.method) == (6, 3, "student")
    assert (entry.interval.low, entry.interval.high) == pytest.approx((expected.low, expected.high))
    assert found.flatten()["quality/independent_samples"] == 3
    assert "quality/independent_samples" not in summarize("psnr_db", values).flatten()


def test_images_that_are_all_identical_have_no_interval():
    metrics = summarize("psnr_db", [math.inf] * 8).flatten()

    assert metrics["quality/psnr_db"] == metrics["quality/psnr_db_median"] == math.inf
    assert "quality/psnr_db_low" not in metrics


def test_what_is_not_a_number_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        found = summarize("ssim", [0.9, math.nan, 0.8]).by_metric["quality/ssim"]

    assert found.mean == pytest.approx(0.85) and found.num_undefined == 1
    assert "quality/ssim is not a number (NaN) in 1 of 3 samples (s1); they are left out" in caplog.text


def test_a_metric_that_is_never_a_number_stays_none():
    found = summarize("ssim", [math.nan] * 4).by_metric["quality/ssim"]

    assert math.isnan(found.mean) and math.isnan(found.median) and found.interval is None


# -- speed ---------------------------------------------------------------------------------------------------


def make_timed(*batches):
    return Generation(step_seconds=[list(batch) for batch in batches])


def test_of_many_batches_each_is_one_timing():
    batches = [[9, 0.001, 0.002, 0.003]] * 6

    step_ms, float_ms = pair_blocks(make_timed(*batches), make_timed(*batches), least_batches=6)

    assert step_ms == float_ms == pytest.approx([2.0] * 6)


def test_of_few_batches_four_steps_are_one_timing():
    steps = [9, 1, 1, 1, 1, 2, 2, 2, 2, 2]

    step_ms, float_ms = pair_blocks(make_timed(steps), make_timed(steps), least_batches=6)

    assert step_ms == float_ms == [1000, 2000]


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_a_few_steps_of_one_image_are_one_timing_without_an_interval(num_steps):
    step_ms, float_ms = pair_blocks(make_timed([1] * num_steps), make_timed([2] * num_steps), least_batches=6)

    assert len(step_ms) == 1 and bound_speed_ratio(step_ms, float_ms, 2.0, SETTINGS) == {}


def test_a_float_model_that_is_only_timed_pairs_with_the_first_steps():
    step_ms, float_ms = pair_blocks(make_timed([9] + [1] * 8), make_timed([9, 2, 2, 2]), least_batches=6)

    assert (step_ms, float_ms) == ([1000], [2000])


def test_a_disturbance_of_both_models_does_not_widen_the_interval_of_their_ratio():
    load = [1.0, 3.0, 1.5, 2.0, 1.0, 2.5, 1.2, 1.7]
    step_ms = [10 * factor for factor in load]
    float_ms = [20 * factor * (1 + 0.01 * (index % 2)) for index, factor in enumerate(load)]

    limits = bound_speed_ratio(step_ms, float_ms, 2.01, SETTINGS)

    low, high = limits["speed/ratio_vs_float_low"], limits["speed/ratio_vs_float_high"]
    assert 1.98 < low < 2.01 < high < 2.04


def test_an_interval_ends_where_its_metric_does():
    error = summarize("latent_rel_err", [0.001, 0.002, 0.03]).by_metric["quality/latent_rel_err"]
    similarity = summarize("ssim", [0.999, 0.998, 0.95]).by_metric["quality/ssim"]
    reward = summarize("image_reward", [0.001, 0.002, 0.03]).by_metric["quality/image_reward"]

    assert error.interval.low == 0 and error.interval.high > 0.03
    assert similarity.interval.high == 1 and similarity.interval.low < 0.95
    assert reward.interval.low < 0
