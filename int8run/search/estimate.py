"""What a recipe will be, predicted from runs in which one ingredient at a time differs from the base.

Errors of different sources are taken for independent, so their squares add: an ingredient that is worse than
the base adds its extra squared error of each sample, one that is better scales the base's by the factor that
it has alone. Times and bytes multiply. A range is interpolated between its measured ends.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from int8run.search.measurement import Measurement
from int8run.search.space import Ingredient, Params, SearchSpace, freeze
from int8run.search.trials import Prediction, Trial, select_finished

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Logarithms:
    """A measurement as what is multiplied: natural logarithms.

    Args:
        squared_errors: of each sample, [n].
        seconds: per image.
        bytes: of the weights.
    """

    squared_errors: Numbers
    seconds: float
    bytes: float

    @classmethod
    def of(cls, measured: Measurement) -> "Logarithms":
        """Of a trial."""
        return cls(np.log(measured.squared_errors), math.log(measured.seconds), math.log(measured.bytes))

    def mix(self, other: "Logarithms", share: float) -> "Logarithms":
        """On the way to another one: 0 is this one, 1 the other."""
        return Logarithms(
            self.squared_errors + share * (other.squared_errors - self.squared_errors),
            self.seconds + share * (other.seconds - self.seconds),
            self.bytes + share * (other.bytes - self.bytes),
        )


class Estimator:
    """Predicts recipes of a space.

    Args:
        space: what is searched.
        trials: of the search so far; those that failed say what cannot be predicted.
    """

    def __init__(self, space: SearchSpace, trials: Sequence[Trial]):
        self.space = space
        self.by_recipe = {freeze(trial.params): trial for trial in select_finished(trials)}
        self.residuals_db = list_residuals(trials)

    @property
    def offset_db(self) -> float:
        """By how much combinations came out better than predicted, the median; 0 before there are any."""
        return statistics.median(self.residuals_db) if self.residuals_db else 0.0

    @property
    def error_db(self) -> float | None:
        """Root mean square of measured minus predicted; None before there are any."""
        if not self.residuals_db:
            return None
        return math.sqrt(statistics.fmean(residual**2 for residual in self.residuals_db))

    def predict(self, params: Params) -> Prediction | None:
        """What a recipe will be; None where something in it has no numbers.

        Its run alone failed, or is missing.
        """
        base = self.find({})
        if base is None:
            return None
        factor, added = np.zeros_like(base.squared_errors), np.zeros_like(base.squared_errors)
        seconds, nbytes = base.seconds, base.bytes
        for name, value in params.items():
            ingredient = self.space.ingredients[name]
            context = self.find_context(ingredient, params)
            origin = self.find(context)
            alone = self.interpolate(ingredient, context, value)
            if origin is None or alone is None:
                return None
            change = alone.squared_errors - origin.squared_errors
            factor += np.minimum(change, 0.0)
            extra = np.exp(alone.squared_errors) - np.exp(origin.squared_errors)
            added += np.maximum(extra, 0.0)
            seconds += alone.seconds - origin.seconds
            nbytes += alone.bytes - origin.bytes
        squared_errors = np.exp(base.squared_errors + factor) + added
        quality_db = float(np.mean(-10 * np.log10(squared_errors)))
        return Prediction(quality_db, seconds=math.exp(seconds), bytes=math.exp(nbytes))

    def find_context(self, ingredient: Ingredient, params: Params) -> Params:
        """The values of a recipe that an ingredient depends on, and those that these depend on."""
        context: dict[str, str | float] = {}
        for name in ingredient.when:
            context |= self.find_context(self.space.ingredients[name], params)
            context[name] = params[name]
        return context

    def find(self, chosen: Params) -> Logarithms | None:
        """What was measured of the base with these values; None: nothing."""
        trial = self.by_recipe.get(freeze(self.space.complete(chosen)))
        if trial is None or trial.measured is None:
            return None
        return Logarithms.of(trial.measured)

    def interpolate(self, ingredient: Ingredient, context: Params, value: str | float) -> Logarithms | None:
        """The base with one ingredient at a value: as measured, or between the ends of its range."""
        if not ingredient.is_range or isinstance(value, str):
            return self.find({**context, ingredient.name: value})
        low = self.find({**context, ingredient.name: ingredient.locate(0.0)})
        high = self.find({**context, ingredient.name: ingredient.locate(1.0)})
        if low is None or high is None:
            return None
        return low.mix(high, find_share(ingredient, value))


def find_share(ingredient: Ingredient, value: float) -> float:
    """How far a number is from the low end of a range to the high one, 0 to 1."""
    if ingredient.log:
        return math.log(value / ingredient.low) / math.log(ingredient.high / ingredient.low)
    return (value - ingredient.low) / (ingredient.high - ingredient.low)


def list_residuals(trials: Sequence[Trial]) -> list[float]:
    """Measured minus predicted quality of each combination, in dB."""
    residuals = []
    for trial in select_finished(trials):
        if trial.predicted is not None and trial.measured is not None:
            residuals.append(trial.measured.quality_db - trial.predicted.quality_db)
    return residuals


def summarize_predictions(trials: Sequence[Trial]) -> Mapping[str, Any]:
    """How good the predictions were: number, root mean square and mean of residuals in dB, and times."""
    residuals = list_residuals(trials)
    if not residuals:
        return {"combinations": 0}
    ratios = []
    for trial in select_finished(trials):
        if trial.predicted is not None and trial.measured is not None:
            ratios.append(abs(math.log(trial.measured.seconds / trial.predicted.seconds)))
    return {
        "combinations": len(residuals),
        "rms_db": math.sqrt(statistics.fmean(residual**2 for residual in residuals)),
        "mean_db": statistics.fmean(residuals),
        "median_seconds_ratio": math.exp(statistics.median(ratios)),
    }
