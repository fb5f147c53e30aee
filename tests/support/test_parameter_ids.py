"""Ids of tests: what is in a mapping or a sequence, and not its number."""

from types import SimpleNamespace

import pytest
from support.parameter_ids import name_parameter


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"steps": 28, "guidance": None}, "steps=28, guidance=None"),
        ({"a.weight": (4, 8), "b.weight": object()}, "a.weight=4x8, b.weight"),
        ({}, "nothing"),
        ((), "nothing"),
        (["a", 1, ("b", "c")], "a, 1, (b, c)"),
        ((SimpleNamespace(module="to_q"), SimpleNamespace()), "to_q, SimpleNamespace"),
        (list("abcde"), "a, b, c and 2 more"),
    ],
    ids=["settings", "shapes", "empty mapping", "empty tuple", "nested", "objects", "many"],
)
def test_a_container_is_named_by_its_content(value: object, name: str) -> None:
    assert name_parameter(value) == name


@pytest.mark.parametrize("value", ["text", 1, None, dict], ids=["text", "number", "None", "type"])
def test_the_rest_is_left_to_pytest(value: object) -> None:
    assert name_parameter(value) is None
