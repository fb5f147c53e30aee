"""The search itself: which recipe is run next, until the runs are used up or nothing better is predicted.

First the base, then each ingredient alone; from these every combination is predicted. Then, in turn, the
cheapest combination that is predicted to meet the quality, and what Optuna's sampler proposes, unless the
prediction says that a recipe which has run is as good. Knows no models and no launchers: `run_trials` runs.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from int8run.search.estimate import Estimator
from int8run.search.front import choose_winner, get_cost, get_quality
from int8run.search.proposals import Proposer
from int8run.search.space import Params, SearchSpace, freeze
from int8run.search.trials import ALONE, BASE, PLANNED, PREDICTED, SAMPLED, Prediction, Trial, select_finished
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
# runs trials, in parallel where it can, and returns them as they ended
RunTrials = Callable[[Sequence[Trial]], Sequence[Trial]]
MARGIN_DB = 1.0  # a recipe is tried where its prediction, this much better, would be worth having
LEAST_GAIN_DB = 0.5  # of a recipe that is tried for the front alone


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Args:
        minimise: the cost: `seconds` or `bytes`.
        quality_db: the least mean PSNR to the reference.
        num_trials: runs that may be used.
        batch: runs that are planned together, so that as many can run at once.
        seed: of the sampler.
    """

    minimise: str
    quality_db: float
    num_trials: int
    batch: int = 1
    seed: int = 0


