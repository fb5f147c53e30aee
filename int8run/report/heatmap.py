"""The heat-map of layers: a row per layer, a column per run, the signal-to-noise ratio as a number and a color."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.columns import MISSING
from int8run.report.runs import Run, parse_number

OUTPUT_SQNR, WEIGHT_SQNR = "output_sqnr_db", "weight_sqnr_db"
NUM_COLORS = 10  # colors from the worst layer to the best
MAX_CELLS = 30_000  # more make a browser slow


@dataclass(frozen=True)
class HeatmapCell:
    """One layer of one run.

    Args:
        value: decibels; None for a layer that is float or was not measured.
        level: the color, 0 (worst) to LEVELS - 1; None without a value.
        about: what the layer is, or why it is float.
    """

    text: str
    value: float | None
    color: int | None
    description: str


@dataclass(frozen=True)
class HeatmapRow:
    """One row.

    Args:
        worst: the least value of all runs; infinite when it is float everywhere.
        why: why runs kept it float.
    """

    name: str
    cells: list[HeatmapCell]
    worst_sqnr: float
    float_reasons: str


@dataclass(frozen=True)
class Heatmap:
    """The map, the metric of each column, and the values that the colors span."""

    runs: list[Run]
    metrics: list[str]
    rows: list[HeatmapRow]
    min_sqnr: float
    max_sqnr: float
    left_out: int


def build_heatmap(runs: Sequence[Run], most_cells: int = MAX_CELLS) -> Heatmap | None:
    """None where no run has layers."""
    shown = [run for run in runs if run.record.layers]
    if not shown:
        return None
    found = [{row["name"]: row for row in run.record.layers} for run in shown]
    metrics = [
        OUTPUT_SQNR if any(read_sqnr(row, OUTPUT_SQNR) is not None for row in rows.values()) else WEIGHT_SQNR
        for rows in found
    ]
    values = [
        v
        for rows, metric in zip(found, metrics, strict=True)
        for row in rows.values()
        if (v := read_sqnr(row, metric)) is not None
    ]
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    layers = []
    for name in dict.fromkeys(name for rows in found for name in rows):
        rows = [by_name.get(name) for by_name in found]
        tiles = [build_cell(row, metric, low, high) for row, metric in zip(rows, metrics, strict=True)]
        whys = dict.fromkeys(row["why_not"] for row in rows if row and row.get("why_not"))
        worst = min((t.value for t in tiles if t.value is not None), default=math.inf)
        layers.append(HeatmapRow(name, tiles, worst, "; ".join(whys)))
    most = max(1, most_cells // len(shown))
    if len(layers) > most:
        worst_names = {layer.name for layer in sorted(layers, key=lambda layer: layer.worst_sqnr)[:most]}
        kept = [layer for layer in layers if layer.name in worst_names]
        return Heatmap(shown, metrics, kept, low, high, len(layers) - len(kept))
    return Heatmap(shown, metrics, layers, low, high, 0)


def read_sqnr(row: Mapping[str, str], metric: str) -> float | None:
    """A number of layers.csv: None where it is empty or NaN."""
    text = row.get(metric) or ""
    return math.inf if text == "inf" else parse_number(text)


def build_cell(row: Mapping[str, str] | None, metric: str, low: float, high: float) -> HeatmapCell:
    """One layer of one run, colored by where it stands between the worst and the best."""
    if row is None:
        return HeatmapCell(MISSING, None, None, "this run has no such layer")
    if row.get("quantized") == "false":
        return HeatmapCell("float", None, None, f"kept float: {row.get('why_not') or 'no reason given'}")
    words = [row.get("outlier"), row.get("rounding"), row.get("backend_used")]
    about = ", ".join(word for word in words if word)
    value = read_sqnr(row, metric)
    if value is None:
        return HeatmapCell(MISSING, None, None, f"not measured; {about}")
    share = 1.0 if value >= high or high == low else (value - low) / (high - low)
    return HeatmapCell(
        "equal" if math.isinf(value) else f"{value:.1f}",
        value,
        min(NUM_COLORS - 1, max(0, int(share * NUM_COLORS))),
        about,
    )
