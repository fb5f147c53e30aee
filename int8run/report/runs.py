"""The runs that a report compares: a short name for each, and the settings in which they differ.

The rest of the report works on these runs. Knows nothing of columns, plots or HTML.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.report.columns import MISSING, PSNR_DB, STEP_MS
from int8run.tracking.run_record import FINISHED, Record
from int8run.tracking.setting_names import find_varying_keys, shorten_keys, shorten_value, split_override
from int8run.utils.plurals import count_noun

# Settings that change neither the images nor the speed.
IRRELEVANT_SETTINGS = re.compile(r"(resume|progress|tracker|cache|save)([.]|$)")


MAX_VALUE_LENGTH = 60  # characters of a setting's value in a name; the tables have it whole


@dataclass(frozen=True)
class Run:
    """A record with the name that the report gives it.

    Args:
        record: what the job left in its output folder.
        tag: its number, such as `#3`.
        varied_settings: the settings that tell the runs apart, by their names on the command line, with the
            values of this run. All runs of a report have the same keys.
        label: these values in a few words, such as `strength=0.5 outlier=convrot`.
    """

    record: Record
    tag: str
    varied_settings: Mapping[str, str]
    label: str

    @property
    def name(self) -> str:
        """Tag and label: `#3 outlier=convrot`."""
        return f"{self.tag} {self.label}".strip()

    def get_metric(self, name: str) -> float | None:
        """A metric of a finished run; None where it is missing or NaN."""
        if self.record.state != FINISHED:
            return None
        value = self.record.metrics.get(name)
        if value is None or math.isnan(value):
            return None
        return value


def name_runs(records: Sequence[Record]) -> list[Run]:
    """Give each record a tag and a label that sets it apart from the others.

    The tag is the job's number in its sweep. Where two records have the same number, for example from two
    sweeps, all are numbered by their position instead.
    """
    settings = [collect_settings(record) for record in records]
    keys = find_distinguishing_keys(records, settings)
    label_keys = choose_label_keys(records, settings, keys)
    short_keys = shorten_keys(label_keys)

    numbers = [record.number for record in records]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(records)))

    runs = []
    for number, record, values in zip(numbers, records, settings, strict=True):
        varied_settings = {key: values.get(key, MISSING) for key in keys}
        label = " ".join(format_setting(short_keys[key], varied_settings[key]) for key in label_keys)
        runs.append(Run(record=record, tag=f"#{number}", varied_settings=varied_settings, label=label))
    return runs


def format_setting(short_key: str, value: str) -> str:
    """A setting in the name of a run or a line: `strength=0.5`; a long value is shortened."""
    return f"{short_key}={shorten_value(value, MAX_VALUE_LENGTH)}"


def choose_label_keys(
    records: Sequence[Record], settings: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> list[str]:
    """The keys that differ between runs with metrics.

    A run of another task in the same folder must not add `task=run` to every label.
    """
    with_metrics = [values for record, values in zip(records, settings, strict=True) if record.metrics]
    varying = set(find_varying_keys(with_metrics))
    return [key for key in keys if key in varying] or list(keys)


def collect_settings(record: Record) -> dict[str, str]:
    """The settings of a run by their names on the command line.

    Overrides are included because params hold only what has a value of its own: a list of LoRAs, for example,
    is known only as the user wrote it.
    """
    written = dict(split_override(override) for override in record.overrides)
    return {key: format_list(value) for key, value in (written | record.params).items()}


def format_list(value: str) -> str:
    """A list of texts without its brackets and quotes, as one reads it: `a fox, red; an owl`.

    Args:
        value: of a setting, with a list as Python writes it; anything else stays as it is.
    """
    if not value.startswith("["):
        return value
    try:
        items = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a list as the command line has it
        return value
    are_texts = bool(items) and all(isinstance(item, str) for item in items)
    return "; ".join(items) if are_texts else value


def find_distinguishing_keys(records: Sequence[Record], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that tell the runs apart: those on the command line that differ, else all that differ.

    `outlier=none,convrot` also changes the settings of the method; they would only repeat the difference.
    """
    varying = [key for key in find_varying_keys(settings) if not IRRELEVANT_SETTINGS.match(key)]
    overrides = [override for record in records for override in record.overrides]
    overridden = dict.fromkeys(key for key, _ in map(split_override, overrides))
    known = set(varying)
    return [key for key in overridden if key in known] or varying


def find_varying_settings(runs: Sequence[Run]) -> list[str]:
    """The distinguishing settings that differ between these runs, a part of the report's runs."""
    return find_varying_keys([run.varied_settings for run in runs])


def select_measured(runs: Sequence[Run]) -> list[Run]:
    """The runs that finished and measured a speed or a quality."""
    return [run for run in runs if run.get_metric(STEP_MS) is not None or run.get_metric(PSNR_DB) is not None]


def describe_machine(record: Record) -> str:
    """The hardware of a run: `NVIDIA H200` or `AMD EPYC, 8 threads`; empty where the run ended too early."""
    return describe_environment(record.environment)


def describe_environment(facts: Mapping[str, Any]) -> str:
    """The hardware of an environment.json; empty where there is none."""
    if not facts:
        return ""
    if facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts.get('cpu', 'CPU')}, {count_noun(facts.get('threads', 1), 'thread')}"


def group_tags_by_value(runs: Sequence[Run], values: Sequence[str]) -> dict[str, list[str]]:
    """The tags of the runs that share a value, by value.

    Args:
        runs: the runs.
        values: one value for each of them.
    """
    tags: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        tags.setdefault(value, []).append(run.tag)
    return tags


def format_tags(tags: Sequence[str]) -> str:
    """Tags as a list in which three or more in a row become a range: `#0–#3, #7`."""
    rows: list[list[str]] = []  # of tags whose numbers follow each other
    last_number = None
    for tag in tags:
        number = int(tag.removeprefix("#"))
        if last_number is not None and number == last_number + 1:
            rows[-1].append(tag)
        else:
            rows.append([tag])
        last_number = number

    texts = []
    for row in rows:
        texts += [f"{row[0]}–{row[-1]}"] if len(row) > 2 else row
    return ", ".join(texts)


def parse_number(text: str) -> float | None:
    """The value of a setting as a finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
