"""What a search may choose between: conditions, points, settings; and what is refused."""

import pytest
from search.search_cases import SPACE, make_space

from int8run.errors import ConfigError
from int8run.search.parse_space import AS_GIVEN, parse_space


def test_the_base_has_the_first_choice_of_each_and_no_ingredient_that_does_not_matter():
    assert make_space().base == {"outlier": "none", "bits": "8", "cache": "none"}


def test_alone_differs_in_one_ingredient_and_has_both_ends_of_a_range_that_depends_on_it():
    base = {"outlier": "none", "bits": "8", "cache": "none"}

    recipes = make_space().list_alone()

    assert recipes == [
        {**base, "outlier": "convrot"},
        {**base, "bits": "4"},
        {**base, "cache": "block", "threshold": 0.05},
        {**base, "cache": "block", "threshold": 0.4},
    ]


def test_combinations_are_all_there_once():
    recipes = make_space().list_combinations(seed=0)

    # two of each of the first, and the cache off or on with five thresholds
    assert len(recipes) == 2 * 2 * (1 + 5)
    assert all(("threshold" in recipe) == (recipe["cache"] == "block") for recipe in recipes)


def test_a_choice_whose_settings_a_later_one_sets_makes_no_combination():
    kept = {"choices": {"none": {}, "fewest": {"int8.bits": "auto", "quality_db": 40}}}
    space = parse_space({"bits": {"set": "int8.bits", "choices": [8, 4]}, "kept": kept})

    assert space.list_combinations(0) == [
        {"bits": "8", "kept": "none"},
        {"bits": "8", "kept": "fewest"},
        {"bits": "4", "kept": "none"},
    ]


def test_of_too_many_combinations_some_are_drawn_the_same_ones_with_the_same_seed():
    many = {f"i{n}": {"set": f"int8.k{n}", "choices": list(range(4))} for n in range(12)}
    space = parse_space(many)

    drawn = space.list_combinations(seed=3)

    assert 10_000 < len(drawn) <= 20_000
    assert drawn[:5] == space.list_combinations(seed=3)[:5]


def test_settings_are_those_of_the_choices():
    space = make_space()

    settings = space.list_settings({"outlier": "convrot", "bits": "4", "cache": "block", "threshold": 0.1})

    assert settings == {
        "outlier": "convrot",
        "int8.max_rows": 4,
        "compile": "none",
        "int8.attention_min_sqnr_db": 0.1,
    }


def test_null_leaves_a_setting_as_the_command_has_it():
    space = parse_space({"lora": {"set": "lora", "choices": [None, "lcm"]}})

    assert space.base == {"lora": AS_GIVEN}
    assert space.list_settings(space.base) == {}


def test_a_choice_with_settings_that_is_null_is_left_out():
    choices = {"none": {}, "one": {"sampler.steps": 1}, "two": None}

    space = parse_space({"x": {"choices": choices}})

    assert list(space.ingredients["x"].choices) == ["none", "one"]


def test_a_share_is_one_of_what_the_base_has():
    space = parse_space({"steps": {"set": "sampler.steps", "choices": [None, "75%", "50 %"]}})

    resolved = space.resolve_shares({"sampler.steps": 15}.get)

    assert [dict(own) for own in resolved.ingredients["steps"].choices.values()] == [
        {},
        {"sampler.steps": 11},
        {"sampler.steps": 8},
    ]


def test_a_share_of_what_is_no_number_is_refused():
    space = parse_space({"steps": {"set": "sampler.steps", "choices": ["75%", 3]}})

    with pytest.raises(
        ConfigError, match=r"task\.space\.steps has '75%', a share of sampler\.steps, which is no number"
    ):
        space.resolve_shares(lambda key: None)


def test_without_a_choice_what_depends_on_it_is_gone_too():
    space = make_space().without({"cache": ["block"]})

    assert list(space.ingredients) == ["outlier", "bits"]


def test_what_depends_on_an_ingredient_that_is_left_out_goes_with_it_unless_it_matters_without() -> None:
    steps = {"set": "sampler.steps", "choices": [None, 3], "when": {"lora": [None]}}

    space = parse_space({**SPACE, "cache": None, "lora": None, "steps": steps})

    assert list(space.ingredients) == ["outlier", "bits", "steps"]
    assert space.base["steps"] == AS_GIVEN


