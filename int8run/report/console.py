"""Everything that a command writes to the terminal: log lines, printed lines and progress bars.

Log lines and printed lines look the same; warnings and errors begin with that word. On a terminal, lines are
wrapped between words at its width. Piped to a file or another program, a line stays one line, and there are
no bars. `conf/hydra/job_logging` and `conf/hydra/hydra_logging` name `ConsoleHandler` and `FileFormatter`.

Text is text: no string is read as rich's markup (`[red]`) or as the name of an emoji (`:fox:`), and what a
terminal would obey is shown (`\\x1b`), because a line may hold a prompt, a path or a setting of a user.
Styles are given as `Text` objects (`make_bold`, `Text.assemble`).
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich import progress as bars
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from int8run.report.formatting import format_duration
from int8run.tracking.secrets import mask_secrets
from int8run.utils.text import make_lines_visible, make_visible

log = logging.getLogger(__name__)

LABEL_WIDTH = 28  # of a bar; longer labels move its bar to the right
# seconds between the lines of a loop without a bar whose items are not worth a line each, such as layers
LINE_INTERVAL_S = 10.0
LEVEL_STYLES = {logging.WARNING: "bold yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class ConsoleHandler(logging.Handler):
    """Writes log records to the console that the bars are on, so that neither breaks the other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; above INFO its level comes first: `Warning: …`."""
        try:
            line = Text()
            if record.levelno > logging.INFO:
                level = record.levelname.capitalize()
                line.append(f"{level}: ", style=LEVEL_STYLES.get(record.levelno, "bold"))
            line.append(make_lines_visible(self.format(record)))
            print_text(line)
        except (OSError, ValueError, TypeError, KeyError):
            # the output is closed, or % arguments do not fit: handleError prints the error or hides it, as
            # logging.raiseExceptions says
            self.handleError(record)


class MaskingFormatter(logging.Formatter):
    """Leaves passwords and tokens out of every line, whatever library logged it."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        return mask_secrets(super().format(record))


