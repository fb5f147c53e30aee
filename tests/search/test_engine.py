"""Which recipe runs next: the base, each ingredient alone, then few combinations; going on; failures."""

import json

import pytest
from search.search_cases import FakeRunner, make_measurement, make_space, measure_additive

from int8run.search.engine import Goal, Search, count_failed
from int8run.search.front import choose_winner, find_front, select_tied
from int8run.search.space import freeze
from int8run.search.trials import ALONE, BASE, PLANNED, Trial

pytest.importorskip("optuna")


def make_search(runner, trials=(), **goal):
    goal = Goal(**{"minimise": "seconds", "quality_db": 33.0, "num_trials": 20, **goal})
    saved = []
    search = Search(make_space(), goal, runner, lambda kept: saved.append(list(kept)), list(trials))
    return search, saved


def find_cheapest(minimise, quality_db):
    """By trying every combination."""
    space = make_space()
    measured = [measure_additive(recipe) for recipe in space.list_combinations(0)]
    return min(one.get_cost(minimise) for one in measured if one.quality_db >= quality_db)


@pytest.mark.parametrize(("minimise", "quality_db"), [("seconds", 33.0), ("seconds", 42.0), ("bytes", 33.0)])
def test_it_finds_what_trying_everything_finds_in_half_of_the_runs(minimise, quality_db):
    runner = FakeRunner()
    search, _ = make_search(runner, minimise=minimise, quality_db=quality_db, num_trials=12)

    trials = search.run()

    winner, is_met = choose_winner(trials, minimise, quality_db)
    assert is_met
    # a threshold between the points that were enumerated may be cheaper still
    assert winner.measured.get_cost(minimise) <= find_cheapest(minimise, quality_db) + 1e-9
    assert len(trials) <= 12


def test_the_base_runs_first_and_all_ingredients_alone_at_once():
    runner = FakeRunner()
    search, _ = make_search(runner)

    trials = search.run()

    assert runner.batches[:2] == [[0], [1, 2, 3, 4]]
    assert [trial.reason for trial in trials[:5]] == [BASE, ALONE, ALONE, ALONE, ALONE]
    assert all(trial.predicted is not None for trial in trials[5:])


def test_no_recipe_runs_twice():
    search, _ = make_search(FakeRunner())

    trials = search.run()

    assert len({freeze(trial.params) for trial in trials}) == len(trials)


def test_the_plan_is_kept_before_it_runs():
    runner = FakeRunner()
    search, saved = make_search(runner)

    search.run()

    assert [trial.state for trial in saved[0]] == [PLANNED]
    assert len(saved) == 2 * len(runner.batches)


def test_as_many_are_chosen_at_once_as_can_run_at_once():
    runner = FakeRunner()
    search, _ = make_search(runner, batch=3, num_trials=11)

    search.run()

    assert [len(batch) for batch in runner.batches] == [1, 4, 3, 3]


def test_a_search_that_was_killed_goes_on_with_what_it_has(tmp_path):
    class Killed(FakeRunner):
        def __call__(self, trials):
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().__call__(trials)

    search, saved = make_search(Killed())
    with pytest.raises(KeyboardInterrupt):
        search.run()
    kept = [Trial.from_json(json.loads(json.dumps(trial.to_json()))) for trial in saved[-1]]
    runner = FakeRunner()

    resumed, _ = make_search(runner, kept)
    trials = resumed.run()

    # the batch that was cut off runs first, and nothing that had ended runs again
    assert runner.batches[0] == [trial.number for trial in kept if trial.state == PLANNED]
    assert not {number for batch in runner.batches[1:] for number in batch} & {trial.number for trial in kept}
    assert choose_winner(trials, "seconds", 33.0)[1]


def test_more_runs_go_on_where_fewer_have_ended():
    first, _ = make_search(FakeRunner(), num_trials=6)
    trials = first.run()
    runner = FakeRunner()

    second, _ = make_search(runner, trials, num_trials=8)
    second.run()

    assert runner.batches == [[6], [7]]


def test_failed_trials_are_counted_and_end_nothing():
    search, _ = make_search(FakeRunner(is_failing=lambda params: params["bits"] == "4"))

    trials = search.run()

    assert count_failed(trials) == 1, "no combination with what failed alone is tried"
    assert choose_winner(trials, "seconds", 33.0)[1]


def test_combinations_that_fail_use_runs_up():
    def is_failing(params):
        return sum(params[name] != base for name, base in make_space().base.items()) > 1

    search, _ = make_search(FakeRunner(is_failing=is_failing), num_trials=9)

    trials = search.run()

    assert len(trials) == 9
    assert 0 < count_failed(trials) <= 4
    assert choose_winner(trials, "seconds", 33.0)[1]


def test_too_few_runs_for_each_ingredient_are_said(caplog):
    search, _ = make_search(FakeRunner(), num_trials=3)

    trials = search.run()

    assert len(trials) == 3
    assert "task.n_trials=3 is not enough for each ingredient alone (5); 2 are not run" in caplog.text


def test_a_quality_that_no_recipe_meets_gives_the_nearest():
    search, _ = make_search(FakeRunner(), quality_db=80.0)

    trials = search.run()

    winner, is_met = choose_winner(trials, "seconds", 80.0)
    assert not is_met
    assert winner.params["outlier"] == "convrot"
    assert winner.measured.quality_db == max(trial.measured.quality_db for trial in trials)


def test_the_front_has_what_nothing_beats():
    def make(number, quality_db, seconds):
        return FakeRunner(lambda params: make_measurement(quality_db, seconds)).end(Trial(number, ALONE, {}))

    trials = [make(0, 40, 2.0), make(1, 30, 1.0), make(2, 35, 2.0), make(3, 30, 1.5), make(4, 50, 9.0)]

    assert [trial.number for trial in find_front(trials, "seconds")] == [1, 0, 4]


def test_of_trials_whose_times_are_not_told_apart_the_best_one_wins():
    def make(number, quality_db, seconds, spread):
        measured = make_measurement(quality_db, seconds, nbytes=100.0 + number, spread=spread)
        return FakeRunner(lambda params: measured).end(Trial(number, ALONE, {}))

    trials = [make(0, 40, 1.05, 0.05), make(1, 36, 1.0, 0.05), make(2, 50, 1.5, 0.05)]

    assert choose_winner(trials, "seconds", 33.0)[0].number == 0
    assert [trial.number for trial in select_tied(trials, trials[1], "seconds")] == [0, 1]
    # bytes are exact
    assert choose_winner(trials[1:], "bytes", 33.0)[0].number == 1
    precise = [make(0, 40, 1.05, 0.001), make(1, 36, 1.0, 0.001)]
    assert choose_winner(precise, "seconds", 33.0)[0].number == 1


def test_without_a_finished_trial_there_is_no_winner():
    assert choose_winner([Trial(0, BASE, {})], "seconds", 3.0) == (None, False)
