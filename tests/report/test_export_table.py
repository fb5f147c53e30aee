"""The table of runs as Markdown, LaTeX and CSV: the same numbers, intervals, and no cell that breaks."""

import csv
import io
import math
import re

import pytest
from report.run_folders import make_metrics, write_run, write_runs

from int8run.report.columns import PSNR_DB
from int8run.report.export_table import escape_latex, render_table
from int8run.report.markdown import escape_markdown
from int8run.report.runs import name_runs
from int8run.tracking.run_record import find_records

INTERVAL = {f"{PSNR_DB}_low": 48.0, f"{PSNR_DB}_high": 52.5}


@pytest.fixture
def runs(tmp_path):
    """Two finished runs, the first with an interval."""
    return write_runs(tmp_path, [make_metrics(psnr=50.0) | INTERVAL, make_metrics(8.0, 2.5, psnr=math.inf)])


def read_rows(text):
    """The cells of the lines of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines]


def test_markdown_has_a_row_for_each_run_with_intervals_and_the_best_in_bold(runs):
    text = render_table(runs, "a sweep", "markdown")

    heading, rule, first, second = read_rows(text)
    assert len({len(heading), len(rule), len(first), len(second)}) == 1
    column = heading.index("PSNR dB")
    assert first[column] == r"50.0 \[48.0, 52.5\]"
    assert second[column] == "**equal**"
    assert text.startswith("# a sweep\n") and "In brackets" in text


def test_latex_has_as_many_cells_in_each_row_as_columns(runs):
    text = render_table(runs, "a sweep", "latex")

    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert {line.count(" & ") + 1 for line in rows} == {len(columns)}
    assert "50.0 [48.0, 52.5]" in text and r"\textbf{equal}" in text and r"2.50$\times$" in text


def test_csv_has_plain_numbers_by_the_names_of_the_metrics(runs):
    first, second = csv.DictReader(io.StringIO(render_table(runs, "a sweep", "csv")))

    assert first["outlier"] == "none" and second["run"] == "#1"
    assert float(first[PSNR_DB]) == 50.0 and float(second[PSNR_DB]) == math.inf
    assert float(first[f"{PSNR_DB}_low"]) == 48.0 and second[f"{PSNR_DB}_low"] == ""


def test_settings_of_users_stay_in_their_cells(tmp_path):
    for number, prompt in enumerate(["a | b", "line\nbreak & 50 % _x_ \\end{tabular}"]):
        write_run(tmp_path, number, [f"prompts.prompts={prompt}"], metrics=make_metrics())
    runs = name_runs(find_records(tmp_path))

    rows = read_rows(render_table(runs, "t | <b>", "markdown"))
    latex = render_table(runs, "t % \n x", "latex")

    assert {len(row) for row in rows} == {len(rows[0])}
    assert latex.count(r"\end{tabular}") == 1
    assert latex.splitlines()[0] == r"% t  \n x"


def test_the_state_of_runs_that_did_not_finish_is_shown(tmp_path):
    write_run(tmp_path, 0, ["outlier=none"], metrics=make_metrics())
    write_run(tmp_path, 1, ["outlier=convrot"], state="FAILED", error="no")

    heading, _, finished, failed = read_rows(
        render_table(name_runs(find_records(tmp_path)), "a sweep", "markdown")
    )

    column = heading.index("state")
    assert finished[column] == "finished" and failed[column] == "failed"


def test_every_special_letter_of_latex_is_escaped():
    escaped = escape_latex(r"\{}$&#^_~%")

    assert re.sub(r"\\(textbackslash|textasciicircum|textasciitilde)\{\}|\\[{}$&#_%]", "", escaped) == ""


def test_a_setting_that_a_spreadsheet_would_compute_is_quoted_and_a_number_is_not(tmp_path):
    values = ['=HYPERLINK("x")', "-0.5", "-x"]
    for number, value in enumerate(values):
        write_run(tmp_path, number, [f"prompts.prompts={value}"], metrics=make_metrics())

    runs = name_runs(find_records(tmp_path))
    rows = list(csv.DictReader(io.StringIO(render_table(runs, "a sweep", "csv"))))

    assert [list(row.values())[1] for row in rows] == ['\'=HYPERLINK("x")', "-0.5", "'-x"]


def test_markdown_shows_entities_and_formulas_as_they_are():
    assert escape_markdown("a &lt; $x$") == r"a \&lt; \$x\$"


def test_runs_whose_times_scatter_are_named(tmp_path, runs):
    assert "say little" not in render_table(runs, "t", "markdown")
    scattered = write_runs(tmp_path / "two", [make_metrics(), make_metrics(**{"speed/step_ms_p90": 21.0})])

    for table_format in ("markdown", "latex"):
        text = render_table(scattered, "t", table_format)
        assert "Step times of" in text and "these speeds say little" in text
    rows = list(csv.DictReader(io.StringIO(render_table(scattered, "t", "csv"))))
    assert [row["speed/scatters"] for row in rows] == ["0", "1"]
