"""The order in which layers get more bits: the most error for the least cost first."""

import itertools

import pytest
from support.helpers import randn

from int8run.ptq.upgrade_order import FLOAT_BITS, Choice, Upgrade, find_lower_hull, order_upgrades


def make_choices(*errors, cost=1.0):
    """4, 6 and 8 bits, and float, with the errors of the first three; costs as those of memory."""
    costs = (0.25, 0.375, 0.5, 1.0)
    bits = (4, 6, 8, FLOAT_BITS)
    return [
        Choice(number, cost * size, error)
        for number, size, error in zip(bits, costs, (*errors, 0.0), strict=True)
    ]


def list_bits(upgrades, name):
    return [upgrade.bits for upgrade in upgrades if upgrade.name == name]


def test_a_layer_goes_from_the_fewest_bits_to_float():
    upgrades = order_upgrades({"a": make_choices(16.0, 4.0, 1.0)})

    assert upgrades == [Upgrade("a", 6), Upgrade("a", 8), Upgrade("a", FLOAT_BITS)]


def test_what_is_more_sensitive_comes_first():
    upgrades = order_upgrades({"calm": make_choices(1.6, 0.4, 0.1), "wild": make_choices(160.0, 40.0, 10.0)})

    assert upgrades[:2] == [Upgrade("wild", 6), Upgrade("wild", 8)]
    assert list_bits(upgrades, "calm") == [6, 8, FLOAT_BITS]


def test_the_same_error_in_a_smaller_layer_comes_first():
    choices = {"large": make_choices(16, 4, 1, cost=10), "small": make_choices(16, 4, 1)}

    assert order_upgrades(choices)[0] == Upgrade("small", 6)


def test_a_choice_that_is_dearer_and_no_better_is_left_out():
    assert list_bits(order_upgrades({"a": make_choices(1.0, 1.5, 0.5)}), "a") == [8, FLOAT_BITS]
    # on the way to 8 bits, 6 take away little error for their cost
    assert list_bits(order_upgrades({"a": make_choices(16.0, 15.0, 1.0)}), "a") == [8, FLOAT_BITS]


def test_a_layer_that_is_cheaper_in_float_goes_there_first():
    padded = [Choice(8, cost=3.0, error=0.1), Choice(FLOAT_BITS, cost=2.0, error=0.0)]
    choices = {"a": make_choices(16.0, 4.0, 1.0), "padded": padded}

    upgrades = order_upgrades(choices, start={"a": 4, "padded": 8})

    assert upgrades[0] == Upgrade("padded", FLOAT_BITS)
    assert upgrades[1:] == order_upgrades({"a": choices["a"]})


def test_a_layer_without_any_error_is_upgraded_last():
    upgrades = order_upgrades({"exact": make_choices(0.0, 0.0, 0.0), "a": make_choices(16.0, 4.0, 1.0)})

    assert list_bits(upgrades, "exact") == [FLOAT_BITS]
    assert upgrades[-1] == Upgrade("exact", FLOAT_BITS)


def test_without_a_choice_of_bits_the_order_is_that_of_error_over_cost():
    choices = {}
    for name, error, cost in (("a", 8.0, 20.0), ("b", 3.0, 2.0), ("c", 6.0, 2.0)):
        choices[name] = [Choice(8, 0.0, error), Choice(FLOAT_BITS, cost, 0.0)]

    assert [upgrade.name for upgrade in order_upgrades(choices)] == ["c", "b", "a"]


@pytest.mark.parametrize("seed", range(5))
def test_no_mixture_of_choices_is_better_than_a_place_in_the_order(seed):
    # by trying all of them
    numbers = randn(3, 3, seed=seed).abs()
    choices = {}
    for i, row in enumerate(numbers.tolist()):
        choices[f"layer {i}"] = make_choices(*sorted(row, reverse=True), cost=1.0 + i)
    by_bits = {(name, choice.bits): choice for name, found in choices.items() for choice in found}
    mixtures = []
    for mixture in itertools.product(*choices.values()):
        mixtures.append((sum(choice.cost for choice in mixture), sum(choice.error for choice in mixture)))

    bits = {name: find_lower_hull(found)[0].bits for name, found in choices.items()}
    for upgrade in [None, *order_upgrades(choices)]:
        if upgrade is not None:
            bits[upgrade.name] = upgrade.bits
        cost = sum(by_bits[item].cost for item in bits.items())
        error = sum(by_bits[item].error for item in bits.items())
        assert not any(other < cost - 1e-9 and less < error - 1e-9 for other, less in mixtures)
