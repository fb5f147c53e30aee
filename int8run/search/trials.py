"""The trials of a search: which recipe each has, what was predicted, how it ended and what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.search.measurement import Measurement
from int8run.search.space import Params
from int8run.tracking.run_record import FINISHED

# why a recipe was run: the base; one ingredient differs from it; predicted to be the cheapest; by the sampler
BASE, ALONE, PREDICTED, SAMPLED = "base", "alone", "predicted", "sampled"
PLANNED = "PLANNED"  # state of a trial that has not ended


@dataclass(frozen=True)
class Prediction:
    """What a recipe was predicted to be before it ran.

    Args:
        quality_db: mean PSNR to the reference.
        seconds: per image.
        bytes: of denoiser and text encoders.
    """

    quality_db: float
    seconds: float
    bytes: float

    def get_cost(self, minimise: str) -> float:
        """What the search minimises."""
        return self.seconds if minimise == "seconds" else self.bytes


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        number: from 0, the name of its folder.
        reason: why it was run: BASE, ALONE, PREDICTED or SAMPLED.
        params: the recipe.
        predicted: before it ran; None of the base and of ingredients alone, from which others are predicted.
        state: PLANNED, FINISHED, FAILED or KILLED.
        error: why it failed.
        measured: what it measured; None unless it finished.
    """

    number: int
    reason: str
    params: Params
    predicted: Prediction | None = None
    state: str = PLANNED
    error: str | None = None
    measured: Measurement | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has numbers."""
        return self.state == FINISHED and self.measured is not None

    @property
    def name(self) -> str:
        """Its recipe in words: what differs is seen by those who compare."""
        return " ".join(f"{name}={format_value(value)}" for name, value in self.params.items())

    def to_json(self) -> dict[str, Any]:
        """As search.json has it."""
        return {
            "number": self.number,
            "reason": self.reason,
            "params": dict(self.params),
            "predicted": None if self.predicted is None else vars(self.predicted),
            "state": self.state,
            "error": self.error,
            "measured": None if self.measured is None else self.measured.to_json(),
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Trial":
        """From what search.json has."""
        predicted, measured = facts["predicted"], facts["measured"]
        return cls(
            number=int(facts["number"]),
            reason=str(facts["reason"]),
            params=dict(facts["params"]),
            predicted=None if predicted is None else Prediction(**predicted),
            state=str(facts["state"]),
            error=facts["error"],
            measured=None if measured is None else Measurement.from_json(measured),
        )


def format_value(value: str | float) -> str:
    """A choice or a number in a name."""
    return value if isinstance(value, str) else f"{value:g}"


def describe_differences(params: Params, base: Params) -> str:
    """What a recipe has that the base has not: `cache=first_block threshold=0.1`; `base` where nothing."""
    words = [f"{name}={format_value(value)}" for name, value in params.items() if base.get(name) != value]
    return " ".join(words) or "base"


def select_finished(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have numbers."""
    return [trial for trial in trials if trial.is_finished]
