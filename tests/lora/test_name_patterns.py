"""Patterns of PEFT settings, against the regular expression that PEFT compiles."""

import random
import re

import pytest

from int8run.errors import LoraError
from int8run.lora.name_patterns import NamePatterns


def find_as_peft(patterns: dict[str, int], name: str) -> int | None:
    """`peft/utils/other.py::get_pattern_key`, written again."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "attn.to_q",
        r"attn\.to_q",
        "^blocks.0.attn.to_q",
        "^to_q",
        "to_q$",
        r"blocks\.\d+\.attn\.to_q",
        r"blocks.[0-9]+.attn.*",
        ".*to_q",
        r"\w+_q",
        "[^.]+",
        "o_q",
        "blocks.0",
    ],
)
@pytest.mark.parametrize(
    "name", ["blocks.0.attn.to_q", "blocks.12.attn.to_k", "to_q", "head.blocks.0.attn.to_q"]
)
def test_a_pattern_fits_as_in_peft(pattern, name):
    patterns = {pattern: 1}

    assert NamePatterns(patterns, "x").find([name]) == find_as_peft(patterns, name)


def test_random_expressions_fit_as_in_peft():
    generator = random.Random(0)
    atoms, quantifiers = ["a", "1", r"\.", r"\d", r"\w", "[0-9]", "[^.]"], ["", "*", "+", "?"]
    num_fitting = 0
    for _ in range(2000):
        length = generator.randint(1, 5)
        expression = "".join(generator.choice(atoms) + generator.choice(quantifiers) for _ in range(length))
        expression = generator.choice(["", "^"]) + expression + generator.choice(["", "$"])
        name = "".join(generator.choice("ab1.") for _ in range(generator.randint(1, 8)))
        expected = find_as_peft({expression: 1}, name)
        num_fitting += expected is not None

        assert NamePatterns({expression: 1}, "x").find([name]) == expected, (expression, name)
    assert 100 < num_fitting < 1900


def test_the_first_pattern_that_fits_counts():
    patterns = {"to_k": 1, r"attn\.to_\w": 2, "to_q": 3}

    found = NamePatterns(patterns, "x")

    assert [found.find([name]) for name in ("a.to_k", "attn.to_q", "a.to_q", "a.to_v")] == [1, 2, 3, None]
    assert found.unused == []
    assert NamePatterns(patterns, "x").unused == list(patterns)


def test_any_spelling_of_a_name_may_fit():
    assert NamePatterns({"^transformer.x": 1}, "x").find(["x", "transformer.x"]) == 1


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a|b)", r"has the expression '\(a\|b\)'; read are names, ends of names"),
        ("(" * 500 + ")" * 500, "has the expression"),
        ("(a+)+$", "has the expression"),
        ("a{1,1000}", "has the expression"),
        (r"\1", "has the expression"),
        ("a**", "has the expression"),
        ("a*" * 100, "has an expression of 200 characters"),
    ],
)
def test_other_expressions_are_refused(pattern, words):
    with pytest.raises(LoraError, match=f"alpha_pattern {words}"):
        NamePatterns({pattern: 1}, "alpha_pattern")


def test_many_expressions_are_refused():
    with pytest.raises(LoraError, match="has 9 expressions; 8 are read, and any number of plain names"):
        NamePatterns({rf"x{i}\d": i for i in range(9)}, "rank_pattern")


def test_many_names_are_looked_up():
    # tried one by one, 2,000 patterns on 2,000 names would take minutes
    names = [f"blocks.{i}.attn.to_q" for i in range(2000)]
    patterns = NamePatterns({name: i for i, name in enumerate(names)} | {"[^.]*a*b*c*" * 8: -1}, "x")

    assert [patterns.find([name]) for name in names] == list(range(2000))
