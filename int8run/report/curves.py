"""Quality and speed over LoRA strength."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.runs import Run, find_varying_settings, parse_number, select_measured, shorten_keys

STRENGTH_KEY = re.compile(r"lora[.](adapters[.]\d+[.])?strength")


@dataclass(frozen=True)
class StrengthCurves:
    """Metrics against a strength, a line per combination of what else varies.

    Args:
        lines: by label, the points (strength, run) in the order of strength.
        left_out: tags of runs whose strength is no single number.
    """

    key: str
    lines: Mapping[str, list[tuple[float, Run]]]
    excluded: list[str]


def build_strength_curves(runs: Sequence[Run]) -> list[StrengthCurves]:
    """One set of curves for each LoRA strength that varies over finished runs."""
    done = select_measured(runs)
    keys = find_varying_settings(done)
    short = shorten_keys(keys)
    found = []
    for key in filter(STRENGTH_KEY.fullmatch, keys):
        lines: dict[str, list[tuple[float, Run]]] = {}
        left_out = []
        for run in done:
            strength = parse_number(run.varied_settings[key])
            if strength is None:
                left_out.append(run.tag)
                continue
            label = " ".join(f"{short[k]}={run.varied_settings[k]}" for k in keys if k != key) or "all runs"
            lines.setdefault(label, []).append((strength, run))
        for line in lines.values():
            line.sort(key=lambda point: point[0])
        if len({strength for line in lines.values() for strength, _ in line}) > 1:
            found.append(StrengthCurves(key, lines, left_out))
    return found
