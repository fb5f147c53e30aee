"""The table of runs as Markdown, LaTeX or CSV, for papers, issues and spreadsheets.

`tasks.report` calls `render_table`. The HTML page has a table of its own; both show the same columns.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from int8run.metrics.names import HIGH, LOW, SCATTERS
from int8run.report.columns import STEP_MS, MetricColumn
from int8run.report.markdown import escape_markdown, join_markdown_row
from int8run.report.runs import Run
from int8run.report.runs_table import RunsTable, TableCell, build_runs_table
from int8run.report.step_times import has_scattered_times
from int8run.report.verdict import recommend
from int8run.report.verdict_warnings import describe_scattered
from int8run.tracking.run_record import FINISHED
from int8run.tracking.setting_names import shorten_keys, shorten_value
from int8run.utils.text import make_visible

FORMULA_STARTS = ("=", "+", "-", "@")  # of a cell of a spreadsheet
INTERVAL_NOTE = "In brackets: the interval of the mean over the run's samples."
LATEX_TEXTS: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
}


@dataclass(frozen=True)
class ExportCell:
    """A cell as text, and whether it is the best of its column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class ExportTable:
    """A table to be written in some format.

    Args:
        title: above it.
        verdict: which setting to use, in a sentence.
        headings: of the columns.
        num_text_columns: how many columns, from the left, hold no numbers.
        rows: cells, one for each heading.
        notes: below it: what is in brackets, and which speeds say little.
    """

    title: str
    verdict: str
    headings: Sequence[str]
    num_text_columns: int
    rows: Sequence[Sequence[ExportCell]]
    notes: Sequence[str]


def render_table(runs: Sequence[Run], title: str, table_format: str) -> str:
    """The table of runs as the text of a file.

    Args:
        runs: in their order.
        title: of the report.
        table_format: `markdown`, `latex` or `csv`; the last one has plain numbers by the metrics' names.
    """
    table = build_runs_table(runs)
    if table_format == "csv":
        return render_csv(runs, table.columns)
    renderers: Mapping[str, Callable[[ExportTable], str]] = {
        "markdown": render_markdown,
        "latex": render_latex,
    }
    return renderers[table_format](build_export_table(runs, table, title))


def build_export_table(runs: Sequence[Run], table: RunsTable, title: str) -> ExportTable:
    """The table of runs as plain cells: its settings, metrics with intervals, and states that are unusual.

    Args:
        runs: in their order.
        table: of them.
        title: of the report.
    """
    short_keys = shorten_keys(list(runs[0].varied_settings))
    has_states = any(run.record.state != FINISHED for run in runs)
    text_headings = ["run", *short_keys.values()]
    if has_states:
        text_headings.append("state")
    metric_headings = [" ".join(column.heading.split()) for column in table.columns]

    rows = []
    for row in table.rows:
        cells = [ExportCell(row.run.tag)]
        cells += [ExportCell(shorten_value(value)) for value in row.run.varied_settings.values()]
        if has_states:
            cells.append(ExportCell(row.run.record.state.lower()))
        cells += [export_cell(cell) for cell in row.cells]
        rows.append(cells)
    return ExportTable(
        title=title,
        verdict=recommend(runs).verdict,
        headings=[*text_headings, *metric_headings],
        num_text_columns=len(text_headings),
        rows=rows,
        notes=list_notes(runs, table),
    )


def list_notes(runs: Sequence[Run], table: RunsTable) -> list[str]:
    """What a reader has to know of the numbers.

    Args:
        runs: in their order.
        table: of them.
    """
    notes = []
    if any(cell.interval for row in table.rows for cell in row.cells):
        notes.append(INTERVAL_NOTE)
    scattered_tags = [run.tag for run in runs if has_scattered_times(run.record.metrics)]
    if scattered_tags:
        notes.append(describe_scattered(scattered_tags))
    return notes


def export_cell(cell: TableCell) -> ExportCell:
    """A number with its interval: `54.1 [53.2, 55.0]`."""
    return ExportCell(f"{cell.text} {cell.interval}".rstrip(), cell.is_best)


