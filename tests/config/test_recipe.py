"""`recipe=FILE`: its settings come in front, the command line wins, and what only that may set is refused."""

from pathlib import Path

import pytest
import yaml
from support.cli_process import Command

from int8run.config.recipe import insert_recipe
from int8run.errors import ConfigError, FileError

OVERRIDES = ["model=tiny", "outlier=convrot", "outlier.group_size=64", "sampler.steps=3", "int8.max_rows=2"]


def write(folder: Path, overrides: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"recipe": overrides, "found": {"trial": 3}}))
    return f"recipe={path}"


def insert(folder: Path, *own: str) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    return insert_recipe([write(folder, OVERRIDES), *own], lines.append), lines


def test_without_a_recipe_nothing_changes() -> None:
    assert insert_recipe(["outlier=none", "-m"], pytest.fail) == ["outlier=none", "-m"]
    assert insert_recipe(["recipe=null"], pytest.fail) == ["recipe=null"]


def test_settings_of_the_file_come_first(tmp_path: Path) -> None:
    arguments, lines = insert(tmp_path, "prompts.take=1")

    assert arguments[:5] == OVERRIDES
    assert arguments[5].startswith("recipe=")
    assert not lines


def test_a_setting_of_the_command_line_wins_and_is_said(tmp_path: Path) -> None:
    arguments, lines = insert(tmp_path, "sampler.steps=8", "model=tiny")

    assert "sampler.steps=3" not in arguments
    assert [line.partition(" says ")[2] for line in lines] == [
        "sampler.steps=3; sampler.steps=8 of the command line wins"
    ]


def test_an_option_of_the_command_line_replaces_the_settings_of_the_other_option(tmp_path: Path) -> None:
    arguments, lines = insert(tmp_path, "outlier=none")

    assert [word for word in arguments if word.startswith("outlier")] == ["outlier=none"]
    assert len(lines) == 2


def test_two_recipes_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a command has one recipe; give one of them"):
        insert_recipe([write(tmp_path, OVERRIDES), "recipe=b.yaml"], pytest.fail)


@pytest.mark.parametrize("content", ["3", "[a]", "recipe: 3", "recipe: []", "recipe: [3]", "found: {}"])
def test_a_file_without_settings_is_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)

    with pytest.raises(ConfigError, match=r"is no recipe: it has no list of settings called recipe"):
        insert_recipe([f"recipe={path}"], pytest.fail)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"recipe.*missing\.yaml"):
        insert_recipe([f"recipe={tmp_path}/missing.yaml"], pytest.fail)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(FileError, match=r"is not UTF-8 text"):
        insert_recipe([f"recipe={path}"], pytest.fail)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=quantize", r"a recipe sets how a model is made and run, one value for each setting"),
        ("hydra.run.dir=/tmp/x", r"a recipe sets how a model is made and run"),
        ("hydra/launcher=slurm", r"a recipe sets how a model is made and run"),
        ("tracker.uri=http://x", r"a recipe sets how a model is made and run"),
        ("sampler.steps=1,2", r"one value for each setting"),
        ("~outlier", r"one value for each setting"),
        ("save=/etc/passwd", r"a recipe sets how a model is made and run"),
        ("attention=hub_x", r"it runs code from the hub"),
        ("model.location=${oc.env:AWS_SECRET}", r"may hold a password"),
        ("a b=[", r"which is no override"),
    ],
)
def test_what_only_a_command_line_may_set_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        insert_recipe([write(tmp_path, [override])], pytest.fail)


def test_the_config_shows_what_a_recipe_sets(command: Command) -> None:
    recipe = write(command.folder, OVERRIDES)

    outcome = command(recipe, "--cfg", "job")

    assert outcome.code == 0
    config = yaml.safe_load(outcome.out)
    assert config["sampler"]["steps"] == 3
    assert config["outlier"]["group_size"] == 64
    assert config["recipe"] == recipe.partition("=")[2]


def test_a_setting_of_a_recipe_that_does_not_exist_is_named(command: Command) -> None:
    outcome = command(write(command.folder, ["sampler.stepps=3"]))

    assert outcome.code == 2
    assert "sampler.stepps" in outcome.message
