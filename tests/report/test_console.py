"""The terminal: how log lines and printed lines look, where they are wrapped, and where there are bars."""

import io
import logging
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from support.hostile_texts import HOSTILE_TEXTS

from int8run.report import console
from int8run.report.console import (
    ConsoleHandler,
    FileFormatter,
    LoopLines,
    Progress,
    make_bold,
    make_plain,
    print_lines,
    wrap_words,
)
from int8run.report.formatting import format_duration, format_pairs, shorten_to_width
from int8run.utils.text import UNSAFE_BUT_LINES, make_visible

LOGGING_CONFIGS = Path(__file__).parents[2] / "conf" / "hydra"
LONG_LINE = "Job 0 (lora.strength=0 outlier=none): PSNR 55.2 dB, 2.79× float's speed, 25.9 ms per step"


class TerminalFile(io.StringIO):
    """What a console writes to a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def use_console(monkeypatch):
    """A function that makes the program write to a console of some width, and returns what was written."""

    def make(file, width=40):
        made = Console(file=file, width=width, color_system=None)
        monkeypatch.setattr(console, "get_console", lambda: made)
        return lambda: file.getvalue()

    return make


@pytest.fixture
def logger():
    """A logger that writes through the handler alone."""
    made = logging.Logger("test")
    made.addHandler(ConsoleHandler())
    return made


# -- lines ---------------------------------------------------------------------------------------------------


def test_a_piped_log_line_stays_one_line(use_console, logger):
    read = use_console(io.StringIO())

    logger.info("%s", LONG_LINE)

    assert read() == f"{LONG_LINE}\n"


def test_a_log_line_on_a_terminal_is_wrapped_between_words_at_its_width(use_console, logger):
    read = use_console(TerminalFile(), width=40)

    logger.info("%s", LONG_LINE)

    lines = read().splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 40
    assert " ".join(line.rstrip() for line in lines) == LONG_LINE


def test_a_long_path_on_a_terminal_is_not_broken(use_console, logger):
    read = use_console(TerminalFile(), width=40)
    path = "/a/folder/with/a/very/long/path/that/is/wider/than/forty/columns/report.html"

    logger.info("report: %s", path)

    assert path in read()


def test_a_pipe_that_shall_have_colors_is_not_wrapped(use_console, logger, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    read = use_console(io.StringIO(), width=40)

    logger.info("%s", LONG_LINE)

    assert read() == f"{LONG_LINE}\n"


@pytest.mark.parametrize("file", [io.StringIO, TerminalFile], ids=["pipe", "terminal"])
def test_a_printed_line_looks_like_a_log_line(use_console, logger, file):
    read_logged = use_console(file())
    logger.info("%s", LONG_LINE)

    read_printed = use_console(file())
    print_lines(LONG_LINE)

    assert read_printed() == read_logged()


def test_warnings_and_errors_begin_with_that_word(use_console, logger):
    read = use_console(io.StringIO(), width=200)

    logger.info("loading")
    logger.warning("an option is ignored")
    logger.error("job 3 failed")

    assert read().splitlines() == ["loading", "Warning: an option is ignored", "Error: job 3 failed"]


@pytest.mark.parametrize("file", [io.StringIO, TerminalFile], ids=["pipe", "terminal"])
@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=repr)
def test_whatever_a_line_holds_is_printed_as_it_is(use_console, logger, file, text):
    read = use_console(file(), width=1000)
    table = Table("setting", title=f"table {text}")
    table.add_row(f"cell {text}")

    logger.warning("logged %s", text)
    print_lines(f"printed {text}", Text.assemble(make_bold(f"bold {text}"), make_plain(" plain")), table)
    print_lines(format_pairs([("pair", text)]))

    written = read()
    shown = make_visible(text)
    for what in ("logged", "printed", "bold", "table", "cell", "pair"):
        assert f"{what} {shown}" in written
    assert not UNSAFE_BUT_LINES.search(written), "something is left that a terminal obeys"


def test_a_style_is_given_as_an_object_and_not_as_markup(monkeypatch):
    file = TerminalFile()
    made = Console(file=file, width=80, color_system="standard", force_terminal=True, _environ={})
    monkeypatch.setattr(console, "get_console", lambda: made)

    print_lines(Text.assemble(make_bold("[red]job"), make_plain(" [/]")))

    assert file.getvalue() == "\x1b[1m[red]job\x1b[0m [/]\n"


def test_a_message_with_lines_cannot_look_like_another_record_in_the_log_file():
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "a\n[2026][ERROR] fake\x1b"})

    text = FileFormatter("[%(levelname)s] %(name)s: %(message)s").format(record)

    assert text == "[INFO] n: a\n    [2026][ERROR] fake\\x1b"


def test_a_narrow_terminal_breaks_the_texts_of_a_table_and_not_its_numbers(use_console):
    read = use_console(TerminalFile(), width=20)
    table = Table("what", "time")
    table.columns[1].justify = "right"
    table.add_row("a text of several words", "12345.67 ms")

    print_lines(table)

    assert "12345.67 ms" in read() and "several" in read()


@pytest.mark.parametrize("words", [["word"] * 4000, ["\u200d"] * 4000], ids=["wide", "no width"])
def test_wrapping_measures_each_character_once_or_twice(monkeypatch, words):
    measured = []

    def measure(text):
        measured.append(len(text))
        return cell_len(text)

    monkeypatch.setattr(console, "cell_len", measure)
    text = " ".join(words)

    wrap_words(Text(text), 40)

    assert sum(measured) <= 2 * len(text)


def test_a_message_that_does_not_fit_its_arguments_does_not_end_the_program(use_console, logger, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    read = use_console(io.StringIO())

    logger.info("%d layers", "many")
    logger.info("next")

    assert read() == "next\n"


def test_tables_are_printed_between_lines(use_console):
    read = use_console(io.StringIO(), width=80)
    table = Table("name")
    table.add_row("value")

    print_lines("before", table, "after")

    lines = read().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert any("value" in line for line in lines)


@pytest.mark.parametrize("group", ["job_logging", "hydra_logging"])
def test_the_logging_configs_name_the_handler(group):
    config = yaml.safe_load((LOGGING_CONFIGS / group / "int8run.yaml").read_text())

    assert config["handlers"]["console"]["class"] == f"{ConsoleHandler.__module__}.ConsoleHandler"


def test_pairs_are_one_line_with_bold_values():
    line = format_pairs([("device", "cpu"), ("layers", 3)])

    assert line.plain == "device cpu · layers 3"
    assert [line.plain[span.start : span.end] for span in line.spans if span.style == "bold"] == ["cpu", "3"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations_have_hours_only_where_needed(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "width", "shortened"),
    [
        ("abcdefghij", 10, "abcdefghij"),
        ("abcdefghij", 7, "abcd…ij"),
        ("狐狸狐狸", 5, "狐狸…"),
        ("abc", 0, ""),
    ],
)
def test_a_text_is_shortened_to_columns_of_a_terminal(text, width, shortened):
    assert shorten_to_width(text, width) == shortened
    assert cell_len(shortened) <= width


# -- progress ------------------------------------------------------------------------------------------------


def run_steps(progress):
    """A loop of three items and a step."""
    with progress.track_loop("Quantizing", 3) as advance:
        for _ in range(3):
            advance(1)
    with progress.track_step("Loading"):
        pass


def test_steps_elsewhere_than_on_a_terminal_are_log_lines(use_console, caplog):
    read = use_console(io.StringIO())

    with caplog.at_level(logging.INFO, "int8run"):
        run_steps(Progress(enabled=True))

    assert caplog.messages == ["Quantizing: 3 to do", "Loading"]
    assert read() == ""


def test_steps_on_a_terminal_are_bars(use_console, caplog):
    read = use_console(TerminalFile(), width=120)

    with caplog.at_level(logging.INFO, "int8run"):
        run_steps(Progress(enabled=True))

    assert "Quantizing" in read() and "3/3" in read() and "Loading" in read()
    assert caplog.messages == []


@pytest.mark.parametrize("file", [io.StringIO, TerminalFile], ids=["pipe", "terminal"])
def test_progress_that_is_off_shows_nothing(use_console, caplog, file):
    read = use_console(file(), width=120)

    with caplog.at_level(logging.INFO, "int8run"):
        run_steps(Progress(enabled=False))

    assert read() == "" and caplog.messages == []


# -- lines in place of a bar ---------------------------------------------------------------------------------


def test_a_loop_without_a_bar_says_what_is_left() -> None:
    lines: list[str] = []
    loop = LoopLines("Generating", 4, 0.0, lines.append)
    loop.advance(1)
    loop.advance(1)

    assert [line.partition(", ")[0] for line in lines] == ["Generating: 1 of 4", "Generating: 2 of 4"]
    assert loop.format_line(30.0) == "Generating: 2 of 4, 0:30 left"
    loop.advance(2)
    assert loop.format_line(61.0) == "Generating: 4 of 4, took 1:01"


def test_what_the_first_small_item_waits_for_is_not_in_the_estimate() -> None:
    """Kernels are built before it is done."""
    loop = LoopLines("Quantizing", 101, 3600.0, print)
    loop.started -= 60
    loop.advance(1)
    assert loop.format_line(60.0) == "Quantizing: 1 of 101"

    loop.advance(10)

    assert loop.format_line(70.0) == "Quantizing: 11 of 101, 1:30 left"


def test_small_items_do_not_have_a_line_each() -> None:
    lines: list[str] = []
    loop = LoopLines("Quantizing", 1000, 3600.0, lines.append)
    for _ in range(1000):
        loop.advance(1)

    assert lines == []
