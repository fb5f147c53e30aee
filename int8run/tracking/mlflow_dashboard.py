"""The view of a sweep in MLflow's page: which runs, columns and charts its link opens with.

MLflow's page is blank until somebody builds charts by hand. What was built can be shared under a name, kept in a tag of the experiment:
this module writes such a tag. Named views exist since MLflow 3.15, and what is inside is no documented contract, so it is written here
only, and tests/browser opens it. A page that does not understand it says so, and `plain_link` works.
"""

import base64
import json
import re
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_TAG_LENGTH = 5000  # characters; this MLflow takes 20,000, older servers no more
QUALITY, SPEED, MEMORY = "quality/psnr_db", "speed/step_ms_p50", "memory/denoiser_bytes"
TABLE_METRICS = (
    QUALITY,
    SPEED,
    "speed/ratio_vs_float",
    MEMORY,
    "memory/denoiser_ratio",
    "quality/ssim",
    "quality/latent_rel_err",
    "speed/images_per_s",
    "memory/peak_bytes",
    "build/quantize_s",
    "quant/layers_int8",
    "quant/output_sqnr_db_mean",
    "lora/clipped_share",
)
SERIES_PREFIX = "series/"
RUN_NAME_COLUMN = "attributes.`Run Name`"
NUMBER_PATTERN = re.compile(r"[-+]?(\d+[.]?\d*|[.]\d+)(e[-+]?\d+)?", re.IGNORECASE)
MAX_PARAMS = 6  # with three metrics the most axes whose names stay readable
MAX_RUNS = 100
GRID_PX, SMALLEST_PX, GRID_FRAME_PX, TALLEST_PX = 850, 150, 150, 900  # of the grid of pictures


