"""Numbers that no measurement can have are found, and surprising ones are not."""

import math

import pytest
from report.run_folders import make_metrics

from int8run.report.columns import PSNR_DB, SPEED_RATIO
from int8run.report.plausibility import find_doubts


def test_an_honest_result_has_no_doubts():
    metrics = make_metrics(10.0, 2.0, math.inf) | {
        "float/step_ms_p50": 20.0,
        "quality/psnr_db_low": 40.0,
        "quality/psnr_db_high": math.inf,
        "quant/macs_int8_share": 1.0,
        "memory/text_encoder_bytes": 0,
        "clip/cosine_mean": 1.0 + 2**-23,
        "a/metric_of_a_later_version": -5.0,
    }

    assert find_doubts(metrics) == []


def test_the_interval_of_two_samples_reaches_beyond_its_metric():
    two_samples = {
        "quality/ssim_low": 0.2,
        "quality/ssim_high": 1.6,
        f"{PSNR_DB}_low": -23.5,
        f"{PSNR_DB}_high": 103.5,
    }

    assert find_doubts(two_samples) == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (PSNR_DB, -3.0, "outside 0"),
        (PSNR_DB, -math.inf, "it is infinite"),
        (PSNR_DB, math.nan, "not a number"),
        (PSNR_DB, "54", "it is no number"),
        (PSNR_DB, True, "it is no number"),
        ("quality/ssim", 1.2, "outside -1"),
        (SPEED_RATIO, 0.0, "outside 0.001"),
        (SPEED_RATIO, math.inf, "it is infinite"),
        ("speed/step_ms_p50", -1.0, "outside"),
        ("quant/macs_int8_share", 1.01, "outside 0 … 1"),
        ("energy/joules_per_image", -2.0, "outside"),
        ("memory/denoiser_bytes", 0, "outside 1"),
        ("a/metric_of_a_later_version", 10**400, "too large for a number"),
        (f"{PSNR_DB}_low", -math.inf, "it is infinite"),
        (f"{PSNR_DB}_high", 1e300, "outside -400000 … 400400"),
        ("a/metric_of_a_later_version_high", 1e300, "outside -1e+30 … 1e+30"),
    ],
)
def test_what_cannot_be_is_named(name, value, reason):
    (doubt,) = find_doubts({name: value})

    assert doubt.metric == name and reason in doubt.reason


def test_a_ratio_that_its_own_times_contradict_is_doubted():
    (doubt,) = find_doubts({SPEED_RATIO: 3.0, "float/step_ms_p50": 20.0, "speed/step_ms_p50": 10.0})

    assert doubt.metric == SPEED_RATIO
    assert doubt.reason == "float/step_ms_p50 over speed/step_ms_p50 is 2"


@pytest.mark.parametrize("value", [47.0, 53.0])
def test_an_interval_that_does_not_hold_its_value_is_doubted(value):
    doubts = find_doubts({PSNR_DB: value, f"{PSNR_DB}_low": 48.0, f"{PSNR_DB}_high": 52.0})

    assert [doubt.metric for doubt in doubts] == [f"{PSNR_DB}_low", f"{PSNR_DB}_high"]
    assert doubts[0].reason == f"the interval does not hold the value {value:g}"


def test_an_interval_that_ends_before_it_begins_is_doubted():
    doubts = find_doubts({PSNR_DB: 50.0, f"{PSNR_DB}_low": 52.0, f"{PSNR_DB}_high": 48.0})

    assert {doubt.metric for doubt in doubts} == {f"{PSNR_DB}_low", f"{PSNR_DB}_high"}
