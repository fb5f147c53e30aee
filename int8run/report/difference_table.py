"""The tables of differences: each setting beside the best one, with intervals, and what is told apart.

Called by `html_page`, whose template lays them out, and by the end of a sweep, which prints them as lines.
Knows nothing of HTML.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.metrics.clusters import SAMPLE
from int8run.metrics.intervals import Difference
from int8run.report.comparison import SweepComparison
from int8run.report.difference_text import (
    TIMING,
    count_compared,
    explain_tie,
    format_decibel_difference,
    format_speed_difference,
)
from int8run.report.differences import Standing
from int8run.utils.plurals import count_noun

# What a setting is that is surely behind the best one; and what it is where it is surely ahead, because the
# best one is best by another number, as speeds are: the median of all steps, beside that of each stretch.
FURTHER = ("further from float", "closer to float, sample by sample")
SLOWER = ("slower", "faster, timing by timing")
MAX_LINES = 12  # of the terminal, for quality and speed each


@dataclass(frozen=True)
class DifferenceRow:
    """A setting beside the best one.

    Args:
        name: of the setting.
        difference: by how much it is behind, with the interval.
        count: what was compared.
        conclusion: whether the two are told apart, or what would tell them.
        is_told_apart: whether they are.
    """

    name: str
    difference: str
    count: str
    conclusion: str
    is_told_apart: bool


@dataclass(frozen=True)
class DifferenceTable:
    """Every setting beside the best one of quality or speed.

    Args:
        heading: what is compared, and with which setting.
        column: what the differences are.
        rows: one for each other setting.
    """

    heading: str
    column: str
    rows: Sequence[DifferenceRow]


def build_difference_tables(comparison: SweepComparison) -> list[DifferenceTable]:
    """The tables of quality and of speed, where their settings can be compared."""
    tables = []
    if comparison.quality_standings:
        tables.append(build_quality_table(comparison))
    if comparison.speed_standings and comparison.has_comparable_speeds:
        tables.append(build_speed_table(comparison))
    return tables


def build_quality_table(comparison: SweepComparison) -> DifferenceTable:
    """Each setting beside the closest to float, by the PSNR of the samples that both have."""
    rows = []
    for standing in order_standings(comparison.quality_standings):
        difference = format_decibel_difference(standing.difference)
        conclusion = conclude(standing.difference, SAMPLE, behind=FURTHER)
        rows.append(build_row(standing, difference, SAMPLE, conclusion))
    return DifferenceTable(f"Quality beside {comparison.closest[0].name}", "PSNR behind", rows)


def build_speed_table(comparison: SweepComparison) -> DifferenceTable:
    """Each setting beside the fastest, by the times that were taken."""
    rows = []
    for standing in order_standings(comparison.speed_standings):
        difference = format_speed_difference(standing.difference)
        conclusion = conclude(standing.difference, TIMING, behind=SLOWER)
        rows.append(build_row(standing, difference, TIMING, conclusion))
    return DifferenceTable(f"Speed beside {comparison.fastest[0].name}", "slower by", rows)


def order_standings(standings: Sequence[Standing]) -> list[Standing]:
    """The smallest difference first."""
    return sorted(standings, key=lambda standing: standing.difference.mean)


def conclude(difference: Difference, noun: str, behind: tuple[str, str]) -> str:
    """Whether a setting is told from the best one, in words.

    Args:
        difference: by which the best one is ahead.
        noun: what was compared.
        behind: words for a setting that is behind, and for one that is ahead.
    """
    if difference.sign == 0:
        return f"not told apart: {explain_tie(difference, noun)}"
    return behind[0] if difference.sign > 0 else behind[1]


def build_row(standing: Standing, difference: str, noun: str, conclusion: str) -> DifferenceRow:
    """One row.

    Args:
        standing: of the setting.
        difference: with its interval, as text.
        noun: what was compared.
        conclusion: in words.
    """
    return DifferenceRow(
        name=standing.candidate.name,
        difference=difference,
        count=count_compared(standing.difference, noun),
        conclusion=conclusion,
        is_told_apart=standing.difference.sign != 0,
    )


def describe_tables(tables: Sequence[DifferenceTable]) -> list[str]:
    """The tables as lines of a terminal; of many settings those that are the nearest to the best one."""
    lines = []
    for table in tables:
        lines.append(f"{table.heading}, {table.column}:")
        for row in table.rows[:MAX_LINES]:
            lines.append(f"  {row.name}: {row.difference} ({row.count}), {row.conclusion}")
        num_left_out = len(table.rows) - MAX_LINES
        if num_left_out > 0:
            lines.append(f"  and {count_noun(num_left_out, 'setting')} in the report")
    return lines
