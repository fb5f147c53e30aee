"""Patterns of dotted names: `*` stands for one number, `**` for any rest (`transformer_blocks.*.attn.**`).

The key mappings are written in these patterns; the state dict adapter and the matching of LoRA files apply
them. Nothing here knows about models or files.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

# the regular expression of each wildcard; numbers are counted, so that a pattern may have several
NUMBER_GROUP, REST_GROUP = r"(?P<number{}>\d+)", "(?P<rest>.+)"


class PatternMatch(NamedTuple):
    """What the wildcards of a pattern stand for in a name.

    Args:
        numbers: for each `*`, in order.
        rest: for the `**`; empty where the pattern has none.
    """

    numbers: tuple[str, ...]
    rest: str

    @property
    def first_number(self) -> int | None:
        """The number of the first `*`; None where the pattern has none."""
        return int(self.numbers[0]) if self.numbers else None


def is_name_pattern(pattern: object) -> bool:
    """Return whether this is a string whose parts between dots are not empty."""
    return isinstance(pattern, str) and all(pattern.split("."))


def count_wildcards(pattern: str) -> tuple[int, int]:
    """Return how many `*` and how many `**` a pattern has.

    Any other use of the star counts as two `**`, which no pattern may have.
    """
    segments = pattern.split(".")
    misused = [segment for segment in segments if "*" in segment and segment not in ("*", "**")]
    return segments.count("*"), segments.count("**") + 2 * len(misused)


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern, with one group for each wildcard."""
    parts: list[str] = []
    for i, segment in enumerate(pattern.split(".")):
        if segment == "*":
            parts.append(NUMBER_GROUP.format(i))
        elif segment == "**":
            parts.append(REST_GROUP)
        else:
            parts.append(re.escape(segment))
    return re.compile(r"\.".join(parts))


@cache
def get_fixed_start(pattern: str) -> str:
    """Return what every name that matches a pattern begins with: the text before its first wildcard."""
    return pattern.partition("*")[0]


def match_pattern(pattern: str, name: str) -> PatternMatch | None:
    """Return what the wildcards of a pattern stand for in a name; None when the name does not match."""
    # most names of a file do not even begin like the pattern
    if not name.startswith(get_fixed_start(pattern)):
        return None
    match = compile_pattern(pattern).fullmatch(name)
    if match is None:
        return None
    groups = match.groupdict()
    rest = groups.pop("rest", "")
    return PatternMatch(numbers=tuple(groups.values()), rest=rest)


def fill_pattern(pattern: str, values: PatternMatch) -> str:
    """Return a pattern with its wildcards replaced by what another pattern's stood for."""
    numbers = iter(values.numbers)
    return ".".join(fill_segment(segment, numbers, values.rest) for segment in pattern.split("."))


def fill_segment(segment: str, numbers: Iterator[str], rest: str) -> str:
    """Return one part of a pattern; each `*` takes the next number."""
    if segment == "*":
        return next(numbers)
    return rest if segment == "**" else segment


def find_greatest_number(pattern: str, names: Iterable[str]) -> int:
    """Return the greatest number that the first `*` of a pattern stands for; -1 when no name matches."""
    greatest = -1
    for name in names:
        match = match_pattern(pattern, name)
        if match is not None:
            greatest = max(greatest, int(match.numbers[0]))
    return greatest
