"""Prompt tables: `.jsonl`, `.csv`, `.tsv` and `.yaml` files with a row for each prompt.

`prompts` calls `read_table` with the text of a file. Every message names the row and the line. The files that
a table names are not opened here.
"""

import csv
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from int8run.errors import FileError
from int8run.generate.prompt_row import PromptRow, build_row, check_column, is_text_column
from int8run.generate.sample_inputs import is_file_column
from int8run.utils.text import shorten_error
from int8run.utils.untrusted_json import parse_untrusted_json

log = logging.getLogger(__name__)
MAX_CHARACTERS = 64_000_000  # of a table: some 100,000 long rows
MAX_YAML_DEPTH = 40
# libyaml's, where PyYAML was built with it: fifteen times as fast
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CSV_DELIMITERS = (",", ";", "\t")
# between several files in one cell: no file name on Windows has it, and few elsewhere
LIST_SEPARATOR = "|"
MAX_SHOWN = 3  # paths in one line of the log


class TableRow(NamedTuple):
    """A row before its values are checked.

    Args:
        line: where it begins, counted from 1.
        values: by column.
    """

    line: int
    values: Mapping[str, object]


Reader = Callable[[str, str], Iterator[TableRow]]


def is_table(path: Path) -> bool:
    """Whether a file of prompts is a table; else it holds one prompt per line."""
    return path.suffix.lower() in READERS


def read_table(text: str, path: Path) -> list[PromptRow]:
    """The rows of a table.

    Args:
        text: of the file.
        path: of the file, whose suffix says what it is.

    Raises:
        FileError: for a table without rows, and for a row that cannot be; with its number and its line.
    """
    if len(text) > MAX_CHARACTERS:
        raise FileError(
            f"{path.name} has {len(text):,} characters; a prompt table has at most {MAX_CHARACTERS:,}; "
            "divide it"
        )
    rows = []
    read_rows = READERS[path.suffix.lower()]
    for number, (line, values) in enumerate(read_rows(text, path.name), start=1):
        place = f"{path.name}, row {number} (line {line})"
        rows.append(build_row(values, place, path.parent))
    if not rows:
        raise FileError(
            f"prompts.path={path} has no rows; a row has a prompt, and may have an image, a seed and more"
        )
    report_files_outside(rows, path)
    return rows


def report_files_outside(rows: Sequence[PromptRow], path: Path) -> None:
    """Log which inputs lie outside of the table's folder: whoever passes the folder on has to know them."""
    outside: dict[str, str] = {}  # path as the table leads to it -> the place of the first
    for row in rows:
        for file in [file for files in row.files.values() for file in files]:
            relative = os.path.relpath(file.path, path.parent)
            if relative.startswith(os.pardir):
                outside.setdefault(relative, file.place)
    if not outside:
        return
    shown = [f"{relative} ({place})" for relative, place in outside.items()][:MAX_SHOWN]
    if len(outside) > MAX_SHOWN:
        shown.append(f"and {len(outside) - MAX_SHOWN} more")
    log.warning("inputs outside of the table's folder: %s", ", ".join(shown))


# -- JSON lines --------------------------------------------------------------------------------------


