"""INT8's distance to float beside what the float model differs from itself by, in words.

Read from metrics.json: `tasks.run_logs` prints it at the end of a run, `verdict_facts` has it on the page.
"""

import math
from collections.abc import Mapping
from typing import Any

from int8run.metrics.equivalence import CLOSER, EQUIVALENT, FURTHER
from int8run.metrics.intervals import MAX_SAMPLES
from int8run.report.columns import PSNR_DB, format_psnr
from int8run.report.difference_text import format_interval, format_signed
from int8run.report.formatting import describe_identical
from int8run.utils.plurals import count_noun


def describe_noise_floors(
    noise_floor: Mapping[str, Any],
    metrics: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """A line for each way in which the float model was computed otherwise.

    Args:
        noise_floor: that part of metrics.json; empty where it was not asked for.
        metrics: of the run.
        statistics: what its samples say of each metric; that part of metrics.json.
    """
    lines = []
    for metric, entry in noise_floor.get("drawn", {}).items():
        value = metrics.get(metric, math.nan)
        itself = "identical" if math.isinf(value) else format_psnr(value)
        identical = describe_identical(statistics.get(metric, {}))
        if identical:
            itself += f", {identical}"
        varied = ", ".join(entry["varied"])
        line = f"INT8 {format_psnr(metrics.get(PSNR_DB))}; the float model against itself {itself} ({varied})"
        test = entry.get("test")
        if test is not None:
            line += f": {conclude_test(test)}"
        lines.append(line)
    return lines


def conclude_test(test: Mapping[str, Any]) -> str:
    """What an equivalence test found, in words.

    Args:
        test: as metrics.json has it.
    """
    margin = f"{test['margin_db']:g} dB"
    outcome, interval = test["outcome"], test["interval"]
    unit = test.get("unit", "sample")  # earlier versions have none
    if interval is None:
        counted = count_noun(test["num_samples"], unit)
        return f"{counted} cannot say whether these are the same within {margin}"
    limits = format_interval(interval["low"], interval["high"], 1)
    gap = f"{format_signed(test['mean_db'], 1)} dB {limits}"
    if outcome == EQUIVALENT:
        return f"the same within {margin} ({gap}, p = {test['p_value']:.2g})"
    if outcome == FURTHER:
        return f"INT8 is further, surely by more than {margin} ({gap})"
    if outcome == CLOSER:
        return f"INT8 is closer, surely by more than {margin} ({gap})"
    if test["more_samples"] is None:
        more = f"and {MAX_SAMPLES:,} would not either"
    else:
        more = f"{test['more_samples']:,} more would"
    samples = count_noun(test["num_samples"], unit)
    return f"{samples} do not tell whether these are the same within {margin} ({gap}); {more}"
