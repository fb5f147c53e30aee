"""The overrides of a search's runs: which words of the command they keep, and in which grammar."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.run_job import make_spec

from int8run.tasks.search_overrides import SearchOverrides, format_value, join_overrides

GIVEN = [
    "task=search",
    "task.n_trials=3",
    "quality_db=30",
    "model=tiny",
    "outlier=convrot",
    "outlier.group_size=64",
    "prompts.prompts=[x]",
    "prompts.negative_prompt=blue",
    "seed=5",
    "tracker=none",
    "resume=true",
]


def make_overrides(judge_by="calibration"):
    return SearchOverrides(
        make_spec(["calibration.prompts=[a fox,'b, c']", "calibration.seed=40"]), GIVEN, judge_by
    )


def test_a_trial_has_the_calibration_prompts_with_seeds_behind_the_calibration():
    words = make_overrides().make_trial({"sampler.steps": 4}, baseline="cached")

    assert words[:5] == [
        "model=tiny",
        "outlier=convrot",
        "outlier.group_size=64",
        "prompts.negative_prompt=blue",
        "tracker=none",
    ]
    assert "++prompts.prompts=['a fox','b, c']" in words
    assert "seed=42" in words
    assert words[-2:] == ["metrics.baseline=cached", "sampler.steps=4"]


def test_judged_by_the_run_a_trial_has_its_prompts():
    words = make_overrides("run").make_trial({})

    assert "prompts.prompts=[x]" in words
    assert "seed=5" in words


def test_a_choice_replaces_what_the_command_says_of_it_and_of_its_settings():
    words = make_overrides().make_confirmation({"outlier": "quarot"})

    assert [word for word in words if word.startswith("outlier")] == ["outlier=quarot"]
    assert "prompts.prompts=[x]" in words


def test_a_recipe_says_how_a_model_is_made_and_nothing_else():
    assert make_overrides().list_recipe({"outlier": "none", "sampler.steps": 3}) == [
        "model=tiny",
        "outlier=none",
        "sampler.steps=3",
    ]


def test_a_recipe_has_the_calibration_that_its_layers_are_fitted_to():
    overrides = SearchOverrides(make_spec([]), ["calibration.seed=40", "device=cpu"], "run")

    assert overrides.list_recipe({"rounding": "gptq"}) == ["calibration.seed=40", "rounding=gptq"]


def test_settings_of_the_command_that_a_recipe_replaces_are_listed():
    overrides = make_overrides()

    assert overrides.list_overruled({"outlier": "none"}) == ["outlier=convrot", "outlier.group_size=64"]
    assert overrides.list_overruled({"model": "tiny", "sampler.steps": 3}) == []


def test_later_overrides_win():
    assert join_overrides(["a=1", "+b.c=2"], ["b=x", "a=3"]) == ["b=x", "a=3"]


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.05, "none", "a b, c", "x=[1]", [1, "a b"], {"a": 1, "b": [True]}, "it's ${now:%Y}"],
)
def test_values_come_back_from_the_grammar(value):
    parsed = OverridesParser.create().parse_override(f"key={format_value(value)}")

    def plain(node):
        if isinstance(node, list):
            return [plain(item) for item in node]
        if isinstance(node, dict):
            return {str(key): plain(item) for key, item in node.items()}
        return getattr(node, "text", node)

    expected = value.replace("${", r"\${") if isinstance(value, str) else value
    assert plain(parsed.value()) == expected