class FileFormatter(MaskingFormatter):
    """Formats records for a job's log file. Further lines of a message are indented: none looks like a record
    of its own, whatever a prompt or the name of a file says.
    """

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line that begins with its time, and indented lines."""
        return make_lines_visible(super().format(record)).replace("\n", "\n    ")


def print_lines(*lines: str | Text | Table) -> None:
    """Print lines of text and tables; what a string holds is printed as it is."""
    for line in lines:
        if isinstance(line, Table):
            print_table(line)
        elif isinstance(line, Text):
            print_text(line)
        else:
            print_text(Text(make_lines_visible(line)))


def make_bold(value: object) -> Text:
    """A value of one line in bold, to be printed alone or as a part of `Text.assemble`."""
    return Text(make_visible(value), style="bold")


def make_plain(value: object) -> Text:
    """A value of one line for a cell of a table, or a part of `Text.assemble`."""
    return Text(make_visible(value))


def print_table(table: Table) -> None:
    """Print a table, all of whose strings are taken as they are.

    On a terminal that is too narrow for it, texts are broken and numbers are not: columns that stand to the
    right keep their width.
    """
    make_literal(table)
    for column in table.columns:
        if column.justify == "right":
            widest_cell = max((cell_len(str(cell)) for cell in column.cells), default=0)
            column.min_width = max(widest_cell, column.min_width or 0)
    get_console().print(table, soft_wrap=True)


def make_literal(table: Table) -> None:
    """Turn every string of a table into text without markup, in place."""
    if isinstance(table.title, str):
        table.title = Text(make_visible(table.title), style="table.title")
    if isinstance(table.caption, str):
        table.caption = Text(make_lines_visible(table.caption), style="table.caption")
    for column in table.columns:
        if isinstance(column.header, str):
            column.header = make_plain(column.header)
        cells: list[RenderableType] = []
        for cell in column.cells:
            if isinstance(cell, str):
                cell = make_plain(cell)
            cells.append(cell)
        column._cells = cells  # rich offers no other way to change the cells of a table


def print_text(text: Text) -> None:
    """Print one line, wrapped between words where somebody looks at a terminal."""
    console = get_console()
    if is_interactive():
        text = wrap_words(text, console.width)
    console.print(text, soft_wrap=True)


def wrap_words(text: Text, width: int) -> Text:
    """A text with line breaks between words.

    A longer word stays whole, unlike in rich's own wrapping: the terminal continues it on the next line, and
    a path is copied without a break.

    Args:
        text: with its styles.
        width: of the terminal, in characters.
    """
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        breaks = []
        # where the piece that is being filled ends, and how wide it is by there
        end = filled = 0
        plain = line.plain
        for word in re.finditer(r"\S+", plain):
            gap, length = cell_len(plain[end : word.start()]), cell_len(word.group())
            if filled and filled + gap + length > width:
                breaks.append(word.start())
                filled = length
            else:
                filled += gap + length
            end = word.end()
        lines += line.divide(breaks)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def is_interactive() -> bool:
    """Whether somebody looks at a terminal, rather than a pipe or a file.

    `Console.is_terminal` alone is also true for a pipe where FORCE_COLOR asks for colors.
    """
    console = get_console()
    return console.is_terminal and console.file.isatty()


class Progress:
    """Named steps and counted loops: a bar each on a terminal, one log line each elsewhere.

    Args:
        enabled: whether to show anything.
        transient: the bars disappear when they are done, as in a sweep, where one line for each job stays.
    """

    def __init__(self, *, enabled: bool, transient: bool = False):
        self.enabled = enabled
        self.transient = transient
        self.has_bars = enabled and is_interactive()

    @contextmanager
    def track_loop(
        self, name: str, total: int, *, line_each: bool = False
    ) -> Iterator[Callable[[int], None]]:
        """Show a loop of known length.

        Args:
            name: what is done.
            total: number of items.
            line_each: without a terminal, log a line for every item, such as an image, and not only one now
                and then.

        Yields:
            A function that advances it by a number of items.
        """
        if not self.has_bars:
            self.log_step(f"{name}: {total} to do")
            interval_s = 0.0 if line_each else LINE_INTERVAL_S
            lines = LoopLines(name, total, interval_s, self.log_step)
            yield lines.advance
            return
        with self.open_bar(bars.BarColumn(), bars.MofNCompleteColumn()) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)

    @contextmanager
    def track_step(self, name: str) -> Iterator[None]:
        """Show a step of unknown length."""
        if not self.has_bars:
            self.log_step(name)
            yield
            return
        with self.open_bar(bars.SpinnerColumn(finished_text="✓")) as bar:
            task = bar.add_task(name, total=1)
            yield
            bar.advance(task)

    def log_step(self, text: str) -> None:
        """One line in place of a bar."""
        if self.enabled:
            log.info("%s", text)

    def open_bar(self, *columns: bars.ProgressColumn) -> bars.Progress:
        """A bar with its label on the left and the elapsed time on the right."""
        label = bars.TextColumn(f"{{task.description:<{LABEL_WIDTH}}}", markup=False)
        return bars.Progress(
            label, *columns, bars.TimeElapsedColumn(), console=get_console(), transient=self.transient
        )


class LoopLines:
    """Lines in place of the bar of a loop: how much is done, and the time that the rest will take.

    The first of many small items does not count for the estimate: kernels are built before it is done, once.

    Args:
        name: of the loop.
        total: number of items.
        interval: least seconds between two lines; 0: a line each time, for items that take long.
        write: is given each line.
    """

    def __init__(self, name: str, total: int, interval: float, write: Callable[[str], None]):
        self.name = name
        self.total = total
        self.interval = interval
        self.write = write
        self.done = 0
        self.started = self.last_line = time.monotonic()
        # items, and seconds from the start, that the estimate leaves out
        self.warm_up_items = 0
        self.warm_up_seconds = 0.0

    def advance(self, count: int) -> None:
        """Count some items as done."""
        is_first = self.done == 0
        self.done += count
        now = time.monotonic()
        if is_first and self.interval:
            self.warm_up_items = self.done
            self.warm_up_seconds = now - self.started
        if now - self.last_line >= self.interval:
            self.last_line = now
            self.write(self.format_line(now - self.started))

    def format_line(self, elapsed: float) -> str:
        """`Generating: 3 of 8, 0:25 left`; of a loop that is done how long it took.

        Args:
            elapsed: seconds since the loop began.
        """
        share = f"{self.name}: {self.done} of {self.total}"
        if self.done >= self.total:
            return f"{share}, took {format_duration(elapsed)}"
        num_timed = self.done - self.warm_up_items
        if num_timed == 0:
            return share
        seconds_each = (elapsed - self.warm_up_seconds) / num_timed
        left = seconds_each * (self.total - self.done)
        return f"{share}, {format_duration(left)} left"