def find_varying_params(params: Iterable[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """Settings that are not the same in all runs, each with its values; None: a run has no such setting.

    A setting of an option (`outlier.block`) that the option (`outlier`) decides is left out.
    """
    runs = list(params)
    found: dict[str, list[str | None]] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run.get(name) for run in runs]
        owners = [owner for owner in found if name.startswith(f"{owner}.")]
        decided = any(
            len(set(zip(found[owner], values, strict=True))) == len(set(found[owner])) for owner in owners
        )
        if len(set(values)) > 1 and not decided:
            found[name] = values
    return found


def is_plottable(values: Iterable[str | None]) -> bool:
    """Whether MLflow draws every run on an axis of these values: it drops those without one, and words among numbers."""
    return None not in values and len({bool(NUMBER_PATTERN.fullmatch(value or "")) for value in values}) == 1


def build_view_state(
    params: Mapping[str, Sequence[str | None]],
    metrics: Iterable[str],
    image_keys: Sequence[str],
    sweep: str | None = None,
) -> dict[str, Any]:
    """What the page shows.

    Args:
        params: the settings that vary (`varying`); the first six become columns and axes.
        metrics: names of the metrics that the runs have; charts of others are left out.
        image_keys: keys of the pictures, as logged.
        sweep: show runs with this tag only; None: all runs of the experiment.
    """
    metrics, image_keys, names = sorted(set(metrics)), list(image_keys), list(params)[:MAX_PARAMS]
    runs = max(map(len, params.values()), default=1)
    main = [name for name in (QUALITY, SPEED, MEMORY) if name in metrics]
    axes = [name for name in names if is_plottable(params[name])]
    sections = [
        build_section(
            "Pictures: prompts x runs",
            [build_image_grid(image_keys)] if image_keys else [],
            height=compute_grid_height(len(image_keys), runs),
        ),
        build_section(
            "Settings, memory, speed, quality",
            [build_parallel_chart(axes, main[::-1])] if axes and main else [],
            height=420,
        ),
        build_section(
            "Quality against speed and memory",
            [build_scatter_chart(name, QUALITY) for name in main[1:]] if QUALITY in main else [],
            columns=2,
        ),
        build_section("Speed, quality, memory", [build_bar_chart(name) for name in main], columns=3),
        build_section(
            "Step by step",
            [build_line_chart(name) for name in metrics if name.startswith(SERIES_PREFIX)],
            columns=2,
        ),
    ]
    sections = [part for part in sections if part["charts"]]
    # the page adds a chart for every other metric and each picture alone: into these, one by prefix, closed
    drawn = {card.get("metricKey") for part in sections for card in part["charts"]}
    others = dict.fromkeys(name.rpartition("/")[0] for name in [*image_keys, *metrics] if name not in drawn)
    sections += [build_section(prefix, [], open=False) for prefix in others if prefix]
    columns = {f"params.`{name}`": name for name in names} | {
        f"metrics.`{name}`": name for name in TABLE_METRICS if name in metrics
    }
    layouts = [{"uuid": f"section{n}", **part["layout"]} for n, part in enumerate(sections)]
    cards = [
        {"metricSectionId": f"section{n}", **card}
        for n, part in enumerate(sections)
        for card in part["charts"]
    ]
    return {
        "searchFilter": f"tags.sweep = '{sweep}'" if sweep else "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,  # the grid of pictures turns the table's order round
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [RUN_NAME_COLUMN, *columns],
        "columnWidths": {RUN_NAME_COLUMN: 260}
        | {column: max(90, 30 + 7 * len(name)) for column, name in columns.items()},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": layouts,
        "compareRunCharts": [{"uuid": f"chart{n}", **card} for n, card in enumerate(cards)],
    }


def build_section(
    name: str, charts: Sequence[Mapping[str, Any]], columns: int = 1, height: int = 360, open: bool = True
) -> dict[str, Any]:
    """A heading with charts below it, each `height` pixels high."""
    layout = {"name": name, "display": open, "columns": columns, "cardHeight": height}
    return {
        "layout": {**layout, "isReordered": open, "deleted": False, "isGenerated": not open},
        "charts": charts,
    }


def build_chart(kind: str, **settings: Any) -> dict[str, Any]:
    """What every chart has."""
    return {"type": kind, "runsCountToCompare": MAX_RUNS, "deleted": False, "isGenerated": False, **settings}


def build_image_grid(keys: Sequence[str]) -> dict[str, Any]:
    """A row for each key and a column for each run, ten runs at most (MLflow's limit). With a single key the runs stand side by side."""
    return build_chart("IMAGE", imageKeys=list(keys), step=0, showRunParams=False)


def compute_grid_height(rows: int, runs: int) -> int:
    """Pixels that show all rows on a screen of usual width, up to its height. Pictures are as wide as the runs leave them room."""
    return min(GRID_FRAME_PX + rows * max(GRID_PX // runs, SMALLEST_PX), TALLEST_PX)


def build_parallel_chart(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """A line for each run, across one axis for each setting and metric."""
    return build_chart(
        "PARALLEL", selectedParams=list(params), selectedMetrics=list(metrics), showAllRuns=True
    )


def build_scatter_chart(x: str, y: str) -> dict[str, Any]:
    """A point for each run."""
    return build_chart("SCATTER", xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def build_bar_chart(metric: str) -> dict[str, Any]:
    """A bar for each run."""
    return build_chart("BAR", metricKey=metric)


def build_line_chart(metric: str) -> dict[str, Any]:
    """A line for each run, by step, as measured: without these words MLflow smooths it."""
    return build_chart(
        "LINE", metricKey=metric, selectedMetricKeys=[metric], lineSmoothness=0, useGlobalLineSmoothing=True
    )


def encode_view(state: Mapping[str, Any], name: str) -> tuple[str, int]:
    """The tag's value.

    Returns:
        at most LONGEST_TAG characters, and how many picture keys were left out, from the end, to get there.
    """
    now = int(time.time() * 1000)
    keys = count_grid_images(state)
    for kept in range(keys, -1, -1):
        text = json.dumps(limit_images(state, kept), separators=(",", ":"))
        packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        value = json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": packed})
        if len(value) <= MAX_TAG_LENGTH:
            break
    return value, keys - kept


def count_grid_images(state: Mapping[str, Any]) -> int:
    """Rows of the picture grid."""
    return max((len(c["imageKeys"]) for c in state["compareRunCharts"] if c["type"] == "IMAGE"), default=0)


def limit_images(state: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """The state with the first `kept` picture keys."""
    cards = [
        {**c, "imageKeys": c["imageKeys"][:kept]} if c["type"] == "IMAGE" else c
        for c in state["compareRunCharts"]
    ]
    return {**state, "compareRunCharts": [c for c in cards if c.get("imageKeys") != []]}


def decode_view(value: str) -> dict[str, Any]:
    """The state in a tag's value, as MLflow's page reads it."""
    packed = json.loads(value)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def write_view(client: "MlflowClient", experiment_id: str, key: str, state: Mapping[str, Any]) -> int:
    """Keep a view in an experiment, in place of one with the same key.

    Args:
        key: the view's name, also in its link: a sweep's identity.

    Returns:
        how many picture keys were left out because the view would have been too long.
    """
    value, left_out = encode_view(state, key)
    client.set_experiment_tag(experiment_id, VIEW_TAG_PREFIX + key, value)
    return left_out


def build_view_link(address: str, experiment_id: str, key: str, charts: bool = True) -> str:
    """The page that opens with a view: its charts, or its table."""
    mode = "CHART" if charts else "TABLE"
    return f"{build_experiment_link(address, experiment_id)}&viewStateShareKey={quote(key, safe='')}&compareRunsMode={mode}"


def build_experiment_link(address: str, experiment_id: str) -> str:
    """The page of an experiment, without a view.

    Args:
        address: of the MLflow server.
    """
    # without the type of workflow the page may open on its side for language models, which has no metrics
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
