"""What a search may choose between: ingredients, each with choices or a range of numbers.

`parse_space` makes a space from the config. Imports nothing heavy: composing a config makes one.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from int8run.errors import ConfigError

# what a trial chose: name of an ingredient -> label of its choice, or a number of its range
Params = Mapping[str, str | float]
PLACE = "task.space"
SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
NUM_GRID_POINTS = 5  # of a range, where combinations are enumerated
MAX_COMBINATIONS = 20_000  # that are predicted; of more, as many are drawn


@dataclass(frozen=True)
class Ingredient:
    """One thing that a search chooses. The first choice, or the low end of a range, is its base.

    Args:
        name: as the report shows it.
        choices: label -> settings that the choice brings; empty for a range.
        key: the setting of a range.
        low: least number of a range.
        high: largest number of a range.
        step: distance of the numbers of a range; None: any number.
        log: whether a range is searched by its logarithm.
        when: it matters only while these other ingredients have one of these labels.
        is_optional: whether a choice that a model cannot have is left out; else it is an error.
    """

    name: str
    choices: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    key: str = ""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    when: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_optional: bool = False

    @property
    def is_range(self) -> bool:
        """Whether it is a number between two others."""
        return not self.choices

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole ones."""
        numbers = [self.low, self.high] + ([] if self.step is None else [self.step])
        return all(isinstance(number, int) for number in numbers)

    @property
    def base(self) -> str | float:
        """What the base recipe has."""
        return self.low if self.is_range else next(iter(self.choices))

    def get_settings(self, value: str | float) -> Mapping[str, object]:
        """The settings that a value of it brings, by their keys."""
        return {self.key: value} if self.is_range else self.choices[str(value)]

    def list_points(self, count: int) -> list[str | float]:
        """Its choices, or so many numbers of its range, both ends among them."""
        if not self.is_range:
            return list(self.choices)
        points: list[str | float] = []
        for number in range(count):
            value = self.locate(number / (count - 1))
            if value not in points:
                points.append(value)
        return points

    def locate(self, share: float) -> float:
        """The number at a share of the way from the low end to the high one."""
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        if self.step is not None:
            value = self.low + self.step * round((value - self.low) / self.step)
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_whole else float(f"{value:.6g}")


