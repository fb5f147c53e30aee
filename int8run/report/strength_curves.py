"""Quality and speed over LoRA strength: which lines the report draws for each strength that varies."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.runs import Run, find_varying_settings, format_setting, parse_number, select_measured
from int8run.tracking.setting_names import shorten_keys

STRENGTH_KEY = re.compile(r"lora[.](adapters[.]\d+[.])?strength")


@dataclass(frozen=True)
class StrengthCurves:
    """The runs over one strength, in a line for each combination of the other settings that vary.

    Args:
        key: the strength's name on the command line.
        lines: by label, the points (strength, run) in the order of strength.
        excluded: tags of runs whose strength is not a single number.
    """

    key: str
    lines: Mapping[str, list[tuple[float, Run]]]
    excluded: list[str]

    @property
    def strengths(self) -> set[float]:
        """The strengths of all points."""
        return {strength for line in self.lines.values() for strength, _ in line}


def build_strength_curves(runs: Sequence[Run]) -> list[StrengthCurves]:
    """The curves of each LoRA strength that has at least two values among the measured runs."""
    measured = select_measured(runs)
    keys = find_varying_settings(measured)
    found = []
    for key in keys:
        if not STRENGTH_KEY.fullmatch(key):
            continue
        curves = group_by_strength(measured, key, keys)
        if len(curves.strengths) > 1:
            found.append(curves)
    return found


def group_by_strength(runs: Sequence[Run], strength_key: str, keys: Sequence[str]) -> StrengthCurves:
    """The lines over one strength.

    Args:
        runs: measured runs.
        strength_key: the setting on the x axis.
        keys: all settings that vary between these runs.
    """
    short_keys = shorten_keys(keys)
    lines: dict[str, list[tuple[float, Run]]] = {}
    excluded = []
    for run in runs:
        strength = parse_number(run.varied_settings[strength_key])
        if strength is None:
            excluded.append(run.tag)
            continue
        others = []
        for key in keys:
            if key != strength_key:
                others.append(format_setting(short_keys[key], run.varied_settings[key]))
        lines.setdefault(" ".join(others) or "all runs", []).append((strength, run))
    for line in lines.values():
        line.sort(key=lambda point: point[0])
    return StrengthCurves(strength_key, lines, excluded)
