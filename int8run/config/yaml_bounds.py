"""Refuse a YAML text that would become more than a config, before anything builds it.

An alias repeats a part of a text, and aliases of aliases repeat it exponentially: a kilobyte can stand for a
billion values. The parser's events are counted as if each alias were written out, in linear time and without
recursion.
"""

from dataclasses import dataclass

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

from int8run.errors import ConfigError

MAX_CHARACTERS = 2_000_000
MAX_VALUES = 20_000  # the largest file that ships has 600
MAX_DEPTH = 40  # of mappings and lists in each other
PLAIN_TAG = "tag:yaml.org,2002:str"
# libyaml's, where PyYAML was built with it: fifteen times as fast
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Part:
    """A mapping, a list or a single value, aliases written out.

    Args:
        anchor: the name by which aliases repeat it.
        values: that it holds, itself included.
        depth: of what it holds; a single value has 0.
    """

    anchor: str | None
    values: int = 1
    depth: int = 0


def check_yaml_text(text: str, file: object) -> None:
    """Check the syntax, the size, the depth and the tags of a YAML text.

    Args:
        text: the content of a file.
        file: its name, for the message.

    Raises:
        ConfigError: for a text that is no YAML, is too large or too deep, repeats itself inside itself, or
            makes Python objects.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{file} has {len(text):,} characters; a config has at most {MAX_CHARACTERS:,}; long lists of "
            "prompts go into a text file: prompts=file prompts.path=FILE"
        )
    try:
        count_values(text, file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}, line {mark.line + 1}" if mark else str(file)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{place}: this is not YAML: {reason}") from error


def count_values(text: str, file: object) -> None:
    """Count the values of a YAML text as they would be with every alias written out; see check_yaml_text."""
    anchored: dict[str, Part] = {}  # what aliases can repeat
    open_parts: list[Part] = []  # the mappings and lists around the place that is read, outermost first
    total = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, CollectionStartEvent):
            check_tag(event.tag, file)
            open_parts.append(Part(event.anchor))
            check_depth(len(open_parts), file)
            total += 1
            continue

        if isinstance(event, CollectionEndEvent):
            complete = open_parts.pop()  # counted where it started
        elif isinstance(event, AliasEvent):
            repeated = find_repeated_part(str(event.anchor), anchored, open_parts, file)
            check_depth(len(open_parts) + repeated.depth, file)
            complete = Part(anchor=None, values=repeated.values, depth=repeated.depth)
            total += complete.values
        elif isinstance(event, ScalarEvent):
            check_tag(event.tag, file)
            complete = Part(event.anchor)
            total += 1
        else:
            assert not isinstance(event, NodeEvent), f"a new kind of YAML node: {event}"
            continue

        check_total(total, file)
        if complete.anchor is not None:
            anchored[complete.anchor] = complete
        if open_parts:
            add_part(open_parts[-1], complete)


def find_repeated_part(name: str, anchored: dict[str, Part], open_parts: list[Part], file: object) -> Part:
    """The part that an alias repeats.

    Raises:
        ConfigError: when there is none, or it is not complete yet: it would hold itself.
    """
    if any(part.anchor == name for part in open_parts):
        raise ConfigError(f"{file}: *{name} stands inside of &{name}, so it would never end; write it out")
    if name not in anchored:
        raise ConfigError(f"{file}: *{name} repeats &{name}, which does not stand before it")
    return anchored[name]


def add_part(parent: Part, part: Part) -> None:
    """Count a part that is complete into the one that holds it."""
    parent.values += part.values
    parent.depth = max(parent.depth, part.depth + 1)


def check_total(total: int, file: object) -> None:
    """Raise ConfigError for more values than a config has."""
    if total > MAX_VALUES:
        raise ConfigError(
            f"{file} stands for more than {MAX_VALUES:,} values, its aliases (*name) written out; a "
            "config has far fewer; long lists of prompts go into a text file: prompts=file "
            "prompts.path=FILE"
        )


def check_depth(depth: int, file: object) -> None:
    """Raise ConfigError for mappings and lists that are too deep in each other."""
    if depth > MAX_DEPTH:
        raise ConfigError(
            f"{file} has more than {MAX_DEPTH} mappings and lists in each other; a config has a few"
        )


def check_tag(tag: str | None, file: object) -> None:
    """Raise ConfigError for `!tag value`, which makes another object than the one that is written."""
    if tag not in (None, PLAIN_TAG):
        raise ConfigError(f"{file} has the YAML tag {tag!r}; a config holds plain values without tags")
