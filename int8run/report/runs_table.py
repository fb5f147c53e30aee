"""The report's table of runs: a row per run, a column per metric that at least one run has."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import METRIC_COLUMNS, MetricColumn
from int8run.report.ranking import find_pareto_front, list_speed_quality
from int8run.report.runs import Run


@dataclass(frozen=True)
class TableCell:
    """One metric of one run.

    Args:
        text: as shown.
        value: to sort by; None where it is missing.
        is_best: whether it is the best of a column whose values differ.
    """

    text: str
    value: float | None
    is_best: bool


@dataclass(frozen=True)
class TableRow:
    """One run; `is_on_front` tells whether it is on the Pareto front of speed and PSNR."""

    run: Run
    is_on_front: bool
    cells: list[TableCell]

    @property
    def has_values(self) -> bool:
        """Whether the run has any of the shown metrics."""
        return any(cell.value is not None for cell in self.cells)


@dataclass(frozen=True)
class RunsTable:
    """The columns and, for each run, a cell per column."""

    columns: list[MetricColumn]
    rows: list[TableRow]

    @property
    def has_front(self) -> bool:
        """Whether a run is marked as one of the Pareto front."""
        return any(row.is_on_front for row in self.rows)


def build_runs_table(runs: Sequence[Run]) -> RunsTable:
    """Lay out the metrics of the runs, and mark the best of each column and the Pareto front."""
    columns = choose_columns(runs)
    cells_by_column = [build_column_cells(column, runs) for column in columns]
    front = set(find_pareto_front(list_speed_quality(runs))) if len(runs) > 1 else set()
    rows = [
        TableRow(run=run, is_on_front=index in front, cells=[cells[index] for cells in cells_by_column])
        for index, run in enumerate(runs)
    ]
    return RunsTable(columns, rows)


def choose_columns(runs: Sequence[Run]) -> list[MetricColumn]:
    """The columns that at least one run has a value for; objectives that are not among them come last."""
    known = {column.metric for column in METRIC_COLUMNS}
    objectives = dict.fromkeys(run.record.objective for run in runs if run.record.objective not in known)
    objective_columns = [MetricColumn(name, name, "metrics.objective", direction=0) for name in objectives]
    return [
        column
        for column in (*METRIC_COLUMNS, *objective_columns)
        if any(run.get_metric(column.metric) is not None for run in runs)
    ]


def build_column_cells(column: MetricColumn, runs: Sequence[Run]) -> list[TableCell]:
    """The cells of one column, one per run."""
    values = [run.get_metric(column.metric) for run in runs]
    known = [value for value in values if value is not None]
    decimals = column.choose_decimals(known)
    has_best = column.direction != 0 and len(set(known)) > 1
    best = max(known, key=lambda value: column.direction * value) if has_best else None
    return [
        TableCell(text=column.format(value, decimals), value=value, is_best=has_best and value == best)
        for value in values
    ]
