"""The recommendation: what it says, what it rests on, and when it warns or declines."""

import itertools
import math
from functools import partial

import pytest
from report.run_folders import (
    MACHINE,
    make_metrics,
    write_strengths_by_outlier,
)
from report.run_folders import write_run as write_run_without_samples
from report.run_folders import write_runs as write_runs_without_samples

from int8run.report.runs import name_runs
from int8run.report.step_times import has_scattered_times
from int8run.report.verdict import recommend
from int8run.tracking.run_record import find_records

# with this many samples and timings, every difference below is told apart
write_run = partial(write_run_without_samples, num_samples=8)
write_runs = partial(write_runs_without_samples, num_samples=8)


@pytest.mark.parametrize(
    ("metrics", "verdict"),
    [
        (
            [make_metrics(10, 2.0, 40), make_metrics(9, 2.2, 50)],
            "Use #1 outlier=convrot: both the fastest and the closest to float.",
        ),
        (
            [make_metrics(10, 2.0, 40), make_metrics(10.1, 1.98, 50)],
            "Use #1 outlier=convrot: the closest to float, and within 3 % of the fastest.",
        ),
        (
            [make_metrics(10, 2.0, 49.6), make_metrics(20, 1.0, 50)],
            "Use #0 outlier=none: the fastest, and within 0.5 dB of the closest to float.",
        ),
        (
            [make_metrics(10, 2.0, 40), make_metrics(20, 1.0, 50)],
            "Choose: #0 outlier=none is the fastest; "
            "#1 outlier=convrot is 10.0 dB closer to float at 50 % less speed.",
        ),
        (
            [make_metrics(10, None, 40), make_metrics(20, None, math.inf)],
            "Choose: #0 outlier=none is the fastest; "
            "#1 outlier=convrot is equal to float at 50 % less speed.",
        ),
        (
            [make_metrics(10, 0.9, 50), make_metrics(20, 0.5, 40)],
            "Use #0 outlier=none: both the fastest and the closest to float. INT8 is slower than float here.",
        ),
        (
            [make_metrics(10, 2.0, math.inf), make_metrics(20, 1.0, math.inf)],
            "Use #0 outlier=none: both the fastest and the closest to float.",
        ),
        ([make_metrics(10, None, None), make_metrics(20, None, None)], "#0 outlier=none is the fastest."),
        (
            [make_metrics(None, None, 40), make_metrics(None, None, 50)],
            "#1 outlier=convrot is the closest to float. These runs cannot tell which is the fastest.",
        ),
        (
            [make_metrics(10, 2.0, None), make_metrics(20, 1.0, 50)],
            "Choose: #0 outlier=none is the fastest; "
            "#1 outlier=convrot is the closest to float at 50 % less speed.",
        ),
    ],
)
def test_the_verdict_weighs_speed_against_quality(tmp_path, metrics, verdict):
    assert recommend(write_runs(tmp_path, metrics)).verdict == verdict


def test_the_facts_name_the_best_and_those_between_them(tmp_path):
    metrics = [
        make_metrics(10, 2, 40),
        make_metrics(20, 1, 50),
        make_metrics(15, 1.5, 45),
        make_metrics(16, 1.4, 44),
    ]

    found = recommend(write_runs(tmp_path, metrics, "abcd"))

    assert dict(found.facts) == {
        "Fastest": "#0 outlier=a: 10.0 ms per step, 2.00× the float model's speed",
        "Closest to float": "#1 outlier=b: PSNR 50.0 dB, SSIM 0.9900",
        "Between them": "#2 outlier=c: 15.0 ms per step, 1.50× the float model's speed, PSNR 45.0 dB",
        "Smallest": "all: 30.0 MB, 2.00× smaller than float",
        "Pareto front": "#0–#2: no other run is faster without being further from float",
    }


def test_of_candidates_with_equal_bests_only_shared_numbers_are_given(tmp_path):
    metrics = [make_metrics(10, 2.0, 40), make_metrics(12, 2.0, 40), make_metrics(20, 1.0, 30)]

    found = recommend(write_runs(tmp_path, metrics, "abc"))

    facts = dict(found.facts)
    assert facts["Fastest"] == "#0 outlier=a and #1 outlier=b: 2.00× the float model's speed"
    assert facts["Closest to float"].endswith(": PSNR 40.0 dB, SSIM 0.9900")