def get_interval(run: Run, metric: str) -> tuple[float, float] | None:
    """The interval of a metric; None where the run has none, or an end of it is not a number."""
    low, high = run.get_metric(metric + LOW), run.get_metric(metric + HIGH)
    if low is None or high is None:
        return None
    return low, high


# -- formats -------------------------------------------------------------------------------------------------


def render_markdown(table: ExportTable) -> str:
    """A heading, the verdict and a table as GitHub reads them; the best of a column is bold."""
    lines = [f"# {escape_markdown(table.title)}", "", escape_markdown(table.verdict), ""]
    lines.append(join_markdown_row([escape_markdown(heading) for heading in table.headings]))
    num_numbers = len(table.headings) - table.num_text_columns
    lines.append(join_markdown_row(["---"] * table.num_text_columns + ["---:"] * num_numbers))
    for row in table.rows:
        texts = []
        for cell in row:
            text = escape_markdown(cell.text)
            texts.append(f"**{text}**" if cell.is_best else text)
        lines.append(join_markdown_row(texts))
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join(lines) + "\n"


def render_latex(table: ExportTable) -> str:
    """A `tabular` with the rules of the package booktabs; the best of a column is bold."""
    num_numbers = len(table.headings) - table.num_text_columns
    columns = "l" * table.num_text_columns + "r" * num_numbers
    comment = make_visible(table.title).replace("%", "")
    lines = [
        f"% {comment}",
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        join_latex_row([escape_latex(heading) for heading in table.headings]),
        r"\midrule",
    ]
    for row in table.rows:
        texts = []
        for cell in row:
            text = escape_latex(cell.text)
            texts.append(rf"\textbf{{{text}}}" if cell.is_best else text)
        lines.append(join_latex_row(texts))
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {make_visible(note)}" for note in table.notes]
    return "\n".join(lines) + "\n"


def join_latex_row(texts: Sequence[str]) -> str:
    """A line of a LaTeX table.

    An empty group keeps a `[` or a star at its beginning from being read as an argument of the line before.
    """
    line = " & ".join(texts)
    if line.startswith(("[", "*")):
        line = f"{{}}{line}"
    return rf"{line} \\"


def escape_latex(text: str) -> str:
    """A text in one line that LaTeX sets as it is."""
    return "".join(LATEX_TEXTS.get(letter, letter) for letter in make_visible(text))


def render_csv(runs: Sequence[Run], columns: Sequence[MetricColumn]) -> str:
    """A line for each run: settings by their keys, metrics as plain numbers by their names, with intervals.

    Args:
        runs: in their order.
        columns: the metrics.
    """
    names = []
    for column in columns:
        names.append(column.metric)
        if any(get_interval(run, column.metric) for run in runs):
            names += [column.metric + LOW, column.metric + HIGH]
    has_times = any(STEP_MS in run.record.metrics for run in runs)
    if has_times:
        names.append(SCATTERS)
    keys = list(runs[0].varied_settings)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", *map(show_in_spreadsheet, keys), "state", *names])
    for run in runs:
        settings = [show_in_spreadsheet(value) for value in run.varied_settings.values()]
        numbers = [format_plain(get_exported(run, name)) for name in names]
        writer.writerow([run.tag, *settings, run.record.state.lower(), *numbers])
    return buffer.getvalue()


def get_exported(run: Run, name: str) -> float | None:
    """A number of a run; whether its times scatter is also known of runs that did not write it down."""
    if name == SCATTERS and STEP_MS in run.record.metrics:
        return float(has_scattered_times(run.record.metrics))
    return run.get_metric(name)


def show_in_spreadsheet(text: str) -> str:
    """A text in one line, with a quote before it where a spreadsheet would compute it; numbers stay."""
    shown = make_visible(text)
    if not shown.startswith(FORMULA_STARTS) or is_number(shown):
        return shown
    return f"'{shown}"


def is_number(text: str) -> bool:
    """Whether a text is a plain number, such as a negative strength."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def format_plain(value: float | None) -> str:
    """A number that programs read: empty where it is missing, `inf` for identical images."""
    if value is None:
        return ""
    return f"{value:.10g}" if math.isfinite(value) else str(value)
