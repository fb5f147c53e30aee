"""The order in which layers get more bits, or go back to float, until a quality budget is met.

`mixed_precision.py` measures what each choice for each layer costs and how large its error is, asks here for
the order, and finds out how far along it a model has to go.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# in place of a number of bits: the layer of the float model
FLOAT_BITS = 0
NO_START: Mapping[str, int] = {}


@dataclass(frozen=True)
class Choice:
    """One way to compute a layer or an attention.

    Args:
        bits: of its weight; FLOAT_BITS: it stays float.
        cost: what it takes, in any unit that all layers share.
        error: squared relative error of the model's output where this layer alone is so computed.
    """

    bits: int
    cost: float
    error: float


@dataclass(frozen=True)
class Upgrade:
    """A layer that gets another choice.

    Args:
        name: of the layer.
        bits: that it has from then on.
    """

    name: str
    bits: int


def order_upgrades(
    choices: Mapping[str, Sequence[Choice]], start: Mapping[str, int] = NO_START
) -> list[Upgrade]:
    """All steps from the cheapest choice of each layer to the most exact one, the most worth its cost first.

    Errors of layers are taken to add up. Then the order holds at each of its places the least error that its
    cost can buy, up to one step: each layer goes along the lower convex hull of its choices, and steps of all
    layers follow each other by falling error per cost.

    Args:
        choices: of each layer, in any order; at least one.
        start: bits that a layer has before any step, where they may not be its cheapest choice: a small layer
            whose integers are padded can take more than in float. The cheapest comes first then.
    """
    steps: list[tuple[float, Upgrade]] = []
    for name, of_layer in choices.items():
        hull = find_lower_hull(of_layer)
        if start.get(name, hull[0].bits) != hull[0].bits:
            steps.append((-math.inf, Upgrade(name, hull[0].bits)))
        for before, after in itertools.pairwise(hull):
            steps.append((-compute_worth(before, after), Upgrade(name, after.bits)))
    # the order of one layer's steps stays where two are worth the same
    steps.sort(key=lambda step: step[0])
    return [upgrade for _, upgrade in steps]


def find_lower_hull(choices: Iterable[Choice]) -> list[Choice]:
    """The choices between which no mixture of two others is better, by rising cost and falling error.

    The most exact one is always among them, where no cheaper one is as exact.
    """
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.cost, each.error)):
        if hull and choice.error > hull[-1].error:
            continue  # dearer and no better
        if hull and choice.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and compute_worth(hull[-1], choice) >= compute_worth(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def compute_worth(before: Choice, after: Choice) -> float:
    """The error that a step takes away, for each unit of its cost."""
    return (before.error - after.error) / (after.cost - before.cost)
