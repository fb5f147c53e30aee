"""Differences of settings and their intervals in words and numbers: for the report, and for the terminal.

`verdict`, `verdict_facts` and `difference_table` choose what is said; nothing is compared here.
"""

import math
from collections.abc import Sequence

from int8run.metrics.clusters import SAMPLE
from int8run.metrics.intervals import MAX_SAMPLES, Difference
from int8run.report.columns import MISSING
from int8run.report.differences import Standing
from int8run.utils.plurals import count_noun

TIMING = "timing"
MINUS = "−"


def format_signed(value: float, decimals: int) -> str:
    """A number with a minus that is as wide as a plus: `−0.20`."""
    return f"{value:.{decimals}f}".replace("-", MINUS)


def format_interval(low: float, high: float, decimals: int) -> str:
    """`[54.31, 55.52]`."""
    return f"[{format_signed(low, decimals)}, {format_signed(high, decimals)}]"


def format_decibel_difference(difference: Difference) -> str:
    """By how many dB, with the interval where there is one: `1.23 dB [0.80, 1.66]`."""
    if math.isnan(difference.mean):
        return MISSING
    text = f"{format_signed(difference.mean, 2)} dB"
    if difference.interval is None:
        return text
    return f"{text} {format_interval(difference.interval.low, difference.interval.high, 2)}"


def format_speed_difference(difference: Difference) -> str:
    """By how many percent less speed, with the interval where there is one: `12.0 % [9.1, 15.2]`.

    Args:
        difference: of logarithms of speeds.
    """
    if math.isnan(difference.mean):
        return MISSING
    text = f"{format_signed(to_percent(difference.mean), 1)} %"
    if difference.interval is None:
        return text
    low, high = to_percent(difference.interval.low), to_percent(difference.interval.high)
    return f"{text} {format_interval(low, high, 1)}"


def to_percent(log_ratio: float) -> float:
    """How much less speed in percent, from the logarithm by which another one is ahead: 50 at half of it."""
    return -100 * math.expm1(-log_ratio)


def explain_tie(difference: Difference, noun: str) -> str:
    """Why two settings are not told apart, and what would help: `6 samples do not tell; 58 more would`.

    Args:
        difference: of both.
        noun: what was compared: a sample or a timing.
    """
    if difference.num_samples == 0:
        return f"they have no {noun}s that can be compared"
    if noun == SAMPLE:
        noun = difference.unit
    if difference.interval is None:
        return f"one {noun} has no interval; more prompts or seeds give one"
    if difference.sign < 0:
        return f"one is ahead as a whole, the other {noun} by {noun}"
    counted = count_noun(difference.num_units, noun)
    verb = "does" if difference.num_units == 1 else "do"
    if difference.more_samples is None:
        return f"{counted} {verb} not tell, and {MAX_SAMPLES:,} would not either"
    return f"{counted} {verb} not tell; {difference.more_samples:,} more would"


def count_compared(difference: Difference, noun: str) -> str:
    """What was compared: `8 samples`; where prompts have several seeds `6 prompts, 12 samples`.

    Args:
        difference: of two settings.
        noun: a sample or a timing.
    """
    counted = count_noun(difference.num_samples, noun)
    if noun == SAMPLE and difference.unit != SAMPLE:
        counted = f"{count_noun(difference.num_units, difference.unit)}, {counted}"
    return counted


def explain_ties(standings: Sequence[Standing], noun: str) -> str:
    """The same of several settings beside the best one: what the hardest of them needs.

    Args:
        standings: of settings that are not told from the best one.
        noun: what was compared.
    """
    return explain_tie(min((standing.difference for standing in standings), key=rank_certainty), noun)


def rank_certainty(difference: Difference) -> tuple[int, float]:
    """A number that is less where less is known, or more samples are needed."""
    if difference.interval is None:
        return difference.num_units - 2, 0.0
    needed = math.inf if difference.more_samples is None else difference.more_samples
    return 0, -needed