@dataclass(frozen=True)
class SearchSpace:
    """All ingredients, each behind those that its `when` names."""

    ingredients: Mapping[str, Ingredient]

    @property
    def base(self) -> Params:
        """What the base recipe chooses."""
        return self.complete({})

    @property
    def keys(self) -> list[str]:
        """Every setting that some choice changes."""
        keys: dict[str, None] = {}
        for ingredient in self.ingredients.values():
            for settings in ingredient.choices.values():
                keys.update(dict.fromkeys(settings))
            if ingredient.is_range:
                keys[ingredient.key] = None
        return list(keys)

    def is_active(self, ingredient: Ingredient, params: Params) -> bool:
        """Whether an ingredient matters beside these values of those before it."""
        return all(params.get(name) in labels for name, labels in ingredient.when.items())

    def complete(self, chosen: Params) -> Params:
        """The values of all ingredients that matter: the chosen ones, the base of each other."""
        params: dict[str, str | float] = {}
        for name, ingredient in self.ingredients.items():
            if self.is_active(ingredient, params):
                params[name] = chosen.get(name, ingredient.base)
        return params

    def list_settings(self, params: Params) -> dict[str, object]:
        """The settings of a recipe by their keys. Of two that set the same key the later ingredient wins."""
        settings: dict[str, object] = {}
        for name, value in params.items():
            settings |= self.ingredients[name].get_settings(value)
        return settings

    def has_overruled_choice(self, params: Params) -> bool:
        """Whether a choice changes nothing, because later ones set all that it sets.

        The recipe with the base's choice in its place has the same settings.

        Args:
            params: of a recipe, in the order of the ingredients.
        """
        set_later: set[str] = set()
        for name, value in reversed(list(params.items())):
            ingredient = self.ingredients[name]
            keys = set(ingredient.get_settings(value))
            if value != ingredient.base and keys and keys <= set_later:
                return True
            set_later |= keys
        return False

    def list_alone(self) -> list[Params]:
        """The recipes in which one ingredient differs from the base, with the points of what depends on it.

        Of a range both ends are among them, so that its effect can be interpolated.
        """
        recipes: list[Params] = []
        for ingredient in self.ingredients.values():
            for parents in self.list_contexts(ingredient):
                points = ingredient.list_points(2)
                recipes += [self.complete({**parents, ingredient.name: point}) for point in points]
        unique = {freeze(recipe): recipe for recipe in recipes}
        unique.pop(freeze(self.base), None)
        return list(unique.values())

    def list_contexts(self, ingredient: Ingredient) -> list[Params]:
        """The values of others beside which an ingredient matters; one that always does has a single context.

        Of several others that it depends on at once, the first labels are taken.
        """
        if not ingredient.when:
            return [{}]
        first, *others = ingredient.when.items()
        fixed = {name: labels[0] for name, labels in others}
        name, labels = first
        contexts: list[Params] = []
        for label in labels:
            for parents in self.list_contexts(self.ingredients[name]):
                contexts.append({**parents, **fixed, name: label})
        return contexts

    def list_combinations(self, seed: int) -> list[Params]:
        """Every combination, of ranges a few points; of too many MAX_COMBINATIONS that a seed draws.

        Recipes with an overruled choice are left out: another one has the same settings.
        """
        total = math.prod(len(i.list_points(NUM_GRID_POINTS)) for i in self.ingredients.values())
        if total <= MAX_COMBINATIONS:
            recipes = list(self.iterate_combinations())
        else:
            chance = random.Random(seed)
            recipes = [self.draw(chance) for _ in range(MAX_COMBINATIONS)]
        unique = {freeze(recipe): recipe for recipe in recipes}
        return [recipe for recipe in unique.values() if not self.has_overruled_choice(recipe)]

    def draw(self, chance: random.Random) -> Params:
        """A combination at random."""
        params: dict[str, str | float] = {}
        for name, ingredient in self.ingredients.items():
            if self.is_active(ingredient, params):
                params[name] = chance.choice(ingredient.list_points(NUM_GRID_POINTS))
        return params

    def iterate_combinations(self, params: Params | None = None, position: int = 0) -> Iterator[Params]:
        """Every combination of the ingredients from a position on, with the values of those before it."""
        params = params or {}
        if position == len(self.ingredients):
            yield params
            return
        name, ingredient = list(self.ingredients.items())[position]
        if not self.is_active(ingredient, params):
            yield from self.iterate_combinations(params, position + 1)
            return
        for point in ingredient.list_points(NUM_GRID_POINTS):
            yield from self.iterate_combinations({**params, name: point}, position + 1)

    def without(self, left_out: Mapping[str, Sequence[str]]) -> "SearchSpace":
        """The space without some choices, by ingredient; an ingredient with one choice left is gone, too.

        Args:
            left_out: labels of choices that cannot be had here.
        """
        kept: dict[str, Ingredient] = {}
        for name, ingredient in self.ingredients.items():
            gone = left_out.get(name, ())
            choices = {label: own for label, own in ingredient.choices.items() if label not in gone}
            is_chosen = ingredient.is_range or len(choices) > 1
            remaining = {
                parent: [label for label in labels if label not in left_out.get(parent, ())]
                for parent, labels in ingredient.when.items()
            }
            is_reachable = all(parent in kept and labels for parent, labels in remaining.items())
            if is_chosen and is_reachable:
                kept[name] = replace(ingredient, choices=choices, when=remaining)
        return SearchSpace(kept)

    def resolve_shares(self, get_number: Callable[[str], float | None]) -> "SearchSpace":
        """The space with `75%` replaced by that share of what the base recipe has.

        Args:
            get_number: gives the number that the base recipe has at a key; None: it has none.

        Raises:
            ConfigError: for a share of something that is no number.
        """
        resolved = {}
        for name, ingredient in self.ingredients.items():
            choices = {}
            for label, settings in ingredient.choices.items():
                choices[label] = {
                    key: resolve_share(name, key, value, get_number) for key, value in settings.items()
                }
            resolved[name] = replace(ingredient, choices=choices)
        return SearchSpace(resolved)

    def to_json(self) -> dict[str, object]:
        """What the space is, to compare it with that of an earlier search."""
        described: dict[str, object] = {}
        for name, ingredient in self.ingredients.items():
            facts: dict[str, object] = {"when": {key: list(own) for key, own in ingredient.when.items()}}
            if ingredient.is_range:
                facts |= {"set": ingredient.key, "low": ingredient.low, "high": ingredient.high}
                facts |= {"step": ingredient.step, "log": ingredient.log}
            else:
                facts["choices"] = {label: dict(own) for label, own in ingredient.choices.items()}
            described[name] = facts
        return described


def freeze(params: Params) -> tuple[tuple[str, str | float], ...]:
    """A recipe as a key: equal for equal choices."""
    return tuple(sorted(params.items()))


def resolve_share(name: str, key: str, value: object, get_number: Callable[[str], float | None]) -> object:
    """A value, or the share of the base recipe's number that it stands for; whole where that is whole."""
    found = SHARE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    number = get_number(key)
    if number is None:
        raise ConfigError(
            f"{PLACE}.{name} has {value!r}, a share of {key}, which is no number here; give numbers, or set "
            f"{key}=… on the command line"
        )
    part = float(found[1]) / 100 * number
    return max(1, round(part)) if isinstance(number, int) else part
