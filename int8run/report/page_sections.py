"""The sections of a report page that list facts: what ran, its settings, its environment and its commands.

Each function returns plain values that the template lays out.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.report.columns import MISSING
from int8run.report.heatmap import OUTPUT_SQNR, Heatmap
from int8run.report.image_gallery import Gallery
from int8run.report.runs import (
    Run,
    collect_settings,
    describe_machine,
    format_tags,
    group_tags_by_value,
)
from int8run.tracking.run_record import FINISHED, Record
from int8run.tracking.setting_names import find_varying_keys
from int8run.utils.plurals import count_noun
from int8run.utils.text import quote_for_shell


@dataclass(frozen=True)
class SettingsSection:
    """Settings of the runs.

    Args:
        varying: those that differ, each with a value per run.
        common: those that all runs share.
    """

    varying: list[tuple[str, list[str]]]
    common: list[tuple[str, str]]


@dataclass(frozen=True)
class FactValue:
    """One value of a fact about the environment; `tags` are the runs that have it, empty when all do."""

    text: str
    tags: str


@dataclass(frozen=True)
class Command:
    """What repeats a run; `folder` is where it wrote, relative to the page."""

    run: Run
    text: str
    folder: str


# -- header --------------------------------------------------------------------------------------------------


def list_facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What ran, when and where, as term and text."""
    records = [run.record for run in runs]
    facts = [("Runs", count_states(runs)), ("When", format_period(records))]
    values_by_term = {
        "Machine": [describe_machine(record) for record in records],
        "Host": [str(record.status.get("host") or "") for record in records],
        "Model": [record.params.get("model", "") for record in records],
    }
    for term, values in values_by_term.items():
        known = [value for value in dict.fromkeys(values) if value]
        if known:
            facts.append((term, "; ".join(known)))
    if any(run.record.images for run in runs):
        facts.append(("Generated", f"{count_samples(runs)}{describe_sizes(runs)}"))
    rounded = format_rounded(runs)
    if rounded:
        facts.append(("Rounded", rounded))
    return facts


def describe_sizes(runs: Sequence[Run]) -> str:
    """`, 96 × 96 pixels`: every size that was generated; empty for runs that do not say it."""
    sizes: dict[str, None] = {}
    for run in runs:
        for sample in run.record.images:
            if "width" in sample and "height" in sample:
                sizes[f"{sample['width']} × {sample['height']}"] = None
    if not sizes:
        return ""
    return f", {' or '.join(sizes)} pixels"


def format_rounded(runs: Sequence[Run]) -> str:
    """What the pipelines did otherwise than asked: `sampler.width=100 to 96`; may be empty."""
    changes: dict[str, None] = {}
    for run in runs:
        for name, change in run.record.rounded.items():
            changes[f"{name}={change['asked']} to {change['generated']}"] = None
    return ", ".join(changes)


def count_states(runs: Sequence[Run]) -> str:
    """`6 finished`, or `6: 5 finished, 1 failed`."""
    tags_by_state = group_tags_by_value(runs, [run.record.state for run in runs])
    # Finished runs come first.
    states = sorted(tags_by_state, key=lambda state: state != FINISHED)
    counts = [f"{len(tags_by_state[state])} {state.lower()}" for state in states]
    if len(counts) == 1:
        return counts[0]
    return f"{len(runs)}: {', '.join(counts)}"


def count_samples(runs: Sequence[Run]) -> str:
    """`2 images by each run`, or `2 images or 4 images by each run`."""
    samples = [sample for run in runs for sample in run.record.images]
    noun = "video" if any(sample.get("stills") for sample in samples) else "image"
    numbers = sorted({len(run.record.images) for run in runs if run.record.images})
    return " or ".join(count_noun(number, noun) for number in numbers) + " by each run"


def format_period(records: Sequence[Record]) -> str:
    """From the first start to the last end, in UTC: `2026-09-21 14:13 – 14:14 UTC`."""
    start = min(record.started for record in records)
    end = max((record.ended for record in records if record.ended), default=start)
    start_day, start_time = format_utc(start).split()
    end_text = format_utc(end).removeprefix(f"{start_day} ")
    if end_text == start_time:
        return f"{start_day} {start_time} UTC"
    return f"{start_day} {start_time} – {end_text} UTC"


def format_utc(seconds: float) -> str:
    """A Unix time as day and minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


# -- images and layers ---------------------------------------------------------------------------------------


def select_deferred_images(gallery: Gallery) -> dict[str, str]:
    """The data URIs that no `<img>` of the page holds itself, by id: the script shows them on demand."""
    held = set()
    for row in gallery.rows:
        held |= {cell.image for cell in row.cells if cell.is_first}
        held |= {given.image for given in row.inputs if given.is_first}
    return {name: uri for name, uri in gallery.uris.items() if name not in held}


def describe_heatmap_metric(heatmap: Heatmap | None) -> str:
    """Which ratio the heatmap shows; empty without a heatmap."""
    if heatmap is None:
        return ""
    weight_tags = []
    for run, metric in zip(heatmap.runs, heatmap.metrics, strict=True):
        if metric != OUTPUT_SQNR:
            weight_tags.append(run.tag)
    if not weight_tags:
        return "of each layer's output to the float layer's, for the same input"
    if len(weight_tags) == len(heatmap.runs):
        return "of each layer's weight; outputs were not measured"
    return f"of each layer's output; of its weight in {format_tags(weight_tags)}"


# -- settings, environment, commands -------------------------------------------------------------------------


def compare_settings(records: Sequence[Record]) -> SettingsSection:
    """The settings that differ between the runs, and those that all share."""
    settings = [collect_settings(record) for record in records]
    varying = find_varying_keys(settings)
    return SettingsSection(
        varying=[(key, [values.get(key, MISSING) for values in settings]) for key in varying],
        common=sorted((key, value) for key, value in settings[0].items() if key not in varying),
    )


def compare_environments(runs: Sequence[Run]) -> list[tuple[str, list[FactValue]]]:
    """Facts about machines and libraries, each with its different values and the runs that have them."""
    known = [run for run in runs if run.record.environment]
    facts_of_runs = []
    names: dict[str, None] = {}
    for run in known:
        host = str(run.record.status.get("host", MISSING))
        facts = flatten_facts(run.record.environment) | {"host": host}
        facts_of_runs.append(facts)
        names |= dict.fromkeys(facts)

    rows = []
    for name in names:
        tags_by_value = group_tags_by_value(known, [facts.get(name, MISSING) for facts in facts_of_runs])
        if len(tags_by_value) == 1:
            values = [FactValue(text, tags="") for text in tags_by_value]
        else:
            values = [FactValue(text, format_tags(tags)) for text, tags in tags_by_value.items()]
        rows.append((name, values))
    return rows


def flatten_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as text by dotted name: `{versions: {torch: 2}}` -> `{versions.torch: 2}`."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flatten_facts(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = format_fact(value)
    return flat


def format_fact(value: object) -> str:
    """A fact as text; a dash where it is not known."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def list_commands(runs: Sequence[Run], page_folder: Path) -> list[Command]:
    """The command that repeats each run, ready to paste into a shell."""
    commands = []
    for run in runs:
        folder = os.path.relpath(run.record.folder.absolute(), page_folder.absolute())
        command = " ".join(["int8run", *map(quote_for_shell, run.record.overrides)])
        commands.append(Command(run=run, text=command, folder=Path(folder).as_posix()))
    return commands
