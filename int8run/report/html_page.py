"""One HTML file that says which setting to use: table, plots, pictures and layers of many runs, for a browser without a network."""

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from int8run.errors import ConfigError
from int8run.report.columns import MISSING, PSNR_COLUMN, PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.curves import StrengthCurves, build_strength_curves
from int8run.report.heatmap import NUM_COLORS, OUTPUT_SQNR, Heatmap, build_heatmap
from int8run.report.image_gallery import Gallery, build_gallery
from int8run.report.plots import DASHES, NARROW, SERIES, WIDE, Point, draw_curves, draw_speed_quality
from int8run.report.ranking import build_table, choose_speed_metric, find_pareto_front, list_speed_quality
from int8run.report.run_files import DIFFERENCE_GAIN
from int8run.report.runs import (
    Run,
    collect_settings,
    describe_machine,
    differing,
    find_varying_settings,
    format_tags,
    group_tags_by_value,
    name_runs,
    parse_number,
    pluralize,
    shorten_keys,
)
from int8run.report.verdict import explain_incomparable_speeds, recommend
from int8run.tracking.run_record import FINISHED, Record

TEMPLATE_FOLDER = Path(__file__).parent
MAX_LINES = 16  # of curves in one plot
MAX_LABEL_LENGTH = (
    30  # characters beside a point; longer ones, or more than these points, are named by their number
)
MAX_LABELS = 14
HALF_WIDTH = 500  # px; two plots beside each other


