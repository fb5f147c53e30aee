"""The page of a search: plots where there is something to plot, every trial, names that are no markup."""

from typing import Any

from int8run.report.search_page import render_search_page


def make_row(number: int, quality_db: float, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "recipe": f"outlier=o{number}",
        "reason": "alone",
        "state": "finished",
        "error": None,
        "predicted_db": None,
        "predicted_seconds": None,
        "fronts": ["seconds"],
        "quality_db": quality_db,
        "quality_low": quality_db - 1,
        "quality_high": quality_db + 1,
        "seconds": seconds,
        "seconds_low": seconds,
        "seconds_high": seconds * 1.2,
        "bytes": 5e6,
        "difference": "winner",
        "cost": seconds,
        **changes,
    }


def make_failed(number: int) -> dict[str, Any]:
    row = make_row(number, 1.0, 1.0)
    measured = (
        "quality_db",
        "quality_low",
        "quality_high",
        "seconds",
        "seconds_low",
        "seconds_high",
        "bytes",
    )
    for key in (*measured, "difference", "cost"):
        del row[key]
    return {**row, "state": "failed", "error": "out of <memory>", "fronts": []}


def make_facts(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "title": "Search",
        "goal": {"quality_db": 35.0, "minimise": "seconds"},
        "lines": ["cheapest: trial 1"],
        "is_met": True,
        "winner": 1,
        "rows": list(rows),
        "float": {"seconds": 2.0, "bytes": 9e6},
        "predictions": {"combinations": 0},
        "failed": 0,
        "samples": 4,
        "level": 0.95,
        "space": {},
        **changes,
    }


def test_quality_is_plotted_against_a_cost_that_differs() -> None:
    page = render_search_page(make_facts(make_row(0, 40, 2.0), make_row(1, 36, 1.0)))

    assert page.count("<svg") == 2, "time in two widths; the bytes are all the same"
    assert "#1 outlier=o1: 1000 ms, 36.00 dB" in page


def test_a_single_trial_has_no_plot() -> None:
    assert "<svg" not in render_search_page(make_facts(make_row(0, 40, 2.0)))


def test_a_trial_that_failed_is_named_with_its_reason() -> None:
    page = render_search_page(make_facts(make_row(1, 40, 2.0), make_failed(2), failed=1))

    assert "out of &lt;memory&gt;" in page
    assert "<dt>Failed</dt>" in page


def test_trials_stand_from_the_cheapest_on_and_those_without_numbers_last() -> None:
    page = render_search_page(make_facts(make_failed(0), make_row(1, 40, 2.0), make_row(2, 36, 1.0)))

    places = [page.index(f'<th scope="row">#{number}') for number in (2, 1, 0)]
    assert places == sorted(places)


def test_a_quality_that_is_not_met_is_a_warning() -> None:
    page = render_search_page(make_facts(make_row(0, 40, 2.0), is_met=False))

    assert '<p class="warning">cheapest: trial 1</p>' in page
    assert "No trial meets the quality" in page


def test_predictions_are_judged() -> None:
    predictions = {"combinations": 3, "rms_db": 0.5, "mean_db": -0.25, "median_seconds_ratio": 1.1}

    page = render_search_page(
        make_facts(make_row(0, 40, 2.0, predicted_db=39.0, predicted_seconds=1.9), predictions=predictions)
    )

    assert "the quality was 0.50 dB from its prediction" in page
    assert "39.00 dB, 1900.0 ms" in page