@pytest.mark.parametrize(
    ("low", "high", "step", "log", "points"),
    [
        (2, 8, 2, False, [2, 4, 6, 8]),
        (0.1, 0.5, None, False, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (1.0, 16.0, None, True, [1.0, 2.0, 4.0, 8.0, 16.0]),
        (1, 3, None, False, [1, 2, 3]),
    ],
)
def test_points_of_a_range_keep_to_its_steps(low, high, step, log, points):
    described = {"set": "int8.max_rows", "low": low, "high": high, "step": step, "log": log}
    ingredient = parse_space({"x": described}).ingredients["x"]

    assert ingredient.list_points(5) == pytest.approx(points)
    assert all(type(point) is type(points[0]) for point in ingredient.list_points(5))


BAD = {
    "not a mapping": (3, r"task\.space is 3; it takes ingredients by name"),
    "empty": ({}, r"task\.space is empty, and a search needs something to choose"),
    "all left out": ({"outlier": None}, r"task\.space is empty"),
    "name": ({"Out Lier": {}}, r"task\.space has 'Out Lier'; the name of an ingredient is"),
    "list": ({"outlier": ["a", "b"]}, r"task\.space\.outlier is \['a', 'b'\]; it takes a mapping"),
    "field": ({"a": {"set": "outlier", "choises": ["a", "b"]}}, r"has 'choises'; did you mean 'choices'\?"),
    "neither": ({"a": {"set": "outlier"}}, r"task\.space\.a needs either choices, or low and high"),
    "both": ({"a": {"set": "x", "choices": [1, 2], "low": 1}}, r"needs either choices, or low and high"),
    "one choice": ({"a": {"set": "x", "choices": [1]}}, r"has 1 of the two or more"),
    "twice": ({"a": {"set": "x", "choices": [1, "1"]}}, r"has '1' twice; name each choice once"),
    "text": ({"a": {"set": "x", "choices": "none"}}, r"choices is 'none'; give a list of values"),
    "no key": ({"a": {"choices": [1, 2]}}, r"task\.space\.a\.set is None; name a setting"),
    "no setting": ({"a": {"set": "1+1", "choices": [1, 2]}}, r"set is '1\+1'; name a setting"),
    "prompts": (
        {"a": {"set": "prompts.take", "choices": [1, 2]}},
        r"sets prompts\.take, which is no part of a recipe",
    ),
    "task": (
        {"a": {"choices": {"x": {}, "y": {"task.n_trials": 3}}}},
        r"sets task\.n_trials, which is no part",
    ),
    "hydra": ({"a": {"set": "hydra.run.dir", "choices": ["a", "b"]}}, r"hydra\.run\.dir, which is no part"),
    "recipe": ({"a": {"choices": {"x": {}, "y": 3}}}, r"choices\.y is 3; it takes settings by their keys"),
    "set beside settings": ({"a": {"set": "x", "choices": {"x": {}, "y": {}}}}, r"names its settings itself"),
    "reversed": ({"a": {"set": "x", "low": 2, "high": 1}}, r"goes from 2 to 1; give low and high"),
    "one end": ({"a": {"set": "x", "low": 2}}, r"goes from 2 to None"),
    "nan": ({"a": {"set": "x", "low": float("nan"), "high": 1}}, r"low is nan; allowed is a number"),
    "number": ({"a": {"set": "x", "low": "a", "high": 1}}, r"low is 'a'; allowed is a number"),
    "step": (
        {"a": {"set": "x", "low": 0, "high": 1, "step": 2}},
        r"step is 2; allowed is more than 0, up to 1",
    ),
    "step beyond the end": (
        {"a": {"set": "x", "low": 4, "high": 10, "step": 4}},
        r"step is 4, and from 4 no number of steps ends at 10",
    ),
    "log": ({"a": {"set": "x", "low": 0, "high": 1, "log": True}}, r"log needs numbers above 0"),
    "log word": (
        {"a": {"set": "x", "low": 1, "high": 2, "log": "yes"}},
        r"log is 'yes'; choose true or false",
    ),
    "optional": (
        {"a": {"set": "x", "choices": [1, 2], "optional": 1}},
        r"optional is 1; choose true or false",
    ),
    "when word": (
        {"a": {"set": "x", "choices": [1, 2], "when": 3}},
        r"when is 3; it takes choices by ingredient",
    ),
    "when unknown": (
        {"a": {"set": "x", "choices": [1, 2], "when": {"b": 1}}},
        r"names 'b'; allowed are .*: none",
    ),
    "when label": (
        {**SPACE, "z": {"set": "x", "choices": [1, 2], "when": {"cache": ["lock"]}}},
        r"when\.cache has 'lock'; choose from none, block",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_by_name(case):
    described, message = BAD[case]

    with pytest.raises(ConfigError, match=message):
        parse_space(described)
