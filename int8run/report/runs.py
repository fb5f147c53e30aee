"""The runs that a report compares: their names, and the settings in which they differ."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.columns import MISSING, PSNR_DB, STEP_MS
from int8run.tracking.run_record import FINISHED, Record

# settings that change neither what is drawn nor how fast
IRRELEVANT_SETTINGS = re.compile(r"(resume|progress|tracker|cache|save)([.]|$)")


@dataclass(frozen=True)
class Run:
    """A record as the page names it.

    Args:
        tag: `#3`.
        varied: its value of every setting that differs between the runs, by the setting's name on the command line.
        label: these values in a few words.
    """

    record: Record
    tag: str
    varied_settings: Mapping[str, str]
    label: str

    @property
    def name(self) -> str:
        """`#3 outlier=convrot`."""
        return f"{self.tag} {self.label}".strip()

    def get_metric(self, name: str) -> float | None:
        """A number that was measured by a run that finished; NaN is none."""
        value = self.record.metrics.get(name) if self.record.state == FINISHED else None
        return None if value is None or math.isnan(value) else value


def name_runs(records: Sequence[Record]) -> list[Run]:
    """Each record with a short name: its number, where numbers differ, else its place here; and what sets it apart."""
    numbers = [r.number for r in records]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(records)))
    found = [collect_settings(r) for r in records]
    keys = find_distinguishing_keys(records, found)
    # a task of another kind in the folder must not add `task=run` to every name
    measured = [settings for record, settings in zip(records, found, strict=True) if record.metrics]
    in_label = [key for key in keys if len({settings.get(key) for settings in measured}) > 1] or keys
    short = shorten_keys(in_label)
    runs = []
    for place, record, settings in zip(numbers, records, found, strict=True):
        varied = {key: settings.get(key, MISSING) for key in keys}
        runs.append(
            Run(record, f"#{place}", varied, " ".join(f"{short[key]}={varied[key]}" for key in in_label))
        )
    return runs


def find_varying_settings(runs: Sequence[Run]) -> list[str]:
    """Those of the settings that tell runs apart which differ between these."""
    return [
        key
        for key in (runs[0].varied_settings if runs else ())
        if len({run.varied_settings[key] for run in runs}) > 1
    ]


def collect_settings(record: Record) -> dict[str, str]:
    """Settings by their names on the command line; a list of LoRAs stands there as it was said."""
    said = (word.lstrip("+~").partition("=") for word in record.overrides)
    return {key: value for key, _, value in said} | record.params


def differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that not all have with the same value, in the order of their first appearance."""
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in found}) > 1]


def find_distinguishing_keys(records: Sequence[Record], found: Sequence[Mapping[str, str]]) -> list[str]:
    """Settings that tell the runs apart: those that the user named and that differ; if none do, all that differ.

    `outlier=none,convrot` changes the settings of the method, too, which would only repeat it.
    """
    differ = [key for key in differing(found) if not IRRELEVANT_SETTINGS.match(key)]
    said = dict.fromkeys(
        word.lstrip("+~").partition("=")[0] for record in records for word in record.overrides
    )
    return [key for key in said if key in differ] or differ


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key ends with."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next(
            (
                end
                for end in ends
                if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)
            ),
            key,
        )
    return short


def select_measured(runs: Sequence[Run]) -> list[Run]:
    """Runs that finished with a speed or a quality."""
    return [run for run in runs if run.get_metric(STEP_MS) is not None or run.get_metric(PSNR_DB) is not None]


def describe_machine(record: Record) -> str:
    """The hardware in words; empty when the run did not get so far."""
    facts = record.environment
    if not facts or facts.get("gpu"):
        return str(facts.get("gpu", ""))
    return f"{facts.get('cpu', 'CPU')}, {pluralize(facts.get('threads', 1), 'thread')}"


def group_tags_by_value(runs: Sequence[Run], values: Sequence[str]) -> dict[str, list[str]]:
    """Tags of the runs by a value of theirs."""
    found: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(value, []).append(run.tag)
    return found


def format_tags(tags: Sequence[str]) -> str:
    """`#0–#3, #7`."""
    parts: list[list[str]] = []
    for tag in tags:
        if parts and int(tag[1:]) == int(parts[-1][-1][1:]) + 1:
            parts[-1].append(tag)
        else:
            parts.append([tag])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(p) for p in parts)


def pluralize(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'s' * (number != 1)}"


def parse_number(text: str) -> float | None:
    """A setting as a finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
