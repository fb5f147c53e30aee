"""What limits a recommendation: speeds that say little, and quality that is missing or means something else.

`verdict.recommend` puts these sentences below its own.
"""

from collections.abc import Sequence

from int8run.report.columns import PSNR_DB, SAME_FILE_LAYERS, SAME_FILE_LIMITS, STEP_MS
from int8run.report.comparison import SweepComparison
from int8run.report.ranking import is_own_baseline
from int8run.report.runs import format_tags, select_measured


def list_warnings(comparison: SweepComparison) -> list[str]:
    """What limits the recommendation."""
    return [
        *comparison.speed_problems,
        *warn_of_speeds(comparison),
        *warn_of_same_files(comparison),
        *warn_of_missing_quality(comparison),
    ]


def warn_of_speeds(comparison: SweepComparison) -> list[str]:
    """Which speeds say little, and which are missing."""
    warnings = []
    if comparison.scattered_tags:
        warnings.append(describe_scattered(comparison.scattered_tags))
    if not comparison.fastest:
        warnings.append("No run measured its speed.")
        return warnings

    untimed = [run.tag for run in select_measured(comparison.runs) if run.get_metric(STEP_MS) is None]
    if untimed:
        warnings.append(f"The speed of {format_tags(untimed)} was not measured.")
    return warnings


def describe_scattered(tags: Sequence[str]) -> str:
    """Which runs have speeds that say little; `export_table` has the sentence below its tables."""
    return (
        f"Step times of {format_tags(tags)} scatter by more than twice: other work ran on the machine, so "
        "these speeds say little."
    )


def warn_of_same_files(comparison: SweepComparison) -> list[str]:
    """Which runs had a float model whose numbers come from the file that was tested."""
    same_file = [run.tag for run in comparison.runs if run.get_metric(SAME_FILE_LAYERS)]
    if not same_file:
        return []
    warning = (
        f"The float model of {format_tags(same_file)} was read from the same quantized file: PSNR to float "
        f"{SAME_FILE_LIMITS}."
    )
    unranked = [run.tag for run in comparison.runs if is_own_baseline(run)]
    if unranked and len(comparison.runs) > 1:
        warning += (
            f" INT8 and float have the same numbers in {format_tags(unranked)}, so quality is not compared "
            "with that of other runs."
        )
    return [warning]


def warn_of_missing_quality(comparison: SweepComparison) -> list[str]:
    """Which runs have no PSNR."""
    measured = select_measured(comparison.runs)
    unjudged = [run.tag for run in measured if run.get_metric(PSNR_DB) is None]
    if len(unjudged) == len(measured):
        return [
            "No run generated the float model's images (metrics.baseline=none), so nothing is known about "
            "quality."
        ]
    if unjudged:
        return [f"The quality of {format_tags(unjudged)} was not measured."]
    return []