def test_a_missing_baseline_is_a_warning(tmp_path):
    found = recommend(write_runs(tmp_path, [make_metrics(psnr=None)] * 2))

    assert "metrics.baseline=none" in found.warnings[0]


def test_missing_speeds_are_a_warning(tmp_path):
    found = recommend(write_runs(tmp_path, [make_metrics(step=None, ratio=None)] * 2))

    assert found.warnings == ["No run measured its speed."]


def test_complete_measurements_give_no_warning(tmp_path):
    assert recommend(write_runs(tmp_path, [make_metrics()] * 2)).warnings == []


def test_the_only_run_that_finished_is_named(tmp_path):
    write_run(tmp_path, 0, ["outlier=none"], metrics=make_metrics())
    write_run(tmp_path, 1, ["outlier=auto"], state="FAILED", error="no")

    found = recommend(name_runs(find_records(tmp_path)))

    assert found.verdict.startswith("Only #0 outlier=none was measured: 2.00 times")


CANNOT_TELL = "#1 outlier=1 is the closest to float. These runs cannot tell which is the fastest."


def test_speeds_from_a_shared_machine_are_not_compared(tmp_path):
    for n in range(2):
        metrics = make_metrics(10 + n, 2, 50 + n)
        write_run(tmp_path, n, [f"outlier={n}"], metrics=metrics, jobs_at_once=4)

    found = recommend(name_runs(find_records(tmp_path)))

    assert found.warnings == [
        "Speeds are not comparable: up to 4 jobs shared a machine while they were measured."
    ]
    assert found.facts[0][0] == "Fastest as measured"
    assert found.verdict == CANNOT_TELL


def test_speeds_from_different_machines_are_not_compared(tmp_path):
    for n in range(2):
        machine = MACHINE | ({"gpu": "H200"} if n else {})
        metrics = make_metrics(10 + n, 2, 50 + n)
        write_run(tmp_path, n, [f"outlier={n}"], metrics=metrics, environment=machine, host=f"h{n}")

    found = recommend(name_runs(find_records(tmp_path)))

    assert found.warnings == [
        "Speeds are not comparable: the runs come from different machines (EPYC, 2 threads: #0; H200: #1)."
    ]
    assert found.verdict == CANNOT_TELL


def test_speeds_from_two_hosts_with_equal_hardware_are_compared(tmp_path):
    for n in range(2):
        metrics = make_metrics(10 + n, 2, 50 + n)
        write_run(tmp_path, n, [f"outlier={n}"], metrics=metrics, host=f"h{n}")

    found = recommend(name_runs(find_records(tmp_path)))

    assert found.warnings == [] and found.facts[0][0] == "Fastest"
    assert found.verdict.startswith("Use #1")


def test_scattered_step_times_are_a_warning(tmp_path):
    scattered = make_metrics(10, 2, 50, **{"speed/step_ms_p90": 21})

    found = recommend(write_runs(tmp_path, [scattered, make_metrics(10, 2, 50)]))

    assert found.warnings == [
        "Step times of #0 scatter by more than twice: other work ran on the machine, "
        "so these speeds say little."
    ]


def test_a_strength_is_not_recommended_for_its_quality(tmp_path):
    # Strength 0 is closest to float with every method, and nobody would choose it for that.
    runs = write_strengths_by_outlier(
        tmp_path, lambda strength, outlier: 60 - 10 * strength + 2 * (outlier == "convrot"), num_samples=8
    )

    found = recommend(runs)

    assert found.verdict.startswith(
        "Choose: outlier=none is the fastest; outlier=convrot is 2.0 dB closer to float at 50 % less speed."
    )
    assert dict(found.facts)["Medians over"].startswith("lora.strength (3 runs each): chosen for the image")


def test_runs_that_differ_in_strength_alone_are_summarized(tmp_path):
    metrics = [make_metrics(psnr=58.0), make_metrics(psnr=44.0)]

    found = recommend(write_runs(tmp_path, metrics, ("0", "1"), key="lora.strength"))

    assert found.verdict.startswith(
        "There is no setting to choose: these runs differ in lora.strength alone, which changes what is "
        "generated and not how well it is quantized. Their medians: "
    )
    assert "51.0 dB PSNR" in found.verdict
    assert (
        "Medians over",
        "lora.strength (2 runs): chosen for the image, so INT8 is compared with float at each value",
    ) in found.facts


