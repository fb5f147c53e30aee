"""A setting that changes during the steps: `[[fraction of the steps, value from there on], …]`.

The strength of a LoRA and the precision of the denoiser are given so. What a value may be is the setting's
own business.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.errors import ConfigError, check_range

# [fraction of the steps, value from there on], in order; the first fraction is 0
Schedule = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class ScheduleKind:
    """What the values of a schedule are.

    Args:
        value: what one is, in a word for messages.
        example: a schedule as the command line takes it.
        check_value: raises ConfigError for what is no such value.
    """

    value: str
    example: str
    check_value: Callable[[Any], None]


def check_schedule(name: str, entries: object, kind: ScheduleKind) -> None:
    """Check that the entries make a schedule.

    Args:
        name: of the setting, for messages.
        entries: what it was set to.
        kind: of its values.

    Raises:
        ConfigError: naming the setting and the form.
    """
    form = (
        f"[[fraction of the steps, {kind.value}], …] with rising fractions from 0 on, such as {kind.example}"
    )
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError(f"{name} is {entries!r}; a schedule is {form}")
    refusal = ConfigError(f"{name} is {list(entries)!r}; a schedule is {form}")
    if not all(is_pair(entry) for entry in entries):
        raise refusal

    fractions = []
    for fraction, value in entries:
        check_range(f"fraction in the {name}", fraction, 0, 1)
        kind.check_value(value)
        fractions.append(fraction)

    starts_at_0 = bool(fractions) and fractions[0] == 0
    is_rising = all(first < second for first, second in itertools.pairwise(fractions))
    if not starts_at_0 or not is_rising:
        raise refusal


def is_pair(value: object) -> bool:
    """Whether a value is a list of two."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def find_value_at(schedule: Schedule, fraction: float) -> Any:
    """The value of a schedule after a fraction of the steps, from 0 to 1."""
    starts = [start for start, _ in schedule]
    current = bisect.bisect_right(starts, fraction) - 1
    return schedule[current][1]
