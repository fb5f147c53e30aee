"""What `task=inspect` says about a file or folder: lines of facts, and commands that use it.

The modules `inspect_*` fill it in; `options.Inspect` prints it.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from int8run.config.prompt_argument import quote_text

# values that neither a shell nor hydra's grammar reads as anything but themselves
PLAIN_VALUE = re.compile(r"[\w./~-]+", re.ASCII)
MAX_VALUE_LENGTH = 200
# what a line of the table is about, and its text
Row = tuple[str, str]


@dataclass(frozen=True)
class FileDescription:
    """What is known about a file or folder.

    Args:
        title: its name or path.
        rows: the facts, in the order in which they are shown.
        commands: what each is for, and the words to type.
    """

    title: str
    rows: Sequence[Row]
    commands: Sequence[Row] = ()

    def to_table(self) -> Table:
        """The facts as a table without a head, a line for each."""
        table = Table(title=self.title, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(name, value)
        return table

    def list_commands(self) -> list[str]:
        """The commands as lines of their own: a narrow table would break a path in the middle of a word."""
        return [f"{purpose}:  {command}" for purpose, command in self.commands]


def shorten_header_value(value: str) -> str:
    """Return the beginning of a long text and its length."""
    if len(value) <= MAX_VALUE_LENGTH:
        return value
    return f"{value[:MAX_VALUE_LENGTH]}… ({len(value)} characters)"


def count_names(names: Iterable[str], separator: str = ", ") -> str:
    """`3 × F32, 2 × I8`: each name with its count, the most frequent first."""
    counts = Counter(names).most_common()
    return separator.join(f"{count} × {name}" for name, count in counts)


def format_size(nbytes: int) -> str:
    """`12.3 MB`: of a file, with one digit after the point."""
    return f"{nbytes / 1e6:.1f} MB"


def format_setting(name: str, value: object) -> str:
    """`name=value` as one types it: quoted where a shell or hydra's grammar would read something else."""
    text = str(value)
    if PLAIN_VALUE.fullmatch(text):
        return f"{name}={text}"
    return shlex.quote(f"{name}={quote_text(text)}")


def format_list_setting(name: str, values: Iterable[object]) -> str:
    """`'name=[a, b]'` as one types it; see `format_setting`."""
    texts = []
    for value in map(str, values):
        is_plain = PLAIN_VALUE.fullmatch(value) is not None
        texts.append(value if is_plain else quote_text(value))
    return shlex.quote(f"{name}=[{', '.join(texts)}]")
