"""Loads the metrics that a run asks for, with one line for each that cannot be computed here.

No other number ever takes the place of one that is left out. Called by `tasks.run` when the images are
there, and at its start, to say early what is not installed.
Helpers for weights and packages that several metrics need are in `metrics.weights`.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from int8run.metrics.base import Measure, Scope, UnavailableError
from int8run.metrics.networks import Networks, SharesNetworks
from int8run.metrics.weights import describe_installation

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


def warn_of_missing_packages(measures: Iterable[Measure]) -> None:
    """Say of each metric whose packages are not installed that it will be left out, before a run begins.

    Nothing is imported, so that a package which is there and broken is found only when the metric is loaded.

    Args:
        measures: that are asked for.
    """
    for measure in measures:
        missing = [package for package in measure.needs.packages if not is_installed(package)]
        if missing:
            log.warning(
                "%s will be left out of this run: not installed: %s; %s",
                next(iter(measure.metrics)),
                ", ".join(missing),
                describe_installation(" ".join(measure.needs.packages), measure.needs.extra),
            )


def is_installed(package: str) -> bool:
    """Whether pip knows a package, or Python a module of its name, such as one that lies beside a script.

    Args:
        package: as pip takes it.
    """
    name = re.split(r"[^\w.-]", package, maxsplit=1)[0]  # without a version or an extra
    try:
        distribution(name)
    except PackageNotFoundError:
        module = name.replace("-", "_").partition(".")[0]
        return module in sys.modules or find_spec(module) is not None
    return True


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
