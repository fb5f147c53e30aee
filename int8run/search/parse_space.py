"""A search's space from the config: `conf/task/search.yaml` has the shipped one, the command line changes it.

Everything that may be wrong with an ingredient is found here, before anything runs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from int8run.errors import ConfigError, suggest_similar
from int8run.search.space import PLACE, Ingredient, SearchSpace

FIELDS = ("set", "choices", "low", "high", "step", "log", "when", "optional")
NAME = re.compile(r"[a-z_]\w*")
KEY = re.compile(r"[a-z_]\w*(\.\w+)*")
AS_GIVEN = "as given"  # label of the choice null: the setting stays as the command has it
# what belongs to the search itself, or says how runs are judged and kept: no ingredients of a recipe
NOT_OF_A_RECIPE = frozenset(
    {
        "task",
        "hydra",
        "prompts",
        "prompt",
        "negative_prompt",
        "seed",
        "metrics",
        "tracker",
        "resume",
        "cache",
        "save",
        "progress",
        "plugins",
        "sync",
        "recipe",
        "calibration",
        "lora_dir",
        "device",
    }
)


def parse_space(given: object) -> SearchSpace:
    """The space that `task.space` describes; an ingredient that is null is left out.

    Raises:
        ConfigError: naming the ingredient and what is wrong with it.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{PLACE} is {given!r}; it takes ingredients by name: {{NAME: {{set: KEY, choices: […]}}}}"
        )
    ingredients: dict[str, Ingredient] = {}
    left_out: list[str] = []
    for name, described in given.items():
        ingredient = None if described is None else parse_ingredient(str(name), described)
        if ingredient is not None:
            ingredient = drop_left_out(ingredient, left_out)
        if ingredient is None:
            left_out.append(str(name))
            continue
        check_condition(ingredient, ingredients)
        ingredients[ingredient.name] = ingredient
    if not ingredients:
        raise ConfigError(
            f"{PLACE} is empty, and a search needs something to choose: "
            f"{PLACE}.NAME={{set: KEY, choices: […]}}"
        )
    return SearchSpace(ingredients)


def parse_ingredient(name: str, described: object) -> Ingredient:
    """One ingredient, without looking at the others."""
    place = f"{PLACE}.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{PLACE} has {name!r}; the name of an ingredient is small letters, digits and _")
    if not isinstance(described, Mapping):
        raise ConfigError(f"{place} is {described!r}; it takes a mapping: {{set: KEY, choices: [A, B]}}")
    for key in described:
        if key not in FIELDS:
            near = suggest_similar(str(key), FIELDS)
            raise ConfigError(f"{place} has {key!r}; {near}choose from {', '.join(FIELDS)}")
    has_range = described.get("low") is not None or described.get("high") is not None
    has_choices = described.get("choices") is not None
    if has_range == has_choices:
        raise ConfigError(f"{place} needs either choices, or low and high")
    when = parse_condition(place, described.get("when"))
    optional = described.get("optional", False)
    if not isinstance(optional, bool):
        raise ConfigError(f"{place}.optional is {optional!r}; choose true or false")
    setting = described.get("set")
    if has_range:
        return parse_range(name, described, when)
    choices = described["choices"]
    if isinstance(choices, Mapping):
        if setting is not None:
            raise ConfigError(f"{place}.choices names its settings itself; leave {place}.set out")
        recipes = parse_recipes(place, choices)
    else:
        recipes = parse_values(place, check_key(place, setting), choices)
    return Ingredient(name, recipes, when=when, is_optional=optional)


def check_key(place: str, key: object) -> str:
    """A setting that an ingredient may change.

    Raises:
        ConfigError: for what is no setting, or belongs to no recipe.
    """
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ConfigError(
            f"{place}.set is {key!r}; name a setting as the command line does, such as sampler.steps"
        )
    if key.partition(".")[0] in NOT_OF_A_RECIPE or key == "quality_db":
        # quality_db is allowed beside model_type.mixed_precision, in a choice that names both
        raise ConfigError(
            f"{place} sets {key}, which is no part of a recipe: it says what is searched, or how runs are "
            "judged and kept; set it on the command line"
        )
    return key


def parse_recipes(place: str, choices: Mapping[object, object]) -> dict[str, Mapping[str, object]]:
    """Choices that bring several settings each, by label; one that is null is left out."""
    parsed: dict[str, Mapping[str, object]] = {}
    for label, settings in choices.items():
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"{place}.choices.{label} is {settings!r}; it takes settings by their keys: "
                "{sampler.steps: 8}"
            )
        for key in settings:
            if key != "quality_db":
                check_key(f"{place}.choices.{label}", key)
        parsed[str(label)] = {str(key): value for key, value in settings.items()}
    check_several(place, list(parsed))
    return parsed


