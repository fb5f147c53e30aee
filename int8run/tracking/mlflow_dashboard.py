"""The dashboard of a sweep in MLflow's page: which runs, columns and charts its link opens with.

MLflow's page is blank until somebody builds charts by hand. What was built can be shared under a name, which
is kept in a tag of the experiment (`mlflow_view_tag.py`). Named views exist since MLflow 3.15. Their content
is not a documented contract, so it is written here only, and tests/browser opens it. A page that does not
understand it says so, and `build_experiment_link` works anyway. Called by `MlflowTracker.share_sweep`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.tracking.mlflow_payload import build_tag_filter
from int8run.tracking.setting_names import find_varying_keys

QUALITY, SPEED, MEMORY = "quality/psnr_db", "speed/step_ms_p50", "memory/denoiser_bytes"
MAIN_METRICS = (QUALITY, SPEED, MEMORY)
SERIES_PREFIX = "series/"
TABLE_METRICS = (
    QUALITY,
    SPEED,
    "speed/ratio_vs_float",
    MEMORY,
    "memory/denoiser_ratio",
    "quality/ssim",
    "quality/masked_psnr_db",
    "quality/unmasked_psnr_db",
    "quality/flicker_err",
    "quality/latent_rel_err",
    "speed/images_per_s",
    "memory/peak_bytes",
    "build/quantize_s",
    "quant/layers_int8",
    "quant/output_sqnr_db_mean",
    "lora/clipped_share",
)

RUN_NAME_COLUMN = "attributes.`Run Name`"
RUN_NAME_PX = 260

MAX_PARAMS = 6  # with three metrics the most axes whose names stay readable
MAX_RUNS = 100
NUMBER_PATTERN = re.compile(r"[-+]?(\d+[.]?\d*|[.]\d+)(e[-+]?\d+)?", re.IGNORECASE)

# of the image grid, in pixels
GRID_WIDTH, GRID_FRAME, MAX_GRID_HEIGHT = 850, 150, 900
MIN_IMAGE_SIDE = 150

# What the page keeps beside the choices of a view.
PAGE_SETTINGS: Mapping[str, Any] = {
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
}

Chart = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A heading with charts below it.

    Args:
        name: the heading.
        charts: as MLflow keeps them, without their section.
        columns: how many charts stand beside each other.
        height: of each chart, in pixels.
        is_open: False for sections that MLflow fills with the charts it adds by itself.
    """

    name: str
    charts: Sequence[Chart]
    columns: int = 1
    height: int = 360
    is_open: bool = True

    def build_layout(self, uuid: str) -> dict[str, Any]:
        """The section as MLflow keeps it, without its charts."""
        return {
            "uuid": uuid,
            "name": self.name,
            "display": self.is_open,
            "columns": self.columns,
            "cardHeight": self.height,
            "isReordered": self.is_open,
            "deleted": False,
            "isGenerated": not self.is_open,
        }


