"""What the runs of a folder say when they stand side by side: what differs, who is ahead, and the answer in words."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from int8run.report.columns import METRIC_COLUMNS, PSNR_DB, SPEED_RATIO, STEP_MS, MetricColumn
from int8run.report.runs import Run, find_varying_settings, format_tags, select_measured, shorten_keys

# settings that one chooses for the picture; runs that differ in them have different float pictures, too
CONTENT_SETTINGS = re.compile(r"lora[.](adapters[.]\d+[.])?strength|seed|prompts([.].*)?")


# -- what differs -------------------------------------------------------------------------------------------------------


# -- who is ahead -------------------------------------------------------------------------------------------------------


def find_pareto_front(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """The Pareto front: places of the points that no other beats in one number without being worse in the other. More is better."""
    known = [(i, point) for i, point in enumerate(points) if point is not None]
    beats = lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b  # noqa: E731
    return [i for i, point in known if not any(beats(other, point) for _, other in known)]


def choose_speed_metric(runs: "Sequence[Run] | Sequence[Candidate]") -> str | None:
    """What speeds are compared by: the ratio to float where every run that has a speed has one, else step times."""
    timed = [run for run in runs if run.get_metric(STEP_MS) is not None]
    if not timed:
        return None
    return SPEED_RATIO if all(run.get_metric(SPEED_RATIO) is not None for run in timed) else STEP_MS


def orient_speed(metric: str, value: float) -> float:
    """A speed as a number of which more is better."""
    return -value if metric == STEP_MS else value


def list_speed_quality(runs: "Sequence[Run] | Sequence[Candidate]") -> list[tuple[float, float] | None]:
    """Quickness and PSNR of each run; None where one is missing."""
    metric = choose_speed_metric(runs)
    points: list[tuple[float, float] | None] = []
    for run in runs:
        speed, psnr = run.get_metric(metric) if metric else None, run.get_metric(PSNR_DB)
        points.append(
            None if metric is None or speed is None or psnr is None else (orient_speed(metric, speed), psnr)
        )
    return points


@dataclass(frozen=True)
class Candidate:
    """What one may choose: a run, or the runs that differ only in what is drawn, with the median of each metric."""

    name: str
    runs: tuple[Run, ...]

    def get_metric(self, name: str) -> float | None:
        """The median over the runs; None where one lacks it."""
        known = [value for run in self.runs if (value := run.get_metric(name)) is not None]
        if not known or len(known) < len(self.runs):
            return None
        # the mean of `equal` and a number would be `equal`
        return statistics.median_low(known) if any(map(math.isinf, known)) else statistics.median(known)


def group_candidates(runs: Sequence[Run]) -> tuple[list[Candidate], list[str]]:
    """What the runs let one choose between, and the settings that medians are taken over.

    A LoRA's strength, a seed and a prompt are chosen for the picture. Where nothing else differs all runs are one choice; where others
    differ too, runs are put together by those, as far as they drew the same.
    """
    done = select_measured(runs)
    single = [Candidate(run.name, (run,)) for run in done]
    keys = find_varying_settings(done)
    content = [key for key in keys if CONTENT_SETTINGS.fullmatch(key)]
    choice = [key for key in keys if key not in content]
    if content and not choice:
        return [Candidate("INT8", tuple(done))], content
    groups: dict[tuple[str, ...], dict[tuple[str, ...], Run]] = {}
    for run in done:
        groups.setdefault(tuple(run.varied_settings[k] for k in choice), {})[
            tuple(run.varied_settings[k] for k in content)
        ] = run
    drawn = set.intersection(*(set(group) for group in groups.values())) if groups else set()
    if not content or len(groups) < 2 or len(drawn) < 2:
        return single, []
    names = shorten_keys(keys)
    together = []
    for values, group in groups.items():
        members = tuple(run for what, run in group.items() if what in drawn)
        together.append(
            Candidate(" ".join(f"{names[k]}={v}" for k, v in zip(choice, values, strict=True)), members)
        )
    return together, content


# -- machines -----------------------------------------------------------------------------------------------------------


# -- the answer ---------------------------------------------------------------------------------------------------------


def find_best(choices: Sequence[Candidate], metric: str, better: int) -> list[Candidate]:
    """All that share the best value; empty where nobody was measured."""
    known = [(better * value, c) for c in choices if (value := c.get_metric(metric)) is not None]
    top = max((value for value, _ in known), default=math.nan)
    return [c for value, c in known if value == top]


def format_names(who: Sequence[Candidate]) -> str:
    """One or two by name; of more runs their numbers."""
    if len(who) > 2 and all(len(c.runs) == 1 for c in who):
        return format_tags([c.runs[0].tag for c in who])
    return " and ".join(c.name for c in who[:2]) + (f" and {len(who) - 2} more" if len(who) > 2 else "")


# -- table and curves ---------------------------------------------------------------------------------------------------


def build_table(runs: Sequence[Run]) -> tuple[list[MetricColumn], list[dict[str, Any]]]:
    """The columns that any run has a value for, and a row per run: cells with text, number (None: missing) and whether it is the best."""
    known = {c.metric for c in METRIC_COLUMNS}
    asked = dict.fromkeys(run.record.objective for run in runs if run.record.objective not in known)
    possible = (*METRIC_COLUMNS, *(MetricColumn(metric, metric, "metrics.objective", 0) for metric in asked))
    columns = [c for c in possible if any(run.get_metric(c.metric) is not None for run in runs)]
    ahead = {i for i in find_pareto_front(list_speed_quality(runs)) if len(runs) > 1}
    made = {c.metric: [run.get_metric(c.metric) for run in runs] for c in columns}
    tops = {
        c.metric: max((c.direction * v for v in made[c.metric] if v is not None), default=0.0)
        for c in columns
    }
    digits = {
        c.metric: c.choose_decimals([v for v in made[c.metric] if v is not None]) for c in columns
    }
    rows = []
    for i, run in enumerate(runs):
        cells = []
        for c in columns:
            value = made[c.metric][i]
            all_equal = len({v for v in made[c.metric] if v is not None}) == 1
            is_best = (
                value is not None
                and c.direction != 0
                and not all_equal
                and c.direction * value == tops[c.metric]
            )
            cells.append({"text": c.format(value, digits[c.metric]), "value": value, "best": is_best})
        rows.append(
            {
                "run": run,
                "front": i in ahead,
                "cells": cells,
                "measured": any(cell["value"] is not None for cell in cells),
            }
        )
    return columns, rows