def parse_values(place: str, key: str, values: object) -> dict[str, Mapping[str, object]]:
    """Choices that are values of one setting, by label; null leaves it as the command has it."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{place}.choices is {values!r}; give a list of values, such as [none,convrot]")
    labels = [label_value(value) for value in values]
    check_several(place, labels)
    settings = [{} if value is None else {key: value} for value in values]
    return dict(zip(labels, settings, strict=True))


def label_value(value: object) -> str:
    """A value as the report and the command line show it."""
    if value is None:
        return AS_GIVEN
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def check_several(place: str, labels: Sequence[str]) -> None:
    """Raise ConfigError unless there are two choices or more, all different."""
    if len(labels) < 2:
        raise ConfigError(
            f"{place}.choices has {len(labels)} of the two or more that a search chooses between; "
            f"{place}=null leaves it out"
        )
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise ConfigError(f"{place}.choices has {repeated[0]!r} twice; name each choice once")


def parse_range(name: str, described: Mapping[str, object], when: Mapping[str, Sequence[str]]) -> Ingredient:
    """A range of numbers."""
    place = f"{PLACE}.{name}"
    key = check_key(place, described.get("set"))
    low, high, step = (check_number(place, field_name, described) for field_name in ("low", "high", "step"))
    log = described.get("log", False)
    if low is None or high is None or low >= high:
        raise ConfigError(f"{place} goes from {low} to {high}; give low and high, the smaller first")
    if not isinstance(log, bool):
        raise ConfigError(f"{place}.log is {log!r}; choose true or false")
    if log and low <= 0:
        raise ConfigError(f"{place}.log needs numbers above 0, and low is {low:g}")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{place}.step is {step:g}; allowed is more than 0, up to {high - low:g}")
    if step is not None and not is_near_whole((high - low) / step):
        raise ConfigError(f"{place}.step is {step:g}, and from {low:g} no number of steps ends at {high:g}")
    return Ingredient(name, key=key, low=low, high=high, step=step, log=log, when=when)


def is_near_whole(number: float) -> bool:
    """Whether a number is whole but for rounding."""
    return abs(number - round(number)) < 1e-9


def check_number(place: str, name: str, described: Mapping[str, object]) -> float | None:
    """A number of a range; None where it is left out."""
    value = described.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(float(str(value))):
        raise ConfigError(f"{place}.{name} is {value!r}; allowed is a number")
    assert isinstance(value, int | float)
    return value


def parse_condition(place: str, when: object) -> dict[str, list[str]]:
    """When an ingredient matters: labels by the name of another one."""
    if when is None:
        return {}
    if not isinstance(when, Mapping):
        raise ConfigError(
            f"{place}.when is {when!r}; it takes choices by ingredient: {{cache: [first_block]}}"
        )
    conditions = {}
    for name, values in when.items():
        is_list = isinstance(values, Sequence) and not isinstance(values, str)
        conditions[str(name)] = [label_value(value) for value in (values if is_list else [values])]
    return conditions


def drop_left_out(ingredient: Ingredient, left_out: Sequence[str]) -> Ingredient | None:
    """An ingredient beside others that are left out, which leave everything as the command has it.

    Returns:
        It, without the conditions about those; None where it matters beside other choices of theirs alone.
    """
    conditions = {}
    for name, labels in ingredient.when.items():
        if name not in left_out:
            conditions[name] = labels
        elif AS_GIVEN not in labels:
            return None
    return replace(ingredient, when=conditions)


def check_condition(ingredient: Ingredient, earlier: Mapping[str, Ingredient]) -> None:
    """Raise ConfigError where `when` names no ingredient before this one, or no choice of it."""
    for name, labels in ingredient.when.items():
        place = f"{PLACE}.{ingredient.name}.when"
        if name not in earlier or earlier[name].is_range:
            known = ", ".join(other for other in earlier if not earlier[other].is_range) or "none"
            raise ConfigError(
                f"{place} names {name!r}; allowed are ingredients with choices before it: {known}"
            )
        for label in labels:
            if label not in earlier[name].choices:
                choices = ", ".join(earlier[name].choices)
                raise ConfigError(f"{place}.{name} has {label!r}; choose from {choices}")
