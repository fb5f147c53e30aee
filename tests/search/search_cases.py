"""Spaces and a runner of trials without a model, for the tests of a search."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from int8run.search.measurement import Measurement
from int8run.search.parse_space import parse_space
from int8run.search.space import Params, SearchSpace
from int8run.search.trials import Trial
from int8run.tracking.run_record import FAILED, FINISHED

SPACE = {
    "outlier": {"set": "outlier", "choices": ["none", "convrot"]},
    "bits": {"set": "int8.max_rows", "choices": [8, 4]},
    "cache": {"choices": {"none": {}, "block": {"compile": "none"}}},
    "threshold": {
        "set": "int8.attention_min_sqnr_db",
        "low": 0.05,
        "high": 0.4,
        "log": True,
        "when": {"cache": ["block"]},
    },
}
PROMPTS = ("a", "b", "c", "d")


def make_space(described: Mapping[str, object] | None = None) -> SearchSpace:
    return parse_space(SPACE if described is None else described)


def make_measurement(
    quality_db: float, seconds: float = 1.0, nbytes: float = 100.0, spread: float = 0.001
) -> Measurement:
    """Four samples around a quality; `spread`: half of the width of the time's interval, relative to it."""
    psnrs = tuple(quality_db + offset for offset in (-0.2, -0.1, 0.1, 0.2))
    return Measurement(psnrs, PROMPTS, seconds, seconds * (1 - spread), seconds * (1 + spread), nbytes)


def measure_additive(params: Params) -> Measurement:
    """A model whose squared errors add and whose times multiply, as the estimates take it to be."""
    squared = 1e-4  # 40 dB
    seconds, nbytes = 1.0, 100.0
    if params["outlier"] == "convrot":
        squared, seconds = squared / 4, seconds * 1.1
    if params["bits"] == "4":
        squared, nbytes = squared + 3e-4, nbytes * 0.6
    if params["cache"] == "block":
        threshold = float(params["threshold"])
        squared += 1e-2 * threshold**2
        seconds *= 0.8 * (0.05 / threshold) ** 0.2
    return make_measurement(-10 * math.log10(squared), seconds, nbytes)


class FakeRunner:
    """Runs trials by a function, and notes in which order; recipes in `failing` fail."""

    def __init__(
        self,
        measure: Callable[[Params], Measurement] = measure_additive,
        is_failing: Callable[[Params], bool] = lambda params: False,
    ):
        self.measure, self.is_failing = measure, is_failing
        self.batches: list[list[int]] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        self.batches.append([trial.number for trial in trials])
        return [self.end(trial) for trial in trials]

    def end(self, trial: Trial) -> Trial:
        if self.is_failing(trial.params):
            return replace(trial, state=FAILED, error="out of memory")
        return replace(trial, state=FINISHED, measured=self.measure(trial.params))
