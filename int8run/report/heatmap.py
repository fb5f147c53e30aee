"""The heatmap of layers: a row per layer, a column per run, signal-to-noise ratios as numbers and colors.

Read from each run's layers.csv. The page turns it into a table; this module knows nothing of HTML.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.columns import MISSING
from int8run.report.runs import Run, parse_number

OUTPUT_SQNR, WEIGHT_SQNR = "output_sqnr_db", "weight_sqnr_db"
NUM_COLORS = 10  # from the worst layer to the best
MAX_CELLS = 30_000  # more make a browser slow


@dataclass(frozen=True)
class HeatmapCell:
    """One layer of one run.

    Args:
        text: as shown.
        description: what the layer is, or why it is float.
        value: in dB; None for a layer that is float or was not measured.
        color: 0 (worst) to NUM_COLORS - 1 (best); None without a value.
    """

    text: str
    description: str
    value: float | None = None
    color: int | None = None


@dataclass(frozen=True)
class HeatmapRow:
    """One layer in all runs.

    Args:
        name: of the layer.
        cells: one per run.
        worst_sqnr: the smallest value of all runs, in dB; infinite when no run has a value.
        float_reasons: why runs kept the layer float.
    """

    name: str
    cells: list[HeatmapCell]
    worst_sqnr: float
    float_reasons: str

    @property
    def is_float(self) -> bool:
        """Whether the layer is float in all runs, as far as is known."""
        return math.isinf(self.worst_sqnr) and bool(self.float_reasons)


@dataclass(frozen=True)
class Heatmap:
    """The layers of all runs that have some.

    Args:
        runs: one column each.
        metrics: OUTPUT_SQNR or WEIGHT_SQNR for each run.
        rows: in the order of the model.
        min_sqnr, max_sqnr: the values in dB that the colors span.
        num_left_out: layers that are not shown because there would be too many cells.
    """

    runs: list[Run]
    metrics: list[str]
    rows: list[HeatmapRow]
    min_sqnr: float
    max_sqnr: float
    num_left_out: int


def build_heatmap(runs: Sequence[Run], max_cells: int = MAX_CELLS) -> Heatmap | None:
    """The heatmap of the runs; None where no run has layers.

    Args:
        runs: all runs of the report.
        max_cells: where there are more, the layers with the worst values are kept.
    """
    with_layers = [run for run in runs if run.record.layers]
    if not with_layers:
        return None

    metrics = [choose_metric(run.record.layers) for run in with_layers]
    low, high = find_range(with_layers, metrics)

    layers_of_runs = []  # of each run its layers by name
    names: dict[str, None] = {}  # of the layers of all runs, in the order of the model
    for run in with_layers:
        layer_by_name = {layer["name"]: layer for layer in run.record.layers}
        layers_of_runs.append(layer_by_name)
        names |= dict.fromkeys(layer_by_name)

    rows = []
    for name in names:
        layers = [layer_by_name.get(name) for layer_by_name in layers_of_runs]
        cells = []
        for layer, metric in zip(layers, metrics, strict=True):
            cells.append(build_cell(layer, metric, low=low, high=high))
        rows.append(build_row(name, cells, layers))

    max_rows = max(1, max_cells // len(with_layers))
    kept = keep_worst_rows(rows, max_rows)
    return Heatmap(
        runs=with_layers,
        metrics=metrics,
        rows=kept,
        min_sqnr=low,
        max_sqnr=high,
        num_left_out=len(rows) - len(kept),
    )


def choose_metric(layers: Sequence[Mapping[str, str]]) -> str:
    """The ratio of the layers' outputs where it was measured, else that of their weights."""
    has_outputs = any(read_sqnr(layer, OUTPUT_SQNR) is not None for layer in layers)
    return OUTPUT_SQNR if has_outputs else WEIGHT_SQNR


def find_range(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[float, float]:
    """The smallest and the largest finite value of all runs, in dB."""
    finite = []
    for run, metric in zip(runs, metrics, strict=True):
        for layer in run.record.layers:
            value = read_sqnr(layer, metric)
            if value is not None and math.isfinite(value):
                finite.append(value)
    return min(finite, default=0.0), max(finite, default=0.0)


def keep_worst_rows(rows: Sequence[HeatmapRow], max_rows: int) -> list[HeatmapRow]:
    """At most `max_rows` rows: those with the worst values, in their order."""
    worst = sorted(rows, key=lambda row: row.worst_sqnr)[:max_rows]
    names = {row.name for row in worst}
    return [row for row in rows if row.name in names]


def read_sqnr(layer: Mapping[str, str], metric: str) -> float | None:
    """A ratio in a row of layers.csv; None where it is empty or NaN."""
    text = layer.get(metric) or ""
    return math.inf if text == "inf" else parse_number(text)


def build_row(name: str, cells: list[HeatmapCell], layers: Sequence[Mapping[str, str] | None]) -> HeatmapRow:
    """A layer's cells with what is worst among them and why it is float."""
    worst_sqnr = min((cell.value for cell in cells if cell.value is not None), default=math.inf)
    reasons: dict[str, None] = {}
    for layer in layers:
        if layer is not None and layer.get("why_not"):
            reasons[layer["why_not"]] = None
    return HeatmapRow(name=name, cells=cells, worst_sqnr=worst_sqnr, float_reasons="; ".join(reasons))


def build_cell(layer: Mapping[str, str] | None, metric: str, *, low: float, high: float) -> HeatmapCell:
    """One layer of one run, colored by where its value lies between the worst and the best.

    Args:
        layer: its row in layers.csv; None where the run has no such layer.
        metric: which ratio to show.
        low: the value in dB that has the first color.
        high: that of the last color.
    """
    if layer is None:
        return HeatmapCell(MISSING, "this run has no such layer")
    if layer.get("quantized") == "false":
        return HeatmapCell("float", f"kept float: {layer.get('why_not') or 'no reason given'}")

    methods = [layer.get(column) for column in ("outlier", "rounding", "backend_used")]
    description = ", ".join(method for method in methods if method)
    value = read_sqnr(layer, metric)
    if value is None:
        return HeatmapCell(MISSING, f"not measured; {description}")

    text = "equal" if math.isinf(value) else f"{value:.1f}"
    return HeatmapCell(
        text=text,
        description=description,
        value=value,
        color=choose_color(value, low=low, high=high),
    )


def choose_color(value: float, *, low: float, high: float) -> int:
    """The color of a value: 0 at `low`, NUM_COLORS - 1 at `high` and above."""
    if value >= high or high == low:
        return NUM_COLORS - 1
    share = (value - low) / (high - low)
    return min(NUM_COLORS - 1, max(0, int(share * NUM_COLORS)))