def read_jsonl(text: str, name: str) -> Iterator[TableRow]:
    """One JSON object per line; blank lines are left out.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        FileError: for a line that is no object, or has a name twice.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_untrusted_json(line)
        except ValueError as error:
            raise FileError(f"{name}, line {number} {error}") from error
        if not isinstance(values, dict):
            raise FileError(
                f'{name}, line {number} is no JSON object; write one per line: {{"prompt": "a fox"}}'
            )
        yield TableRow(number, values)


# -- CSV ---------------------------------------------------------------------------------------------


def read_csv(text: str, name: str) -> Iterator[TableRow]:
    """A line of column names, then a row per line; an empty cell is no value.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        FileError: for a column that stands there twice or has no name, and for a row with more cells than
            columns.
    """
    header_line = text.lstrip().partition("\n")[0]
    delimiter = max(CSV_DELIMITERS, key=header_line.count)
    # strict: a quote that is never closed would swallow all rows behind it
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1  # where the next row begins: a cell in quotes may have line breaks
    try:
        for cells in reader:
            first_line, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = read_columns(cells, name)
                continue
            yield TableRow(first_line, read_cells(columns, cells, f"{name}, line {first_line}"))
    except csv.Error as error:
        raise FileError(f"{name}, line {line} is no CSV: {error}") from error


def read_columns(cells: Sequence[str], name: str) -> list[str]:
    """The names of the columns.

    Raises:
        FileError: for one that stands there twice, is empty or can be no column.
    """
    columns = [cell.strip() for cell in cells]
    for column in columns:
        if not column:
            raise FileError(
                f"{name}, line 1 has a column without a name; the first line names the columns: prompt,image"
            )
        if columns.count(column) > 1:
            raise FileError(f"{name}, line 1 has the column {column!r} twice; keep one")
        check_column(column, f"{name}, line 1")
    return columns


def read_cells(columns: Sequence[str], cells: Sequence[str], place: str) -> dict[str, object]:
    """The values of a row.

    Args:
        columns: their names.
        cells: of the row; those at the end may be missing.
        place: of the row, for messages.

    Raises:
        FileError: for more cells than columns.
    """
    if len(cells) > len(columns):
        raise FileError(
            f"{place} has {len(cells)} cells and {len(columns)} columns; a text with a comma stands in quotes"
        )
    values: dict[str, object] = {}
    for column, cell in zip(columns, cells, strict=False):
        if cell.strip():
            values[column] = read_cell(column, cell)
    return values


def read_cell(column: str, cell: str) -> object:
    """The value of a cell: text in text columns, paths in those of files, else what JSON makes of it."""
    if is_text_column(column):
        return cell
    if is_file_column(column):
        locations = [part.strip() for part in cell.split(LIST_SEPARATOR)]
        return locations if len(locations) > 1 else locations[0]
    try:
        return parse_untrusted_json(cell)
    except ValueError:
        return cell.strip()


# -- YAML --------------------------------------------------------------------------------------------


def read_yaml(text: str, name: str) -> Iterator[TableRow]:
    """A list of mappings.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        FileError: for what is no list of mappings, for a name that a mapping has twice, and for aliases and
            tags.
    """
    loader = YAML_LOADER(text)
    try:
        check_yaml(text, name)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise FileError(f"{name} is no list of rows; a row begins with a dash: - prompt: a fox")
        for node in root.value:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.MappingNode):
                raise FileError(f"{name}, line {line} is no row; a row has names and values: - prompt: a fox")
            yield TableRow(line, read_mapping(loader, node, name))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or shorten_error(error)
        raise FileError(f"{place} is not YAML: {reason}") from error
    finally:
        loader.dispose()


def check_yaml(text: str, name: str) -> None:
    """Refuse what could make a small text large or endless, before anything builds it.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        FileError: for an alias, which repeats a part of the text, and for values that are too deep in each
            other.
    """
    depth = 0
    for event in yaml.parse(text, Loader=YAML_LOADER):
        if isinstance(event, AliasEvent):
            raise FileError(f"{name} has the alias *{event.anchor}; write the values out")
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise FileError(f"{name} has more than {MAX_YAML_DEPTH} mappings and lists in each other")


def read_mapping(loader: Any, node: yaml.MappingNode, name: str) -> dict[str, object]:
    """The values of a row.

    Args:
        loader: of the file.
        node: of the row.
        name: of the file, for messages.

    Raises:
        FileError: for a name that is no text, and one that stands there twice.
    """
    check_no_name_twice(node, name)
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            line = key_node.start_mark.line + 1
            raise FileError(f"{name}, line {line} has {key!r} in the place of a name; quote it: '{key}'")
        values[key] = loader.construct_object(value_node, deep=True)
    return values


def check_no_name_twice(node: yaml.Node, name: str) -> None:
    """Raise FileError where a mapping has a name twice: of the two a reader would silently take one.

    Args:
        node: to look into, at any depth.
        name: of the file, for messages.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_no_name_twice(item, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        # another key than a text has no name, and is refused where the row is read
        text = key.value if isinstance(key, yaml.ScalarNode) else None
        if text is not None and text in seen:
            line = key.start_mark.line + 1
            raise FileError(f"{name}, line {line} has {text!r} a second time in one row; keep one")
        seen.add(text)
        check_no_name_twice(value, name)


READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".yaml": read_yaml,
    ".yml": read_yaml,
}
