"""Files of `--config-dir` with odd values, types, aliases and classes, against a plain YAML parser.

A file is composed with the shipped config as a command does it. Refused in one line, or each value of it is
in the composed config, and in the settings that a run gets, as the parser reads it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml
from support.hydra_files import remembered_package_files

from int8run.config.compose import check_command, get_plain_config
from int8run.config.error_messages import explain_error
from int8run.errors import ConfigError

# group -> its keys with usual values, as texts of YAML
GROUPS: dict[str, dict[str, str]] = {
    "sampler": {
        "_target_": "int8run.models.sampling.Sampling",
        "steps": "4",
        "guidance": "3.5",
        "height": "64",
        "batch": "2",
        "scheduler": "LCMScheduler",
        "scheduler_settings": "{shift: 3.0}",
        "extra": "{max_sequence_length: 256}",
    },
    "prompts": {
        "_target_": "int8run.generate.prompts.PromptSet",
        "prompts": "[red apple, fox]",
        "seeds_per_prompt": "2",
        "negative_prompt": "blurry",
    },
    "outlier": {"_target_": "int8run.outlier.convrot.ConvRot", "group_size": "64"},
    "metrics": {"_target_": "int8run.metrics.settings.MetricsSettings", "baseline": "none"},
    "": {"seed": "3", "compile": "none", "quality_db": "null", "progress": "false", "device": "cpu"},
}
VALUES = (
    *("null", "~", "", "true", "yes", "off", "1", "0", "-1", "2.5", "1e3", "1e999", ".inf", ".nan", "-.inf"),
    *("0x10", "010", "1_000", "1:30", "2026-01-01", "'4'", '"x y"', "[]", "{}", "[1, 2]", "{a: {b: [1]}}"),
    *("[[[[1]]]]", "{a: 1, a: 2}", "*a", "&a [1, *a]", "!!python/name:os.system", "!!int '3'", "!x y"),
    *("${seed}", "${oc.env:HOME}", "${oc.env:HF_TOKEN}", "${oc.create:{}}", "${missing.key}", "${", "???"),
    *(
        "|\n  a\n  b",
        ">-\n  folded\n  text",
        "'狐狸 🦊'",
        '"\\0"',
        '"\\x1b[31m"',
        "@x",
        "`x`",
        "%x",
        "- 1",
        "a: b",
    ),
    *(
        "[" * 50,
        "9" * 5000,
        "1" + "0" * 400,
        "{" + "a: {" * 60,
        "x" * 10_000,
        "[[red]]",
        "#",
        "[null, true, 3]",
    ),
    *(
        "int8run.models.sampling.Sampling",
        "os.system",
        "int8run.outlier.none.NoOutlierMethod",
        "builtins.print",
    ),
    "{_target_: os.system, _args_: [ls]}",
)
KEYS = (
    *(
        "_partial_",
        "_recursive_",
        "_args_",
        "_convert_",
        "_target_",
        "defaults",
        "hydra",
        "x",
        "steps",
        "prompts",
    ),
    *("1", "null", "true", "'a.b'", "''", "extra", "negative_prompt", "? [a, b]\n", "<<", "-", "seed"),
)
TEXTS = (
    "\t",
    "\n",
    "  ",
    "- ",
    ": ",
    "#",
    "'",
    '"',
    "{",
    "]",
    "&a ",
    "*a ",
    "%YAML 1.2\n---\n",
    "---\n",
    "...\n",
)
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n" for i in range(9)
)


class PlainLoader(yaml.SafeLoader):
    """YAML 1.1 with the floats of 1.2 (`1e3`), and no dates."""


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$
    |[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$""",
    flags=re.VERBOSE,
)
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def make_file(chance: Random) -> tuple[str, str, list[str]]:
    """A file's name and text, and the words that choose it."""
    group = chance.choice([*GROUPS])
    pairs = list(GROUPS[group].items())
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        at = chance.randrange(len(pairs))
        if chance.random() < 0.6:
            pairs[at] = (pairs[at][0], chance.choice(VALUES))
        elif chance.random() < 0.5:
            pairs.append((chance.choice(KEYS), chance.choice(VALUES)))
        else:
            del pairs[at]
            pairs = pairs or [("x", "1")]
    text = "".join(f"{key}: {value}\n" for key, value in pairs)
    if chance.random() < 0.2:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(TEXTS) + text[at:]
    if chance.random() < 0.03:
        text += BOMB
    if group:
        return f"{group}/shared.yaml", text, [f"{group}=shared"]
    return "mine/shared.yaml", f"# @package _global_\n{text}", ["+mine=shared"]


def compose_file(folder: Path, words: list[str]) -> tuple[dict[str, Any], Any]:
    """The composed config and the settings of a run.

    Raises:
        ConfigError: where the command would end with one line.
    """
    try:
        with remembered_package_files():
            found = check_command(words, announce=lambda *_: None, config_dir=str(folder))
    except Exception as error:
        line, _ = explain_error(error)
        if line is None:
            raise
        raise ConfigError(line) from error
    assert found is not None, "a file made a sweep of a run"
    return get_plain_config(found.config), found.spec


def check_yaml(chance: Random, folder: Path) -> bool:
    """Compose a file, and compare each of its values."""
    name, text, words = make_file(chance)
    for old in folder.glob("**/*.yaml"):
        old.unlink()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")

    config, spec = compose_file(folder, words)

    plain = yaml.load(text, PlainLoader)  # a subclass of the safe one
    group = "" if name.startswith("mine") else name.partition("/")[0]
    for keys, wanted in iterate_leaves(plain):
        place = [*([group] if group else []), *keys]
        if keys[0] == "defaults" or (isinstance(wanted, str) and ("${" in wanted or wanted == "???")):
            continue
        assert is_same(find(config, place), wanted), (
            f"{place} is {find(config, place)!r}, {wanted!r} is written"
        )
        setting = find_setting(spec, place)
        assert setting is None or is_same(setting[0], wanted), (
            f"the run gets {setting} for {place}: {wanted!r}"
        )
    return True


def iterate_leaves(node: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values of a tree of mappings, with their keys."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from iterate_leaves(value, (*keys, key))
    elif keys:
        yield keys, node


def find(config: Any, keys: list[Any]) -> Any:
    """The value below some keys."""
    for key in keys:
        assert isinstance(config, dict) and key in config, f"{keys} is lost"
        config = config[key]
    return config


def find_setting(spec: Any, keys: list[Any]) -> tuple[Any] | None:
    """A plain setting of a run; None: it is none."""
    for key in keys:
        names = (
            {field.name for field in dataclasses.fields(spec)} if dataclasses.is_dataclass(spec) else set()
        )
        if key not in names:
            return None
        spec = getattr(spec, key)
    return (spec,) if isinstance(spec, str | int | float | bool | None) else None


def is_same(found: object, wanted: object) -> bool:
    """Whether two plain values are equal and of one type."""
    if isinstance(found, float) and isinstance(wanted, float) and math.isnan(found):
        return math.isnan(wanted)
    return found == wanted and type(found) is type(wanted)
