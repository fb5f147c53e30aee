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
from int8run.report.columns import DECIBEL, MISSING, PSNR, RATIO, STEP
from int8run.report.curves import Curves, strength_curves
from int8run.report.heatmap import LEVELS, OUTPUT, Heat, build_heat
from int8run.report.image_gallery import Wall, build_wall
from int8run.report.plots import DASHES, NARROW, SERIES, WIDE, Point, curves_plot, speed_quality_plot
from int8run.report.ranking import front, speed_metric, speed_quality, table
from int8run.report.run_files import DIFFERENCE_GAIN
from int8run.report.runs import (
    Run,
    by_value,
    count,
    differing,
    listed,
    machine_of,
    name_runs,
    number,
    settings_of,
    short_names,
    varying,
)
from int8run.report.verdict import answer, unfair_speeds
from int8run.tracking.run_record import FINISHED, Record

HERE = Path(__file__).parent
MOST_LINES = 16  # of curves in one plot
LONGEST_LABEL = (
    30  # characters beside a point; longer ones, or more than these points, are named by their number
)
MOST_LABELS = 14
HALF = 500  # px; two plots beside each other


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
    text = page(records, path.parent, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def page(records: Sequence[Record], folder: Path, title: str) -> str:
    """The HTML of the page, told from the folder that it will stand in."""
    runs = name_runs(records)
    columns, rows = table(runs)
    wall, heat = build_wall(runs), build_heat(runs)
    files = FileSystemLoader(HERE)
    templates = Environment(
        loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("page.html.jinja").render(
        title=title,
        style=source("page.css"),
        script=source("page.js"),
        facts=facts(runs),
        answer=answer(runs),
        runs=runs,
        unfair=unfair_speeds(runs),
        columns=columns,
        rows=rows,
        varied=list(runs[0].varied),
        is_front=any(row["front"] for row in rows),
        plot=plot(runs),
        curves=[curves(c, i) for i, c in enumerate(strength_curves(runs))],
        wall=wall,
        pictures=later_pictures(wall),
        decibel=lambda value: "" if value is None else DECIBEL.show(value, 1),
        gain=DIFFERENCE_GAIN,
        heat=heat,
        levels=LEVELS,
        heat_metrics=heat_metrics(heat),
        settings=settings(records),
        commands=commands(runs, folder),
        environment=environments(runs),
    )


def source(name: str) -> str:
    """A file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


# -- head ---------------------------------------------------------------------------------------------------------------


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Under the title: what ran, when and where."""
    states = by_value(runs, [run.record.state for run in runs])
    said = [
        f"{len(tags)} {state.lower()}"
        for state, tags in sorted(states.items(), key=lambda item: item[0] != FINISHED)
    ]
    found = [("Runs", said[0] if len(said) == 1 else f"{len(runs)}: {', '.join(said)}")]
    found.append(("When", when([run.record for run in runs])))
    hosts = [str(run.record.status.get("host") or "") for run in runs]
    machines, models = (
        [machine_of(run.record) for run in runs],
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
        found.append(("Drawn", " or ".join(count(n, what) for n in sorted(drawn)) + " by each run"))
    return found


def when(records: Sequence[Record]) -> str:
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


def plot(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Speed against quality, for a screen and for a phone; None with fewer than two points."""
    places = speed_quality(runs)
    ahead = set(front(places))
    metric = speed_metric(runs)
    known = [(i, run) for i, run in enumerate(runs) if places[i] is not None]
    if metric is None or len(known) < 2:
        return None
    keys = varying([run for _, run in known])
    short = len(known) <= MOST_LABELS and all(len(run.label) <= LONGEST_LABEL for _, run in known)
    points = []
    for i, run in known:
        speed, psnr = run.metric(metric) or 0.0, run.metric(PSNR) or 0.0
        unit = "ms" if metric == STEP else "× float"
        about = f"{run.name}: {speed:.3g} {unit}, PSNR {DECIBEL.show(psnr, 1)}"
        points.append(
            Point(speed, psnr, f"{run.tag} {words(run, keys)}" if short else run.tag, about, i in ahead)
        )
    label = "step time, ms (faster to the right)" if metric == STEP else "speed, × the float model's"
    narrow = [Point(p.x, p.y, p.label.partition(" ")[0], p.about, p.ahead) for p in points]
    return {
        "wide": speed_quality_plot(points, label, metric == STEP, "sq-wide", WIDE),
        "narrow": speed_quality_plot(narrow, label, metric == STEP, "sq-narrow", NARROW),
    }


def words(run: Run, keys: Sequence[str]) -> str:
    """The values that set a run apart: names of options alone, numbers with their setting."""
    short = short_names(keys)
    values = [(short[key], run.varied[key]) for key in keys]
    return ", ".join(value if number(value) is None else f"{name} {value}" for name, value in values)


def curves(found: Curves, place: int) -> dict[str, Any]:
    """PSNR and step time against one strength, with their legend."""
    lines = dict(islice(found.lines.items(), MOST_LINES))
    drawn: list[dict[str, str]] = []
    for metric, label in (
        (PSNR, "PSNR to float, dB"),
        (STEP, "step time, ms"),
        (RATIO, "speed, × the float model's"),
    ):
        values = [
            [(x, value) for x, run in line if (value := run.metric(metric)) is not None]
            for line in lines.values()
        ]
        if any(values) and len(drawn) < 2:
            name = f"curve-{place}-{metric.rpartition('/')[2]}"
            sizes = (("half", HALF), ("narrow", NARROW))
            drawn.append(
                {size: curves_plot(values, found.key, label, f"{name}-{size}", px) for size, px in sizes}
            )
    dashes = [" ".join(map(str, dash)) for dash in DASHES]
    legend = [
        {"label": label, "series": i % len(SERIES), "dash": dashes[i % len(DASHES)]}
        for i, label in enumerate(lines)
    ]
    notes = []
    if len(lines) < len(found.lines):
        notes.append(f"{len(found.lines) - len(lines)} more combinations are not drawn; the table has them.")
    if found.left_out:
        notes.append(f"{listed(found.left_out)} change the strength on the way, or have none.")
    return {"key": found.key, "plots": drawn, "legend": legend if len(lines) > 1 else [], "notes": notes}


# -- pictures, layers, settings -----------------------------------------------------------------------------------------


def later_pictures(wall: Wall) -> dict[str, str]:
    """Those pictures that no `<img>` of the page holds itself: the script shows them."""
    shown = {cell.ours for _, cells in wall.rows for cell in cells if cell.first}
    return {name: uri for name, uri in wall.uris.items() if name not in shown}


def heat_metrics(heat: Heat | None) -> str:
    """Which ratio the map shows, in words."""
    if heat is None:
        return ""
    outputs = [metric == OUTPUT for metric in heat.metrics]
    if all(outputs):
        return "of each layer's output to the float layer's, for the same input"
    if not any(outputs):
        return "of each layer's weight; outputs were not measured"
    weights = listed([run.tag for run, output in zip(heat.runs, outputs, strict=True) if not output])
    return f"of each layer's output; of its weight in {weights}"


def settings(records: Sequence[Record]) -> dict[str, Any]:
    """Settings that differ, as rows of values, and those that all share."""
    found = [settings_of(r) for r in records]
    differ = differing(found)
    common = {key: value for key, value in found[0].items() if key not in differ}
    return {
        "differ": [(key, [f.get(key, MISSING) for f in found]) for key in differ],
        "common": sorted(common.items()),
    }


def environments(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts about machines and libraries: values, each with the runs that have it (empty when all do)."""
    known = [run for run in runs if run.record.environment]
    found = [
        flat(run.record.environment) | {"host": str(run.record.status.get("host", MISSING))} for run in known
    ]
    rows = []
    for key in dict.fromkeys(key for facts in found for key in facts):
        values = by_value(known, [facts.get(key, MISSING) for facts in found])
        rows.append(
            (key, [(value, listed(tags) if len(values) > 1 else "") for value, tags in values.items()])
        )
    return rows


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{versions: {torch: 2}}` -> `{versions.torch: 2}`; what is not known is a dash."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": said(value)}
        )
    return found


def said(value: object) -> str:
    """A fact as text."""
    return (
        MISSING
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def commands(runs: Sequence[Run], folder: Path) -> list[tuple[Run, str, str]]:
    """What repeats each run, and the folder that it wrote, told from the page's."""
    found = []
    for run in runs:
        place = os.path.relpath(run.record.folder.absolute(), folder.absolute())
        found.append(
            (run, " ".join(["int8run", *map(shlex.quote, run.record.overrides)]), Path(place).as_posix())
        )
    return found
