"""The table that ends a sweep: a line for each job, with as much as the terminal has room for.

Builds a rich table from records; printing is the caller's. `result_table` has that of a single run.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box, get_console
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from int8run.metrics.names import DTYPE_FLOOR, HIGH, LOW, NOISE_FLOOR, STEPS_SKIPPED_SHARE
from int8run.report.columns import (
    ATTENTION_SQNR_DB,
    CACHE_PSNR_DB,
    DENOISER_BYTES,
    INT8_PSNR_DB,
    LATENT_ERROR,
    MACS_INT8_SHARE,
    MISSING,
    PSNR_DB,
    SPEED_RATIO,
    STEP_MS,
    VAE_DECODE_RATIO,
    VAE_PSNR_DB,
    MetricColumn,
    find_column,
)
from int8run.report.console import make_plain
from int8run.report.formatting import shorten_to_width
from int8run.report.missing_metrics import explain_missing
from int8run.tracking.run_record import FINISHED, Record
from int8run.tracking.setting_names import shorten_keys, split_override
from int8run.utils.text import make_visible

# Shown as in the report. The most important first: a narrow terminal has room for some of them.
SWEEP_METRICS = (
    PSNR_DB,
    SPEED_RATIO,
    STEP_MS,
    # jobs have these where they ask for a step cache, a noise floor, an INT8 VAE or INT8 attention
    STEPS_SKIPPED_SHARE,
    CACHE_PSNR_DB,
    INT8_PSNR_DB,
    NOISE_FLOOR,
    DTYPE_FLOOR,
    VAE_PSNR_DB,
    VAE_DECODE_RATIO,
    ATTENTION_SQNR_DB,
    DENOISER_BYTES,
    LATENT_ERROR,
    MACS_INT8_SHARE,
)
COLUMN_GAP = 3  # characters between two columns, as rich draws them
MAX_SETTING_WIDTH = 40  # characters; a longer value is shortened in its middle
MIN_SETTING_WIDTH = 6  # a setting that would be shortened further has no column


@dataclass(frozen=True)
class TextColumn:
    """One column of a table as text.

    Args:
        title: its head; it may be broken between words.
        cells: of every row.
        is_number: whether it stands to the right and is never shortened.
        style: of its cells.
    """

    title: str
    cells: Sequence[str]
    is_number: bool = False
    style: str = ""

    @property
    def width(self) -> int:
        """That of its widest cell, and of the longest word of its head."""
        return max(map(cell_len, [*self.cells, *self.title.split()]), default=0)

    def shorten(self, max_width: int) -> "TextColumn":
        """The same column with its texts shortened to a width."""
        cells = [shorten_to_width(cell, max_width) for cell in self.cells]
        return replace(self, title=shorten_to_width(self.title, max_width), cells=cells)


def build_sweep_table(records: Sequence[Record], varying: Sequence[str]) -> Table:
    """The jobs of a sweep, a line each, with as much as the terminal has room for.

    The number of a job is always shown, and so are the first metric and, where not all jobs are finished, its
    state. Metrics are shown whole or not at all; settings share what room there is, and those without room
    are named below the table.

    Args:
        records: of the jobs.
        varying: the settings that differ between them, by their names on the command line.
    """
    width = get_console().width
    number = TextColumn("job", [str(record.number) for record in records], is_number=True)
    states = list_states(records)
    metrics = build_metric_columns(records, has_spread=True)
    settings = build_setting_columns(records, varying)

    fixed = [number, *states]
    if measure_columns([*fixed, *settings, *metrics]) > width:
        metrics = build_metric_columns(records, has_spread=False)
    while len(metrics) > 1 and measure_columns([*fixed, *settings, *metrics]) > width:
        metrics.pop()
    room = width - measure_columns([*fixed, *metrics])
    shown, left_out = fit_settings(settings, room)
    notes = [*describe_left_out(left_out), *explain_empty_cells(records, num_metrics=len(metrics))]
    return build_text_table([number, *shown, *metrics, *states], caption="\n".join(notes))


def build_metric_columns(records: Sequence[Record], *, has_spread: bool) -> list[TextColumn]:
    """A column for each metric that a job has, headed and written as in the report.

    Args:
        records: of the jobs.
        has_spread: whether numbers have their intervals behind them: `54.9 ±0.6`.
    """
    columns = []
    for metric in list_shared_metrics(records):
        values = [get_number(record, metric) for record in records]
        column = find_column(metric)
        decimals = column.choose_decimals([value for value in values if value is not None])
        cells = [column.format(value, decimals) for value in values]
        if has_spread:
            spreads = [format_spread(record, column, decimals) for record in records]
            cells = [f"{cell} {spread}".rstrip() for cell, spread in zip(cells, spreads, strict=True)]
        columns.append(TextColumn(column.heading, cells, is_number=True))
    return columns


def format_spread(record: Record, column: MetricColumn, decimals: int) -> str:
    """The interval that a job's metric has, as `±0.6` or in brackets; empty without one.

    Args:
        record: of the job.
        column: of the metric.
        decimals: of the numbers.
    """
    value = get_number(record, column.metric)
    low = get_number(record, f"{column.metric}{LOW}")
    high = get_number(record, f"{column.metric}{HIGH}")
    return column.format_spread(value, low, high, decimals)


def get_number(record: Record, metric: str) -> float | None:
    """A metric of a job; None where it is missing or NaN."""
    value = record.metrics.get(metric)
    if value is None or math.isnan(value):
        return None
    return value


def list_states(records: Sequence[Record]) -> list[TextColumn]:
    """The column of states; none where all jobs are finished."""
    states = ["" if record.state == FINISHED else record.state for record in records]
    return [TextColumn("", states, style="red")] if any(states) else []


def build_setting_columns(records: Sequence[Record], varying: Sequence[str]) -> list[TextColumn]:
    """A column for each setting, headed by the shortest name that no other one has."""
    settings = [dict(map(split_override, record.overrides)) for record in records]
    columns = []
    for key, title in shorten_keys(varying).items():
        cells = [make_visible(values.get(key, "")) for values in settings]
        column = TextColumn(make_visible(title), cells, style="bold")
        columns.append(column.shorten(MAX_SETTING_WIDTH))
    return columns


def fit_settings(columns: Sequence[TextColumn], room: int) -> tuple[list[TextColumn], list[TextColumn]]:
    """Settings that share some room: the widest are shortened first, to the same width.

    Args:
        columns: the settings.
        room: in characters.

    Returns:
        The columns with room, and those without any.
    """
    num_shown = 0
    least_room = 0
    for column in columns:
        least_room += column.shorten(MIN_SETTING_WIDTH).width + COLUMN_GAP
        if least_room > room:
            break
        num_shown += 1
    shown, left_out = columns[:num_shown], columns[num_shown:]

    limit = choose_width_limit([column.width for column in shown], room - COLUMN_GAP * num_shown)
    return [column.shorten(limit) for column in shown], list(left_out)


def choose_width_limit(widths: Sequence[int], room: int) -> int:
    """The width to which settings are shortened, so that all of them have room together.

    Args:
        widths: of the columns, in characters.
        room: for their texts, in characters.
    """
    limit = MAX_SETTING_WIDTH
    while limit > MIN_SETTING_WIDTH and sum(min(width, limit) for width in widths) > room:
        limit -= 1
    return limit


def describe_left_out(columns: Sequence[TextColumn]) -> list[str]:
    """What a narrow table says below it; empty where nothing is left out."""
    if not columns:
        return []
    names = ", ".join(column.title for column in columns)
    shown = "shows it" if len(columns) == 1 else "shows them"
    return [f"no room for {names}; a wider terminal or the report {shown}"]


def explain_empty_cells(records: Sequence[Record], num_metrics: int) -> list[str]:
    """Why finished jobs lack a metric that others have, a line for each reason.

    Args:
        records: of the jobs. Of one that is not finished the state says why.
        num_metrics: how many columns of metrics are shown.
    """
    numbers_by_reason: dict[str, dict[int, None]] = {}
    for metric in list_shared_metrics(records)[:num_metrics]:
        for record in records:
            if record.state == FINISHED and get_number(record, metric) is None:
                reason = explain_missing(record, metric)
                numbers_by_reason.setdefault(reason, {})[record.number] = None
    lines = []
    for reason, numbers in numbers_by_reason.items():
        jobs = "job" if len(numbers) == 1 else "jobs"
        lines.append(f"{MISSING} in {jobs} {', '.join(map(str, numbers))}: {reason}")
    return lines


def list_shared_metrics(records: Sequence[Record]) -> list[str]:
    """The metrics of the table whose columns the jobs need."""
    shared = []
    for metric in SWEEP_METRICS:
        values = [get_number(record, metric) for record in records]
        if find_column(metric).is_needed_for(values):
            shared.append(metric)
    return shared


def measure_columns(columns: Sequence[TextColumn]) -> int:
    """The width of a table of these columns."""
    return sum(column.width for column in columns) + COLUMN_GAP * max(0, len(columns) - 1)


def build_text_table(columns: Sequence[TextColumn], caption: str) -> Table:
    """A table of columns that have the width they need."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    table.caption = caption or None
    for column in columns:
        header = Text(column.title)
        if column.is_number:
            table.add_column(header, style=column.style, justify="right", min_width=column.width)
        else:
            table.add_column(header, style=column.style, width=column.width)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(make_plain, cells))
    return table


def count_warnings(records: Sequence[Record]) -> list[str]:
    """Each warning of some jobs once, with the number of jobs that gave it."""
    counts = Counter(warning for record in records for warning in dict.fromkeys(record.warnings))
    if len(records) == 1:
        return list(counts)
    return [f"{warning} ({count} of {len(records)} jobs)" for warning, count in counts.items()]