@dataclass
class Search:
    """A search while it runs; its trials are all that it has to remember.

    Args:
        space: what is searched.
        goal: what is asked for.
        run_trials: runs some.
        save: keeps the trials; called before each batch and after it.
        trials: of an earlier start of the same search.
    """

    space: SearchSpace
    goal: Goal
    run_trials: RunTrials
    save: Callable[[Sequence[Trial]], None]
    trials: list[Trial] = field(default_factory=list)

    def run(self) -> list[Trial]:
        """Run until the runs are used up or nothing better is predicted; returns all trials."""
        self.finish_planned()
        self.run_batch(BASE, [self.space.base], predictions=[None])
        self.run_alone()
        proposer = Proposer(self.space, self.goal.minimise, self.goal.seed, self.trials)
        turn = 0
        while self.num_left > 0:
            estimator = Estimator(self.space, self.trials)
            recipes = self.choose_recipes(estimator, proposer, turn)
            if not recipes:
                log.info(
                    "nothing else is predicted to be better: %s of %d used",
                    self.count_runs(),
                    self.goal.num_trials,
                )
                break
            reasons = [reason for reason, _ in recipes]
            chosen = [params for _, params in recipes]
            ended = self.run_batch(reasons, chosen, [estimator.predict(params) for params in chosen])
            for trial in ended:
                proposer.report(trial)
            turn += len(recipes)
        return self.trials

    @property
    def num_left(self) -> int:
        """How many more runs may be used; runs that failed count."""
        return self.goal.num_trials - len(self.trials)

    def count_runs(self) -> str:
        """How many runs were used, in words."""
        return count_noun(len(self.trials), "run")

    def finish_planned(self) -> None:
        """Run what an earlier start had planned and not ended."""
        planned = [trial for trial in self.trials if trial.state == PLANNED]
        if planned:
            log.info("%s of the search did not end and run again", count_noun(len(planned), "trial"))
            self.replace_trials(self.run_trials(planned))

    def run_alone(self) -> None:
        """Run each ingredient alone, as many as may be."""
        recipes = self.select_new(self.space.list_alone())
        if len(recipes) > self.num_left:
            log.warning(
                "task.n_trials=%d is not enough for each ingredient alone (%d); %d are not run, and no "
                "combination is predicted",
                self.goal.num_trials,
                len(self.trials) + len(recipes),
                len(recipes) - self.num_left,
            )
        recipes = recipes[: max(0, self.num_left)]
        self.run_batch(ALONE, recipes, [None] * len(recipes))

    def select_new(self, recipes: Sequence[Params]) -> list[Params]:
        """The recipes that no trial has."""
        known = {freeze(trial.params) for trial in self.trials}
        return [recipe for recipe in recipes if freeze(recipe) not in known]

    def run_batch(
        self,
        reasons: str | Sequence[str],
        recipes: Sequence[Params],
        predictions: Sequence[Prediction | None],
    ) -> Sequence[Trial]:
        """Plan trials, keep the plan, run them and keep how they ended.

        Args:
            reasons: one for all, or one for each.
            recipes: those that a trial has already are not run again.
            predictions: of each recipe.
        """
        if isinstance(reasons, str):
            reasons = [reasons] * len(recipes)
        known = {freeze(trial.params) for trial in self.trials}
        planned: list[Trial] = []
        for reason, params, predicted in zip(reasons, recipes, predictions, strict=True):
            if freeze(params) not in known:
                planned.append(Trial(len(self.trials) + len(planned), reason, params, predicted))
        if not planned:
            return []
        self.trials += planned
        self.save(self.trials)
        ended = self.run_trials(planned)
        self.replace_trials(ended)
        return ended

    def replace_trials(self, ended: Sequence[Trial]) -> None:
        """Put trials that have ended in the place of their plans."""
        by_number = {trial.number: trial for trial in ended}
        self.trials[:] = [by_number.get(trial.number, trial) for trial in self.trials]
        self.save(self.trials)

    # -- what is run next ----------------------------------------------------------------------------

    def choose_recipes(self, estimator: Estimator, proposer: Proposer, turn: int) -> list[tuple[str, Params]]:
        """The recipes of the next batch, each with the reason: PREDICTED and SAMPLED take turns.

        Args:
            estimator: from the trials so far.
            proposer: the sampler.
            turn: how many combinations were chosen before.
        """
        chosen: list[tuple[str, Params]] = []
        taken = {freeze(trial.params) for trial in self.trials}
        ranked = self.rank_predicted(estimator)

        def accept(params: Params) -> bool:
            return freeze(params) not in taken and self.is_promising(estimator.predict(params), estimator)

        def accept_for_front(params: Params) -> bool:
            if freeze(params) in taken or self.space.has_overruled_choice(params):
                return False
            return accept(params) or self.extends_front(estimator.predict(params), estimator)

        for position in range(min(self.goal.batch, self.num_left)):
            prefers_sampler = (turn + position) % 2 == 1
            predicted = next((params for params in ranked if accept(params)), None)
            reason, params = PREDICTED, predicted
            if predicted is None or prefers_sampler:
                proposed = proposer.propose(accept_for_front)
                if proposed is not None:
                    reason, params = SAMPLED, proposed
            if params is None:
                break
            chosen.append((reason, params))
            taken.add(freeze(params))
        return chosen

    def rank_predicted(self, estimator: Estimator) -> list[Params]:
        """Combinations that are predicted to meet the quality, the cheapest first; then the best others."""
        meeting: list[tuple[float, Params]] = []
        others: list[tuple[float, Params]] = []
        for params in self.select_new(self.space.list_combinations(self.goal.seed)):
            predicted = estimator.predict(params)
            if predicted is None:
                continue
            quality_db = predicted.quality_db + estimator.offset_db
            if quality_db >= self.goal.quality_db:
                meeting.append((predicted.get_cost(self.goal.minimise), params))
            else:
                others.append((-quality_db, params))
        ranked = sorted(meeting, key=lambda pair: pair[0]) + sorted(others, key=lambda pair: pair[0])
        return [params for _, params in ranked]

    def is_promising(self, predicted: Prediction | None, estimator: Estimator) -> bool:
        """Whether a recipe may be better than all that have run.

        It may where it is predicted cheaper than the cheapest trial that meets the quality, and to meet it
        within a margin; before any trial meets it, where it may come nearer. The margin is the error of the
        predictions so far, at least MARGIN_DB.
        """
        if predicted is None:
            return False
        margin = max(MARGIN_DB, estimator.error_db or 0.0)
        hoped_db = predicted.quality_db + estimator.offset_db + margin
        winner, is_met = choose_winner(self.trials, self.goal.minimise, self.goal.quality_db)
        if winner is None:
            return True
        if not is_met:
            return hoped_db > get_quality(winner)
        return hoped_db >= self.goal.quality_db and predicted.get_cost(self.goal.minimise) < get_cost(
            winner, self.goal.minimise
        )

    def extends_front(self, predicted: Prediction | None, estimator: Estimator) -> bool:
        """Whether a recipe is predicted to be better than every trial that is as cheap, by LEAST_GAIN_DB."""
        if predicted is None:
            return False
        cost = predicted.get_cost(self.goal.minimise)
        qualities = []
        for trial in select_finished(self.trials):
            if get_cost(trial, self.goal.minimise) <= cost:
                qualities.append(get_quality(trial))
        return predicted.quality_db + estimator.offset_db > max(qualities, default=-math.inf) + LEAST_GAIN_DB


def mark_failed(trial: Trial, state: str, error: str) -> Trial:
    """A trial that ended without numbers."""
    return replace(trial, state=state, error=error)


def count_failed(trials: Sequence[Trial]) -> int:
    """How many trials ended without numbers."""
    return len(trials) - len(select_finished(trials)) - sum(trial.state == PLANNED for trial in trials)
