"""Loads the metrics that a run asks for, with one line for each that cannot be computed here.

No other number ever takes the place of one that is left out. Called by `tasks.run` when the images are there.
Helpers for weights and packages that several metrics need are in `metrics.weights`.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from int8run.metrics.base import Measure, Scope, UnavailableError
from int8run.metrics.networks import Networks, SharesNetworks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedMeasures:
    """Metrics that are ready.

    Args:
        functions: what compares, by scope and by name.
        left_out: names of those that were asked for and cannot be computed.
    """

    functions: Mapping[Scope, dict[str, Callable[..., dict[str, float]]]]
    left_out: list[str]


def load_measures(measures: Iterable[Measure], smallest_side: int) -> LoadedMeasures:
    """Load the metrics that can be computed, with one warning for each of the others.

    Args:
        measures: that are asked for.
        smallest_side: the shorter side of the smallest image, in pixels.
    """
    networks = Networks()
    loaded = LoadedMeasures({scope: {} for scope in Scope}, left_out=[])
    for measure in measures:
        try:
            check_side(smallest_side, measure.needs.min_side)
            function = load_measure(measure, networks)
        except UnavailableError as error:
            log.warning("%s is left out because %s", next(iter(measure.metrics)), error)
            loaded.left_out.append(measure.name)
            continue
        loaded.functions[measure.scope][measure.name] = function
    return loaded


def load_measure(measure: Measure, networks: Networks) -> Callable[..., dict[str, float]]:
    """What compares, with the networks of the run where the metric can share them.

    Args:
        measure: that is asked for.
        networks: of this run.

    Raises:
        UnavailableError: where it cannot be computed here.
    """
    if isinstance(measure, SharesNetworks):
        return measure.load_with(networks)
    return measure.load()


def check_side(side: int, min_side: int) -> None:
    """Check that the images are as large as the definition of a metric requires.

    Args:
        side: the shorter side of the smallest image, in pixels.
        min_side: the least that the metric is defined for.

    Raises:
        UnavailableError: with both sizes.
    """
    if side < min_side:
        raise UnavailableError(
            f"it needs at least {min_side} px on the shorter side, and these images have {side}; generate "
            "larger ones (sampler.height, sampler.width)"
        )
