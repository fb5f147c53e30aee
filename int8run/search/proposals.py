"""Recipes that Optuna's sampler proposes (TPE for two objectives, arXiv:2304.11127), by its ask-and-tell API.

The trials of the search are the store: a study is made anew from them whenever a search starts or goes on, so
there is no second file that could disagree with the run folders.
"""

from collections.abc import Callable, Sequence
from typing import Any

from int8run.errors import ConfigError
from int8run.search.front import get_cost, get_quality
from int8run.search.space import Ingredient, Params, SearchSpace, freeze
from int8run.search.trials import Trial

INSTALL = "task=search needs Optuna, which is not installed here: pip install 'int8run[search]'"
MAX_TRIES = 200  # proposals that are looked at before the sampler is taken to have nothing new


def check_optuna() -> None:
    """Raise ConfigError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(INSTALL) from error


class Proposer:
    """An Optuna study of a search: minimises the cost, maximises the quality.

    Args:
        space: what is searched.
        minimise: the cost.
        seed: of the sampler.
        trials: of the search so far, the finished ones count.
    """

    def __init__(self, space: SearchSpace, minimise: str, seed: int, trials: Sequence[Trial]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.minimise = space, minimise
        # another start of the same search is to draw other recipes than it has
        sampler = optuna.samplers.TPESampler(seed=(seed + len(trials)) % 2**32)
        self.study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
        self.open: dict[Any, Any] = {}  # recipe -> Optuna's trial of a proposal that runs
        for trial in trials:
            self.report(trial)

    def propose(self, accept: Callable[[Params], bool]) -> Params | None:
        """A recipe that is worth a run; None where the sampler finds none.

        Args:
            accept: whether a recipe is; one that is not is told to the study as pruned.
        """
        from optuna.trial import TrialState

        for _ in range(MAX_TRIES):
            asked = self.study.ask()
            params = self.suggest(asked)
            if accept(params):
                self.open[freeze(params)] = asked
                return params
            self.study.tell(asked, state=TrialState.PRUNED)
        return None

    def suggest(self, asked: Any) -> Params:
        """Let a trial of Optuna choose each ingredient that matters."""
        params: dict[str, str | float] = {}
        for name, ingredient in self.space.ingredients.items():
            if not self.space.is_active(ingredient, params):
                continue
            params[name] = suggest_value(asked, ingredient)
        return params

    def make_distribution(self, name: str) -> Any:
        """Optuna's distribution of an ingredient."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        ingredient = self.space.ingredients[name]
        if not ingredient.is_range:
            return CategoricalDistribution(list(ingredient.choices))
        # Optuna has no steps on a logarithmic scale; Ingredient.locate has none there that matter
        step = None if ingredient.log else ingredient.step
        if ingredient.is_whole:
            return IntDistribution(
                int(ingredient.low), int(ingredient.high), log=ingredient.log, step=int(step or 1)
            )
        return FloatDistribution(ingredient.low, ingredient.high, log=ingredient.log, step=step)

    def report(self, trial: Trial) -> None:
        """Tell the study how a trial ended; one that has not ended is left out."""
        from optuna.trial import TrialState, create_trial

        if trial.is_finished:
            values = [get_cost(trial, self.minimise), get_quality(trial)]
            state = TrialState.COMPLETE
        elif trial.error is not None:
            values, state = None, TrialState.FAIL
        else:
            return
        asked = self.open.pop(freeze(trial.params), None)
        if asked is not None:
            self.study.tell(asked, values, state=state)
            return
        distributions = {name: self.make_distribution(name) for name in trial.params}
        self.study.add_trial(
            create_trial(state=state, values=values, params=dict(trial.params), distributions=distributions)
        )


def suggest_value(asked: Any, ingredient: Ingredient) -> str | float:
    """Let a trial of Optuna choose the value of an ingredient, from that of `make_distribution`."""
    name, low, high = ingredient.name, ingredient.low, ingredient.high
    if not ingredient.is_range:
        return str(asked.suggest_categorical(name, list(ingredient.choices)))
    step = None if ingredient.log else ingredient.step
    if ingredient.is_whole:
        return int(asked.suggest_int(name, int(low), int(high), log=ingredient.log, step=int(step or 1)))
    value = asked.suggest_float(name, low, high, log=ingredient.log, step=step)
    # digits that nobody reads; the ends of the range stay its ends
    return min(max(float(f"{value:.4g}"), low), high)