@pytest.mark.parametrize("key", ["sampler.steps", "model.location"])
def test_runs_that_generated_different_images_are_not_compared(tmp_path, key):
    metrics = [make_metrics(psnr=58.0), make_metrics(psnr=44.0)]

    found = recommend(write_runs(tmp_path, metrics, ("a", "b"), key=key))

    assert found.verdict == "These runs generated different images, so they do not show which setting to use."
    assert found.warnings[0].startswith(f"Quality is not comparable: the runs differ in {key}, so")


def test_runs_with_different_prompts_are_summarized(tmp_path):
    # Each INT8 image is compared with its own float image.
    metrics = [make_metrics(psnr=58.0), make_metrics(psnr=44.0)]

    found = recommend(write_runs(tmp_path, metrics, ("a", "b"), key="prompts"))

    assert "51.0 dB" in found.verdict


def test_a_baseline_of_the_same_file_is_a_warning(tmp_path):
    """A float model that was read from the file itself is as wrong as the file."""
    runs = write_runs(
        tmp_path, [make_metrics(), make_metrics() | {"quality/float_layers_from_same_file": 38}]
    )
    (warning,) = recommend(runs).warnings

    assert warning.startswith(
        "The float model of #1 was read from the same quantized file: PSNR to float shows"
    )


def test_a_candidate_that_was_not_timed_is_not_called_almost_as_fast(tmp_path):
    found = recommend(write_runs(tmp_path, [make_metrics(10, 2.0, 40), make_metrics(None, None, 50)]))

    assert found.verdict == (
        "Choose: #0 outlier=none is the fastest that was timed; #1 outlier=convrot is the closest to float, "
        "and its speed was not measured."
    )
    assert found.warnings == ["The speed of #1 was not measured."]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_candidate_whose_quality_is_not_known_is_named(tmp_path, missing):
    runs = write_runs(tmp_path, [make_metrics(10, 2.0, missing), make_metrics(20, 1.0, 50)])

    assert recommend(runs).warnings == ["The quality of #0 was not measured."]


@pytest.mark.parametrize("key", ["lora.strength", "seed", "outlier", "sampler.steps"])
def test_without_float_images_nothing_is_said_of_a_comparison_with_float(tmp_path, key):
    metrics = [make_metrics(10, None, None, None), make_metrics(11, None, None, None)]

    found = recommend(write_runs(tmp_path, metrics, options=("1", "2"), key=key))

    said = " ".join([found.verdict, *found.warnings, *(f"{term} {text}" for term, text in found.facts)])
    assert "compared with float" not in said and "different images of the float model" not in said
    assert "metrics.baseline=none" in said


@pytest.mark.parametrize("metric", ["speed/step_ms_p90", "float/step_ms_p90"])
def test_the_report_and_the_run_call_the_same_jobs_scattered(tmp_path, metric):
    steady = make_metrics(10, 2, 50, **{"float/step_ms_p50": 20.0, "float/step_ms_p90": 21.0})
    scattered = steady | {metric: 45.0}

    found = recommend(write_runs(tmp_path, [scattered, steady]))

    assert has_scattered_times(scattered) and not has_scattered_times(steady)
    assert found.warnings[0].startswith("Step times of #0 scatter by more than twice")


def test_loras_are_not_recommended_for_their_quality(tmp_path):
    metrics = [make_metrics(psnr=58.0), make_metrics(psnr=44.0)]

    found = recommend(write_runs(tmp_path, metrics, ("none", "stack_a"), key="lora"))

    assert found.verdict.startswith("There is no setting to choose: these runs differ in lora alone")
    assert "Pareto front" not in dict(found.facts)


def test_models_are_not_compared_although_both_ran_with_the_same_seeds(tmp_path):
    for number, (model, seed) in enumerate(itertools.product(("a", "b"), (0, 1))):
        overrides = [f"model.location={model}", f"seed={seed}"]
        write_run(tmp_path, number, overrides, metrics=make_metrics(psnr=40.0 + number))

    found = recommend(name_runs(find_records(tmp_path)))

    assert found.verdict == "These runs generated different images, so they do not show which setting to use."


