"""`recipe=FILE`: the settings that `task=search` wrote into recipe.yaml, in front of the command's own.

`cli.py` puts them on the command line before hydra sees it, so that they are checked, shown and kept like any
other override. What the command line says itself wins, and that is logged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from int8run.config.compose import GROUPS
from int8run.config.shared_settings import check_settings, list_choices
from int8run.config.yaml_bounds import check_yaml_text
from int8run.errors import ConfigError, FileError
from int8run.tracking.setting_names import split_override
from int8run.utils.paths import check_readable, expand_path

SETTING = "recipe"
RECIPE_KEY = "recipe"  # of the file: a list of overrides
# what a recipe may not set: it says how a model is made and run, not what is done with it
REFUSED = frozenset(
    {
        "task",
        "hydra",
        "tracker",
        "cache",
        "plugins",
        "resume",
        "sync",
        "save",
        "metrics",
        "prompts",
        "seed",
        "recipe",
    }
)


def insert_recipe(arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The arguments with the overrides of `recipe=FILE` in front.

    Args:
        arguments: of the command line.
        say: is given a line about each setting of the file that the command line replaces.

    Raises:
        ConfigError: for two files, and for a file that is no recipe.
        FileError: for a file that is not there.
    """
    given = [word for word in arguments if split_override(word)[0] == SETTING and "=" in word]
    if not given:
        return list(arguments)
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a command has one recipe; give one of them")
    file = split_override(given[0])[1].strip("'\"")
    if file in ("", "null"):
        return list(arguments)
    own = {split_override(word)[0]: word for word in arguments if "=" in word and not word.startswith("-")}
    inserted = []
    for override in read_recipe(file):
        winner = find_winner(override, own)
        if winner is None:
            inserted.append(override)
        elif winner != override:
            say(f"{file} says {override}; {winner} of the command line wins")
    return [*inserted, *arguments]


def find_winner(override: str, own: dict[str, str]) -> str | None:
    """The override of the command line that replaces one of a recipe; None where there is none.

    An option that the command line chooses replaces the settings of the recipe's option, too.

    Args:
        override: of the recipe.
        own: overrides of the command line, by key.
    """
    key = split_override(override)[0]
    if key in own:
        return own[key]
    group = key.partition(".")[0]
    return own.get(group) if group in GROUPS else None


def read_recipe(file: str) -> list[str]:
    """The overrides of a recipe.

    Args:
        file: path of it.

    Raises:
        ConfigError: it is no recipe, or sets what only a command line may.
        FileError: it is not there, or no text.
    """
    path = expand_path(file)
    check_readable(SETTING, path, takes_folder=False)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{SETTING}={file} is not UTF-8 text: {error}") from error
    check_yaml_text(text, path)
    content: Any = yaml.safe_load(text)
    overrides: Any = content.get(RECIPE_KEY) if isinstance(content, dict) else None
    is_list = isinstance(overrides, list) and bool(overrides)
    if not is_list or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(
            f"{SETTING}={file} is no recipe: it has no list of settings called {RECIPE_KEY}; task=search "
            "writes such a file"
        )
    for override in overrides:
        check_override(override, path)
    return list(overrides)


def check_override(override: str, path: Path) -> None:
    """Check one setting of a recipe by the rules for files that somebody else may have written.

    Raises:
        ConfigError: naming the file, the setting and the rule.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{path} has {override!r}, which is no override: {error}") from error
    key = parsed.key_or_group.replace("/", ".")
    if key.partition(".")[0] in REFUSED or parsed.is_sweep_override() or parsed.is_delete():
        raise ConfigError(
            f"{path} has {override!r}; a recipe sets how a model is made and run, one value for each "
            "setting, and nothing else"
        )
    for value in list_choices(parsed._value):
        check_settings(value, key, str(path))
