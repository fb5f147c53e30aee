"""Predictions from ingredients alone: exact where errors add and times multiply, absent where numbers are."""

import pytest
from search.search_cases import FakeRunner, make_space, measure_additive

from int8run.search.estimate import Estimator, summarize_predictions
from int8run.search.trials import ALONE, PREDICTED, Prediction, Trial


def run_alone(runner=None):
    space = make_space()
    recipes = [space.base, *space.list_alone()]
    trials = [Trial(number, ALONE, recipe) for number, recipe in enumerate(recipes)]
    return space, (runner or FakeRunner())(trials)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": "4", "cache": "block", "threshold": 0.05},
        {"bits": "4", "cache": "block", "threshold": 0.4},
        {"outlier": "convrot"},
    ],
    ids=str,
)
def test_a_recipe_whose_errors_add_is_predicted_exactly(changes):
    space, trials = run_alone()
    recipe = space.complete(changes)

    predicted = Estimator(space, trials).predict(recipe)

    measured = measure_additive(recipe)
    assert predicted.quality_db == pytest.approx(measured.quality_db, abs=0.01)
    assert predicted.seconds == pytest.approx(measured.seconds)
    assert predicted.bytes == pytest.approx(measured.bytes)


def test_within_a_range_a_prediction_lies_between_its_ends():
    space, trials = run_alone()
    estimator = Estimator(space, trials)

    predictions = [
        estimator.predict(space.complete({"cache": "block", "threshold": threshold}))
        for threshold in (0.05, 0.1, 0.2, 0.4)
    ]

    assert predictions == sorted(predictions, key=lambda predicted: -predicted.quality_db)
    assert predictions == sorted(predictions, key=lambda predicted: -predicted.seconds)


def test_an_ingredient_that_failed_alone_is_not_predicted():
    space, trials = run_alone(FakeRunner(is_failing=lambda params: params["bits"] == "4"))
    estimator = Estimator(space, trials)

    assert estimator.predict(space.complete({"bits": "4", "outlier": "convrot"})) is None
    assert estimator.predict(space.complete({"outlier": "convrot"})) is not None


def test_without_the_base_nothing_is_predicted():
    space = make_space()

    assert Estimator(space, []).predict(space.base) is None


def test_the_error_of_predictions_is_that_of_combinations():
    space, trials = run_alone()
    recipe = space.complete({"bits": "4", "outlier": "convrot"})
    measured = measure_additive(recipe)
    wrong = Prediction(measured.quality_db - 2, measured.seconds * 2, measured.bytes)
    trials = [*trials, *FakeRunner()([Trial(9, PREDICTED, recipe, wrong)])]

    estimator = Estimator(space, trials)

    assert estimator.offset_db == pytest.approx(2)
    assert estimator.error_db == pytest.approx(2)
    summary = summarize_predictions(trials)
    assert summary == pytest.approx({"combinations": 1, "rms_db": 2, "mean_db": 2, "median_seconds_ratio": 2})


def test_without_combinations_there_is_no_error():
    space, trials = run_alone()

    assert Estimator(space, trials).error_db is None
    assert summarize_predictions(trials) == {"combinations": 0}