def test_the_front_of_a_mixed_folder_is_that_of_runs_with_the_same_images(tmp_path):
    psnr_by_overrides = {
        ("prompts=a", "outlier=none"): 40,
        ("prompts=a", "outlier=auto"): 45,
        ("prompts=b",): 60,
    }
    for number, (overrides, psnr) in enumerate(psnr_by_overrides.items()):
        write_run(tmp_path, number, overrides, metrics=make_metrics(psnr=float(psnr)))

    found = recommend(name_runs(find_records(tmp_path)))

    assert dict(found.facts) == {
        "Among equal images": (
            "#1: no run with the same float images is faster without being further from float"
        )
    }


def test_a_run_that_is_its_own_baseline_is_not_the_closest_to_float(tmp_path):
    """INT8 layers are used as they are in the file that the float model was read from."""
    own = make_metrics(9, 2.2, math.inf, **{"quality/float_layers_from_same_file": 38})

    found = recommend(write_runs(tmp_path, [make_metrics(10, 2.0, 40), own]))

    assert found.verdict == (
        "Choose: #1 outlier=convrot is the fastest; #0 outlier=none is the closest to float "
        "at 9 % less speed."
    )
    assert found.warnings[0].endswith(
        "INT8 and float have the same numbers in #1, so quality is not compared with that of other runs."
    )
    assert dict(found.facts)["Pareto front"].startswith("#0:")


# -- what is told apart --------------------------------------------------------------------------------------


def test_settings_whose_interval_holds_zero_are_not_ranked(tmp_path):
    metrics = [make_metrics(10, 2.0, 50.0), make_metrics(10, 1.9999, 50.01)]

    found = recommend(write_runs(tmp_path, metrics))

    assert found.verdict.startswith("These settings cannot be told apart, in speed (8 timings do not tell;")
    assert "or in quality (8 samples do not tell;" in found.verdict
    assert "Closest as measured" in dict(found.facts) and "Fastest as measured" in dict(found.facts)


def test_a_surely_faster_setting_is_used_where_quality_is_not_told_apart(tmp_path):
    metrics = [make_metrics(10, 2.0, 50.0), make_metrics(20, 1.0, 50.01)]

    found = recommend(write_runs(tmp_path, metrics))

    assert found.verdict.startswith(
        "Use #0 outlier=none: the fastest, and none is surely closer to float (8 "
    )


def test_a_surely_closer_setting_is_used_where_speed_is_not_told_apart(tmp_path):
    metrics = [make_metrics(10, 2.0, 40.0), make_metrics(10.0001, 1.99999, 50.0)]

    found = recommend(write_runs(tmp_path, metrics))

    assert found.verdict.startswith(
        "Use #1 outlier=convrot: the closest to float, and none is surely faster (8 timings do not tell"
    )


@pytest.mark.parametrize(
    ("num_samples", "reason"),
    [
        (0, "they have no timings that can be compared"),
        (1, "one timing has no interval; more prompts or seeds give one"),
    ],
)
def test_a_few_steps_rank_nothing(tmp_path, num_samples, reason):
    """Two to four steps of one image are one timing."""
    metrics = [make_metrics(10, 2.0, 40), make_metrics(20, 1.0, 50)]

    found = recommend(write_runs_without_samples(tmp_path, metrics, num_samples=num_samples))

    assert found.verdict.startswith(
        f"These settings cannot be told apart, in speed ({reason}) or in quality ("
    )
    assert "the fastest" not in found.verdict


def test_of_settings_that_are_surely_behind_those_ahead_are_left(tmp_path):
    metrics = [make_metrics(10, 2.0, 50.0), make_metrics(10, 1.9999, 50.01), make_metrics(20, 1.0, 30.0)]

    found = recommend(write_runs(tmp_path, metrics, "abc"))

    assert found.verdict.startswith("#0 outlier=a and #1 outlier=b cannot be told apart, in speed (")
    assert found.verdict.endswith("the others are surely slower or further from float.")
