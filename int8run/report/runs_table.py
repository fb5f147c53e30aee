"""The report's table of runs: a row per run, a column per metric that at least one run has.

Called by `html_page`, whose template lays it out. Knows nothing of HTML.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from int8run.metrics.names import HIGH, LOW, METRICS, UNKNOWN
from int8run.report.columns import METRIC_COLUMNS, VAE_PSNR_DB, MetricColumn
from int8run.report.missing_metrics import explain_missing
from int8run.report.ranking import find_fronts, group_comparable
from int8run.report.runs import Run
from int8run.report.step_times import has_scattered_times

SPEED_PREFIX = "speed/"
# Of metrics that depend on the images that are generated.
QUALITY_PREFIXES = ("quality/", "clip/", "quant/", VAE_PSNR_DB)


@dataclass(frozen=True)
class TableCell:
    """One metric of one run.

    Args:
        text: as shown.
        value: to sort by; None where it is missing.
        is_best: whether it is the best of a column whose values differ and can be compared.
        missing_reason: why there is no value.
        spread: half of the width of its interval, `±0.6`, or a lopsided one itself; empty without one.
        interval: both limits, `[54.3, 55.5]`.
    """

    text: str
    value: float | None
    is_best: bool
    missing_reason: str = ""
    spread: str = ""
    interval: str = ""


@dataclass(frozen=True)
class TableRow:
    """One run; `is_on_front` tells whether it is on a Pareto front of speed and PSNR."""

    run: Run
    is_on_front: bool
    cells: list[TableCell]

    @property
    def has_values(self) -> bool:
        """Whether the run has any of the shown metrics."""
        return any(cell.value is not None for cell in self.cells)


@dataclass(frozen=True)
class RunsTable:
    """The columns and, for each run, a cell per column.

    Args:
        columns: those that a run has a value for, and some of them only where values differ.
        rows: one per run.
        has_front: whether a run is marked as one of a Pareto front.
        has_different_images: whether the runs have different float images, so that quality is ranked, if at
            all, among those with the same ones.
        has_scattered_times: whether times of a run scatter, so that no time is the best.
    """

    columns: list[MetricColumn]
    rows: list[TableRow]
    has_front: bool
    has_different_images: bool
    has_scattered_times: bool

    @property
    def has_missing(self) -> bool:
        """Whether a finished run lacks one of the metrics."""
        return any(cell.missing_reason for row in self.rows if row.has_values for cell in row.cells)


def build_runs_table(runs: Sequence[Run]) -> RunsTable:
    """Lay out the metrics of the runs, and mark the best of each column and the Pareto fronts."""
    columns = choose_columns(runs)
    cells_by_column = [build_column_cells(column, runs) for column in columns]
    fronts = find_fronts(runs)
    rows = []
    for index, run in enumerate(runs):
        cells = [cells[index] for cells in cells_by_column]
        rows.append(TableRow(run=run, is_on_front=index in fronts.members, cells=cells))
    return RunsTable(
        columns=columns,
        rows=rows,
        has_front=fronts.count > 0,
        has_different_images=fronts.num_groups > 1,
        has_scattered_times=any(has_scattered_times(run.record.metrics) for run in runs),
    )


def choose_columns(runs: Sequence[Run]) -> list[MetricColumn]:
    """The columns that the values of the runs need; what was asked for and is not among them comes last."""
    objectives = dict.fromkeys(run.record.objective for run in runs)
    needed = []
    for column in list_columns(objectives):
        is_objective = column.metric in objectives
        column = replace(column, needs_difference=column.needs_difference and not is_objective)
        values = [run.get_metric(column.metric) for run in runs]
        if column.is_needed_for(values):
            needed.append(column)
    return needed


def list_columns(names: Iterable[str] = ()) -> list[MetricColumn]:
    """Every column that there is: METRIC_COLUMNS, further ones, and what `metrics.perceptual` adds.

    Args:
        names: of metrics that have a column in any case.
    """
    asked = [name for name, metric in METRICS.items() if metric.measure and name.startswith("quality/")]
    columns = list(METRIC_COLUMNS)
    known = {column.metric for column in columns}
    for name in dict.fromkeys([*names, *asked]):
        if name not in known:
            metric = METRICS.get(name, UNKNOWN)
            heading = ", ".join(filter(None, [metric.label or name, metric.unit]))
            columns.append(MetricColumn(name, heading, metric.description, metric.direction))
    return columns


def build_column_cells(column: MetricColumn, runs: Sequence[Run]) -> list[TableCell]:
    """The cells of one column, one per run."""
    values = [run.get_metric(column.metric) for run in runs]
    decimals = column.choose_decimals([value for value in values if value is not None])
    best = find_best_of_column(column, values, rank_runs(column, runs))
    cells = []
    for index, (run, value) in enumerate(zip(runs, values, strict=True)):
        cell = TableCell(
            text=column.format(value, decimals),
            value=value,
            is_best=index in best,
        )
        cell = add_interval(cell, run, column, decimals)
        if value is None:
            cell = replace(cell, missing_reason=explain_missing(run.record, column.metric))
        cells.append(cell)
    return cells


def add_interval(cell: TableCell, run: Run, column: MetricColumn, decimals: int) -> TableCell:
    """A cell with the interval of its value, where the run has one.

    Args:
        cell: of the value.
        run: its row.
        column: of the metric.
        decimals: of the numbers.
    """
    low, high = run.get_metric(f"{column.metric}{LOW}"), run.get_metric(f"{column.metric}{HIGH}")
    spread = column.format_spread(cell.value, low, high, decimals)
    if not spread:
        return cell
    interval = f"[{column.format(low, decimals)}, {column.format(high, decimals)}]"
    return replace(cell, spread=spread, interval=interval)


def rank_runs(column: MetricColumn, runs: Sequence[Run]) -> Collection[int]:
    """The runs whose values of a metric can be compared.

    None where they have different float images, and no times where those of a run scatter.
    """
    if column.metric.startswith(SPEED_PREFIX) and any(
        has_scattered_times(run.record.metrics) for run in runs
    ):
        return []
    if not column.metric.startswith(QUALITY_PREFIXES):
        return range(len(runs))
    groups = group_comparable(runs)
    return groups[0] if len(groups) == 1 else []


def find_best_of_column(
    column: MetricColumn, values: Sequence[float | None], ranked: Collection[int]
) -> set[int]:
    """The runs that share the best value; empty where all values are the same.

    Args:
        column: says whether more or less is better.
        values: of the runs.
        ranked: the runs whose values can be compared.
    """
    known: dict[int, float] = {}
    for index in ranked:
        value = values[index]
        if value is not None:
            known[index] = value
    if column.direction == 0 or len(set(known.values())) < 2:
        return set()
    best = max(known.values(), key=lambda value: column.direction * value)
    return {index for index, value in known.items() if value == best}
