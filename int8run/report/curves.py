"""Quality and speed over LoRA strength."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.runs import Run, measured, number, short_names, varying

STRENGTH = re.compile(r"lora[.](adapters[.]\d+[.])?strength")


@dataclass(frozen=True)
class Curves:
    """Metrics against a strength, a line per combination of what else varies.

    Args:
        lines: by label, the points (strength, run) in the order of strength.
        left_out: tags of runs whose strength is no single number.
    """

    key: str
    lines: Mapping[str, list[tuple[float, Run]]]
    left_out: list[str]


def strength_curves(runs: Sequence[Run]) -> list[Curves]:
    """One set of curves for each LoRA strength that varies over finished runs."""
    done = measured(runs)
    keys = varying(done)
    short = short_names(keys)
    found = []
    for key in filter(STRENGTH.fullmatch, keys):
        lines: dict[str, list[tuple[float, Run]]] = {}
        left_out = []
        for run in done:
            strength = number(run.varied[key])
            if strength is None:
                left_out.append(run.tag)
                continue
            label = " ".join(f"{short[k]}={run.varied[k]}" for k in keys if k != key) or "all runs"
            lines.setdefault(label, []).append((strength, run))
        for line in lines.values():
            line.sort(key=lambda point: point[0])
        if len({strength for line in lines.values() for strength, _ in line}) > 1:
            found.append(Curves(key, lines, left_out))
    return found