def write_report(records: Sequence[Record], path: Path, title: str) -> None:
    """The page. It holds everything it shows: it may be moved, sent, and opened from a disk.

    Args:
        records: in the order in which they are to be listed.
        path: of the HTML file; its folder is made where it is missing.

    Raises:
        ConfigError: without a record.
    """
    if not records:
        raise ConfigError(
            "there is no run to report on; give a folder that a run or a sweep wrote, or start one with int8run -m …"
        )
    text = render_page(records, path.parent, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def render_page(records: Sequence[Record], folder: Path, title: str) -> str:
    """The HTML of the page, told from the folder that it will stand in."""
    runs = name_runs(records)
    columns, rows = build_table(runs)
    wall, heat = build_gallery(runs), build_heatmap(runs)
    files = FileSystemLoader(TEMPLATE_FOLDER)
    templates = Environment(
        loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("page.html.jinja").render(
        title=title,
        style=read_asset("page.css"),
        script=read_asset("page.js"),
        facts=list_facts(runs),
        answer=recommend(runs),
        runs=runs,
        unfair=explain_incomparable_speeds(runs),
        columns=columns,
        rows=rows,
        varied_settings=list(runs[0].varied_settings),
        is_front=any(row["front"] for row in rows),
        plot=build_speed_quality_plot(runs),
        curves=[build_curve_plots(c, i) for i, c in enumerate(build_strength_curves(runs))],
        wall=wall,
        pictures=select_deferred_images(wall),
        decibel=lambda value: "" if value is None else PSNR_COLUMN.format(value, 1),
        gain=DIFFERENCE_GAIN,
        heat=heat,
        levels=NUM_COLORS,
        heat_metrics=describe_heatmap_metric(heat),
        settings=compare_settings(records),
        commands=list_commands(runs, folder),
        environment=compare_environments(runs),
    )


def read_asset(name: str) -> str:
    """A file beside this one."""
    return (TEMPLATE_FOLDER / name).read_text(encoding="utf-8")


# -- head ---------------------------------------------------------------------------------------------------------------


def list_facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Under the title: what ran, when and where."""
    states = group_tags_by_value(runs, [run.record.state for run in runs])
    said = [
        f"{len(tags)} {state.lower()}"
        for state, tags in sorted(states.items(), key=lambda item: item[0] != FINISHED)
    ]
    found = [("Runs", said[0] if len(said) == 1 else f"{len(runs)}: {', '.join(said)}")]
    found.append(("When", format_period([run.record for run in runs])))
    hosts = [str(run.record.status.get("host") or "") for run in runs]
    machines, models = (
        [describe_machine(run.record) for run in runs],
        [run.record.params.get("model", "") for run in runs],
    )
    for name, values in (("Machine", machines), ("Host", hosts), ("Model", models)):
        known = [value for value in dict.fromkeys(values) if value]
        if known:
            found.append((name, "; ".join(known)))
    drawn = {len(run.record.images) for run in runs if run.record.images}
    if drawn:
        what = (
            "video" if any(image.get("stills") for run in runs for image in run.record.images) else "picture"
        )
        found.append(("Drawn", " or ".join(pluralize(n, what) for n in sorted(drawn)) + " by each run"))
    return found


def format_period(records: Sequence[Record]) -> str:
    """The first start and the last end, in UTC."""
    start = min(r.started for r in records)
    end = max((r.ended for r in records if r.ended), default=None)
    parts = [
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment))
        for moment in (start, start if end is None else end)
    ]
    day, first = parts[0].split()
    last = parts[1].removeprefix(f"{day} ")
    return f"{day} {first} UTC" if last == first else f"{day} {first} – {last} UTC"


# -- plots --------------------------------------------------------------------------------------------------------------


def build_speed_quality_plot(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Speed against quality, for a screen and for a phone; None with fewer than two points."""
    places = list_speed_quality(runs)
    ahead = set(find_pareto_front(places))
    metric = choose_speed_metric(runs)
    known = [(i, run) for i, run in enumerate(runs) if places[i] is not None]
    if metric is None or len(known) < 2:
        return None
    keys = find_varying_settings([run for _, run in known])
    short = len(known) <= MAX_LABELS and all(len(run.label) <= MAX_LABEL_LENGTH for _, run in known)
    points = []
    for i, run in known:
        speed, psnr = run.get_metric(metric) or 0.0, run.get_metric(PSNR_DB) or 0.0
        unit = "ms" if metric == STEP_MS else "× float"
        about = f"{run.name}: {speed:.3g} {unit}, PSNR {PSNR_COLUMN.format(psnr, 1)}"
        points.append(
            Point(speed, psnr, f"{run.tag} {label_run(run, keys)}" if short else run.tag, about, i in ahead)
        )
    label = "step time, ms (faster to the right)" if metric == STEP_MS else "speed, × the float model's"
    narrow = [Point(p.x, p.y, p.label.partition(" ")[0], p.description, p.is_on_front) for p in points]
    return {
        "wide": draw_speed_quality(points, label, metric == STEP_MS, "sq-wide", WIDE),
        "narrow": draw_speed_quality(narrow, label, metric == STEP_MS, "sq-narrow", NARROW),
    }


def label_run(run: Run, keys: Sequence[str]) -> str:
    """The values that set a run apart: names of options alone, numbers with their setting."""
    short = shorten_keys(keys)
    values = [(short[key], run.varied_settings[key]) for key in keys]
    return ", ".join(value if parse_number(value) is None else f"{name} {value}" for name, value in values)


def build_curve_plots(found: StrengthCurves, place: int) -> dict[str, Any]:
    """PSNR and step time against one strength, with their legend."""
    lines = dict(islice(found.lines.items(), MAX_LINES))
    drawn: list[dict[str, str]] = []
    for metric, label in (
        (PSNR_DB, "PSNR to float, dB"),
        (STEP_MS, "step time, ms"),
        (SPEED_RATIO, "speed, × the float model's"),
    ):
        values = [
            [(x, value) for x, run in line if (value := run.get_metric(metric)) is not None]
            for line in lines.values()
        ]
        if any(values) and len(drawn) < 2:
            name = f"curve-{place}-{metric.rpartition('/')[2]}"
            sizes = (("half", HALF_WIDTH), ("narrow", NARROW))
            drawn.append(
                {size: draw_curves(values, found.key, label, f"{name}-{size}", px) for size, px in sizes}
            )
    dashes = [" ".join(map(str, dash)) for dash in DASHES]
    legend = [
        {"label": label, "series": i % len(SERIES), "dash": dashes[i % len(DASHES)]}
        for i, label in enumerate(lines)
    ]
    notes = []
    if len(lines) < len(found.lines):
        notes.append(f"{len(found.lines) - len(lines)} more combinations are not drawn; the table has them.")
    if found.excluded:
        notes.append(f"{format_tags(found.excluded)} change the strength on the way, or have none.")
    return {"key": found.key, "plots": drawn, "legend": legend if len(lines) > 1 else [], "notes": notes}


# -- pictures, layers, settings -----------------------------------------------------------------------------------------


def select_deferred_images(wall: Gallery) -> dict[str, str]:
    """Those pictures that no `<img>` of the page holds itself: the script shows them."""
    shown = {cell.image for _, cells in wall.rows for cell in cells if cell.is_first}
    return {name: uri for name, uri in wall.uris.items() if name not in shown}


def describe_heatmap_metric(heat: Heatmap | None) -> str:
    """Which ratio the map shows, in words."""
    if heat is None:
        return ""
    outputs = [metric == OUTPUT_SQNR for metric in heat.metrics]
    if all(outputs):
        return "of each layer's output to the float layer's, for the same input"
    if not any(outputs):
        return "of each layer's weight; outputs were not measured"
    weights = format_tags([run.tag for run, output in zip(heat.runs, outputs, strict=True) if not output])
    return f"of each layer's output; of its weight in {weights}"


def compare_settings(records: Sequence[Record]) -> dict[str, Any]:
    """Settings that differ, as rows of values, and those that all share."""
    found = [collect_settings(r) for r in records]
    differ = differing(found)
    common = {key: value for key, value in found[0].items() if key not in differ}
    return {
        "differ": [(key, [f.get(key, MISSING) for f in found]) for key in differ],
        "common": sorted(common.items()),
    }


def compare_environments(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts about machines and libraries: values, each with the runs that have it (empty when all do)."""
    known = [run for run in runs if run.record.environment]
    found = [
        flatten_facts(run.record.environment) | {"host": str(run.record.status.get("host", MISSING))}
        for run in known
    ]
    rows = []
    for key in dict.fromkeys(key for facts in found for key in facts):
        values = group_tags_by_value(known, [facts.get(key, MISSING) for facts in found])
        rows.append(
            (key, [(value, format_tags(tags) if len(values) > 1 else "") for value, tags in values.items()])
        )
    return rows


def flatten_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{versions: {torch: 2}}` -> `{versions.torch: 2}`; what is not known is a dash."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        found |= (
            flatten_facts(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": format_fact(value)}
        )
    return found


def format_fact(value: object) -> str:
    """A fact as text."""
    return (
        MISSING
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def list_commands(runs: Sequence[Run], folder: Path) -> list[tuple[Run, str, str]]:
    """What repeats each run, and the folder that it wrote, told from the page's."""
    found = []
    for run in runs:
        place = os.path.relpath(run.record.folder.absolute(), folder.absolute())
        found.append(
            (run, " ".join(["int8run", *map(shlex.quote, run.record.overrides)]), Path(place).as_posix())
        )
    return found