def find_varying_params(params: Iterable[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """The settings that are not the same in all runs, each with its values; None: a run has no such setting.

    A setting of an option (`outlier.block`) is left out where the option (`outlier`) decides its value.

    Args:
        params: the settings of each run.
    """
    runs = list(params)
    found: dict[str, list[str | None]] = {}
    for name in find_varying_keys(runs):
        values = [run.get(name) for run in runs]
        options = [found[option] for option in list_beginnings(name) if option in found]
        if not any(is_decided_by(values, option) for option in options):
            found[name] = values
    return found


def list_beginnings(name: str) -> list[str]:
    """What a setting may belong to: `a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def is_decided_by(values: Sequence[str | None], option: Sequence[str | None]) -> bool:
    """Whether all runs with the same option have the same value."""
    return len(set(zip(option, values, strict=True))) == len(set(option))


def is_plottable(values: Sequence[str | None]) -> bool:
    """Whether MLflow draws every run on an axis of these values.

    It drops runs without a value, and words among numbers.
    """
    if None in values:
        return False
    are_numbers = {bool(NUMBER_PATTERN.fullmatch(value or "")) for value in values}
    return len(are_numbers) == 1


def build_view_state(
    params: Mapping[str, Sequence[str | None]],
    metrics: Iterable[str],
    image_keys: Sequence[str],
    sweep: str | None = None,
) -> dict[str, Any]:
    """What the page shows.

    Args:
        params: the settings that vary (`find_varying_params`); the first six become columns and axes.
        metrics: names of the metrics that the runs have; charts of others are left out.
        image_keys: keys of the images, as logged.
        sweep: show runs with this tag only; None: all runs of the experiment.
    """
    metrics = sorted(set(metrics))
    param_names = list(params)[:MAX_PARAMS]
    layouts, charts = lay_out(build_sections(params, param_names, metrics, image_keys))
    # the name of each column by its key
    columns = {f"params.`{name}`": name for name in param_names}
    columns |= {f"metrics.`{name}`": name for name in TABLE_METRICS if name in metrics}
    column_widths = {column: max(90, 30 + 7 * len(name)) for column, name in columns.items()}
    return {
        "searchFilter": build_tag_filter("sweep", sweep) if sweep else "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,  # the image grid reverses the table's order
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [RUN_NAME_COLUMN, *columns],
        "columnWidths": {RUN_NAME_COLUMN: RUN_NAME_PX, **column_widths},
        **PAGE_SETTINGS,
        "compareRunSections": layouts,
        "compareRunCharts": charts,
    }


def lay_out(sections: Sequence[Section]) -> tuple[list[dict[str, Any]], list[Chart]]:
    """The sections and their charts as MLflow keeps them: in two lists, joined by the sections' ids."""
    layouts: list[dict[str, Any]] = []
    charts: list[Chart] = []
    for section in sections:
        section_id = f"section{len(layouts)}"
        layouts.append(section.build_layout(section_id))
        for chart in section.charts:
            charts.append({"uuid": f"chart{len(charts)}", "metricSectionId": section_id, **chart})
    return layouts, charts


def build_sections(
    params: Mapping[str, Sequence[str | None]],
    param_names: Sequence[str],
    metrics: Sequence[str],
    image_keys: Sequence[str],
) -> list[Section]:
    """The sections that have charts, and closed ones for the charts that MLflow adds by itself.

    Args:
        params: the settings that vary.
        param_names: those of them that may become axes.
        metrics: names of the metrics that the runs have.
        image_keys: keys of the images.
    """
    num_runs = max(map(len, params.values()), default=1)
    main = [name for name in MAIN_METRICS if name in metrics]
    axes = [name for name in param_names if is_plottable(params[name])]
    series = [name for name in metrics if name.startswith(SERIES_PREFIX)]

    sections = []
    if image_keys:
        height = compute_grid_height(len(image_keys), num_runs)
        sections.append(Section("Images: prompts x runs", [build_image_grid(image_keys)], height=height))
    if axes and main:
        chart = build_parallel_chart(axes, main[::-1])
        sections.append(Section("Settings, memory, speed, quality", [chart], height=420))
    if QUALITY in main and len(main) > 1:
        scatter_charts = [build_scatter_chart(name, QUALITY) for name in main[1:]]
        sections.append(Section("Quality against speed and memory", scatter_charts, columns=2))
    if main:
        bar_charts = [build_bar_chart(name) for name in main]
        sections.append(Section("Speed, quality, memory", bar_charts, columns=3))
    if series:
        line_charts = [build_line_chart(name) for name in series]
        sections.append(Section("Step by step", line_charts, columns=2))
    return sections + build_closed_sections(sections, [*image_keys, *metrics])


def build_closed_sections(sections: Sequence[Section], names: Sequence[str]) -> list[Section]:
    """Sections for the charts that the page adds by itself, of what has no chart yet: one by prefix.

    Args:
        sections: that have charts.
        names: of all metrics and images.
    """
    charted = {chart.get("metricKey") for section in sections for chart in section.charts}
    prefixes = dict.fromkeys(name.rpartition("/")[0] for name in names if name not in charted)
    return [Section(prefix, [], is_open=False) for prefix in prefixes if prefix]


def build_chart(chart_type: str, **settings: Any) -> Chart:
    """What every chart has, and the settings of this one."""
    return {
        "type": chart_type,
        "runsCountToCompare": MAX_RUNS,
        "deleted": False,
        "isGenerated": False,
        **settings,
    }


def build_image_grid(keys: Sequence[str]) -> Chart:
    """A row for each key and a column for each run, ten runs at most (MLflow's limit).

    With a single key the runs stand beside each other.
    """
    return build_chart("IMAGE", imageKeys=list(keys), step=0, showRunParams=False)


def compute_grid_height(rows: int, runs: int) -> int:
    """Height of an image grid in pixels: all rows on a screen of usual width, up to its height.

    Images are as wide as the runs leave them room.
    """
    image_side = max(GRID_WIDTH // runs, MIN_IMAGE_SIDE)
    return min(GRID_FRAME + rows * image_side, MAX_GRID_HEIGHT)


def build_parallel_chart(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """A line for each run, across one axis for each setting and metric."""
    return build_chart(
        "PARALLEL", selectedParams=list(params), selectedMetrics=list(metrics), showAllRuns=True
    )


def build_scatter_chart(x: str, y: str) -> Chart:
    """A point for each run."""
    return build_chart("SCATTER", xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def build_bar_chart(metric: str) -> Chart:
    """A bar for each run."""
    return build_chart("BAR", metricKey=metric)


def build_line_chart(metric: str) -> Chart:
    """A line for each run, by step, as measured: without these settings MLflow smooths it."""
    return build_chart(
        "LINE", metricKey=metric, selectedMetricKeys=[metric], lineSmoothness=0, useGlobalLineSmoothing=True
    )
