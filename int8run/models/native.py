"""Naming rules: how an architecture's modules are called outside diffusers, read from `native_names/*.yaml`.

A file of rules:

    classes: [FluxTransformer2DModel] # classes of models that the rules are for; "*": all
    names: # name elsewhere: name in the model
      img_in: x_embedder
      double_blocks.*.img_attn.proj: transformer_blocks.*.attn.to_out.0 # * is a number, the same on both sides
      time_in.**: time_embed.** # ** is any rest, at any one place of a name
      double_blocks.*.img_attn.qkv: [transformer_blocks.*.attn.to_q, ...] # one matrix there, several here: its rows in this order
      final_layer.adaLN_modulation.1: { to: norm_out.linear, swap_halves: true } # the two halves of the rows change places

`swap_halves: last` swaps only in the block with the greatest number. Rules apply one after the other, so a rule for blocks and a
rule for what is inside them make names together.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError

FOLDER = Path(__file__).parent / "native_names"
EVERY_CLASS = "*"
SWAPS = (False, True, "last")


@dataclass(frozen=True)
class NamingRule:
    """One line of a file of rules.

    Args:
        native: the pattern of a name outside diffusers.
        targets: patterns of the modules whose rows it holds, in their order.
        swap_halves: exchange the halves of the rows: True, False, or `last`: only where the first `*` is the greatest.
    """

    native: str
    targets: tuple[str, ...]
    swap_halves: bool | str = False


def rules_for(class_name: str, folder: Path = FOLDER) -> tuple[NamingRule, ...]:
    """The naming rules of a model class, first its own, then those of all classes. A class that no file names has only the latter.

    Raises:
        ConfigError: for a malformed file of rules.
    """
    by_class = read_folder(folder)
    return by_class.get(class_name, ()) + by_class.get(EVERY_CLASS, ())


@cache
def read_folder(folder: Path) -> Mapping[str, tuple[NamingRule, ...]]:
    """All files of a folder: rules by class name.

    Raises:
        ConfigError: for a malformed file, or a class that two files name.
    """
    by_class: dict[str, tuple[NamingRule, ...]] = {}
    for file in sorted(folder.glob("*.yaml")):
        classes, rules = read_rules(file)
        for name in classes:
            if name in by_class:
                raise ConfigError(f"{file.name}: class {name} has rules in another file as well; name it in one file only")
            by_class[name] = rules
    return by_class


def read_rules(file: Path) -> tuple[list[str], tuple[NamingRule, ...]]:
    """The classes and the rules of one file.

    Raises:
        ConfigError: for anything but the layout above; the message names file and rule.
    """
    try:
        data = yaml.load(file.read_text(), Loader=UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file.name} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or set(data) != {"classes", "names"}:
        raise ConfigError(f"{file.name}: a file of naming rules is a mapping with classes and names, nothing else")
    classes, names = data["classes"], data["names"]
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
        raise ConfigError(f"{file.name}: classes is {classes!r}; it takes a list of class names")
    if not isinstance(names, dict):
        raise ConfigError(f"{file.name}: names is {names!r}; it takes a mapping of a name elsewhere to a name in the model")
    return classes, tuple(read_rule(file.name, native, value) for native, value in names.items())


def read_rule(file: str, native: object, value: Any) -> NamingRule:
    """One rule, checked: strings, known fields, the same wildcards on both sides.

    Raises:
        ConfigError: with the file, the rule and what it takes.
    """
    where = f"{file}: rule {native!r}"
    options = value if isinstance(value, dict) else {"to": value}
    if "to" not in options or not set(options) <= {"to", "swap_halves"}:
        raise ConfigError(f"{where} has the fields {', '.join(map(str, options))}; it takes to, and may have swap_halves")
    targets = options["to"] if isinstance(options["to"], list) else [options["to"]]
    patterns = [native, *targets]
    if not targets or not all(isinstance(p, str) and all(p.split(".")) for p in patterns):
        raise ConfigError(f"{where} points to {options['to']!r}; it takes a module name or a list of them")
    swap = options.get("swap_halves", False)
    if swap not in SWAPS or (isinstance(swap, int) and not isinstance(swap, bool)):
        raise ConfigError(f"{where} has swap_halves {swap!r}; choose true, false or last")
    if swap and len(targets) > 1:
        raise ConfigError(f"{where} swaps the halves of several modules; only a rule with one module can")
    if swap == "last" and "*" not in str(native).split("."):
        raise ConfigError(f"{where} swaps halves in the last block but has no * for its number")
    if len(set(map(wildcards, patterns))) > 1 or wildcards(str(native))[1] > 1:
        raise ConfigError(f"{where}: both sides need the same number of *, and the same ** (one at most)")
    return NamingRule(str(native), tuple(targets), swap)


def wildcards(pattern: str) -> tuple[int, int]:
    """How many `*` and `**` a pattern has; any other use of the star counts as a `**` too many."""
    segments = pattern.split(".")
    odd = sum("*" in s and s not in ("*", "**") for s in segments)
    return segments.count("*"), segments.count("**") + 2 * odd


@cache
def matcher(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; a group for each wildcard."""
    groups = {"*": r"(?P<n{}>\d+)", "**": "(?P<rest>.+)"}
    parts = [groups[s].format(i) if s in groups else re.escape(s) for i, s in enumerate(pattern.split("."))]
    return re.compile(r"\.".join(parts))


def captures(pattern: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """What the wildcards of a pattern stand for in a name, numbers first; None when it does not match."""
    found = matcher(pattern).fullmatch(name)
    if found is None:
        return None
    groups = found.groupdict()
    return tuple(v for k, v in groups.items() if k != "rest"), groups.get("rest", "")


def fill(pattern: str, values: tuple[Iterable[str], str]) -> str:
    """A pattern with its wildcards replaced by what `captures` found."""
    numbers, rest = iter(values[0]), values[1]
    return ".".join({"*": lambda: next(numbers), "**": lambda: rest}.get(s, lambda s=s: s)() for s in pattern.split("."))


class UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's own takes the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: for a repeated key.
        """
        keys = [key.value for key, _ in node.value]
        repeated = sorted({str(k) for k in keys if keys.count(k) > 1})
        if repeated:
            raise yaml.YAMLError(f"the key {repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)
