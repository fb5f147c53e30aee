"""Prompt sets of the field as their publishers keep them: a file on the hub, and the column of its prompts.

`prompts` calls it for an option with `hub`. Nothing here samples or checks a single prompt.
"""

import csv
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, FileError
from int8run.generate.prompt_table import YAML_LOADER, check_yaml
from int8run.models.hub import download_dataset_file
from int8run.utils.paths import check_readable, to_local_path
from int8run.utils.text import shorten_error
from int8run.utils.untrusted_json import parse_untrusted_json

log = logging.getLogger(__name__)
MAX_BYTES = 256_000_000


@dataclass(frozen=True)
class HubPrompts:
    """A file of prompts on the hub.

    Args:
        repository: of data sets, `organization/name`.
        file: in it: .json, .jsonl, .csv, .tsv, .yaml or .parquet.
        revision: the commit, so that everybody has the same prompts.
        column: that has the prompts. Of a list in it the first text counts.
        licence: of the prompts, as the publisher states it.
    """

    repository: str
    file: str
    revision: str
    column: str
    licence: str

    def __post_init__(self) -> None:
        for name in ("repository", "file", "revision", "column", "licence"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"prompts.hub.{name} is {value!r}, which is no text; quote it, or set it")
        if Path(self.file).suffix.lower() not in READERS:
            raise ConfigError(
                f"prompts.hub.file is {self.file!r}; a file of prompts ends with {', '.join(READERS)}"
            )

    def read(self, path: str | None) -> list[str]:
        """The prompts.

        Args:
            path: of a copy of the file; None: it is downloaded, or taken from the hub's cache.

        Raises:
            FileError: when it is missing and cannot be downloaded, or has no such column.
        """
        if path is None:
            log.info("Prompts of %s, licence: %s", self.repository, self.licence)
            file = download_dataset_file(self.repository, self.file, self.revision, self.licence)
        else:
            file = to_local_path(path)
            check_readable("prompts.path", file, takes_folder=False)
        return read_column(file, self.column)


def read_column(file: Path, column: str) -> list[str]:
    """The texts in one column of a file, in its order.

    Args:
        file: whose suffix says what it is.
        column: its name. A mapping from names to texts has none: the texts are taken.

    Raises:
        FileError: for another kind of file, a damaged one, one without the column, and one without a text.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise FileError(
            f"{file.name} is no file of prompts that can be read; allowed are {', '.join(READERS)}"
        )
    if file.stat().st_size > MAX_BYTES:
        raise FileError(
            f"{file.name} has {file.stat().st_size:,} bytes; a file of prompts has at most {MAX_BYTES:,}"
        )
    try:
        values = reader(file, column)
    except (ValueError, KeyError, yaml.YAMLError, csv.Error, OSError) as error:
        raise FileError(f"{file.name} cannot be read as a file of prompts: {shorten_error(error)}") from error
    prompts = []
    for value in values:
        text = value[0] if isinstance(value, list) and value else value
        if isinstance(text, str) and text.strip():
            prompts.append(" ".join(text.split()))  # one line each, as in a list of prompts
    if not prompts:
        raise FileError(f"{file.name} has no text in its column {column!r}; name another one")
    return prompts


def read_json(file: Path, column: str) -> list[Any]:
    """A list of rows, or a mapping of names to rows or to texts."""
    return select_column(parse_untrusted_json(file.read_text(encoding="utf-8")), column)


def read_yaml(file: Path, column: str) -> list[Any]:
    """The same in YAML."""
    text = file.read_text(encoding="utf-8")
    check_yaml(text, file.name)
    return select_column(yaml.load(text, Loader=YAML_LOADER), column)


def select_column(tree: Any, column: str) -> list[Any]:
    """The values of a column in a list or a mapping of rows; texts that stand there alone as they are.

    Args:
        tree: plain.
        column: its name.
    """
    rows = list(tree.values()) if isinstance(tree, Mapping) else tree
    if not isinstance(rows, list):
        raise ValueError("it holds no rows")
    return [row.get(column) if isinstance(row, Mapping) else row for row in rows]


def read_jsonl(file: Path, column: str) -> list[Any]:
    """A row in each line."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return select_column([parse_untrusted_json(line) for line in lines if line.strip()], column)


def read_table(file: Path, column: str) -> list[Any]:
    """Comma- or tab-separated rows below their names."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(
        io.StringIO(file.read_text(encoding="utf-8-sig"), newline=""), delimiter=delimiter
    )
    return [row.get(column) for row in reader]


def read_parquet(file: Path, column: str) -> list[Any]:
    """A column of a parquet file."""
    import pyarrow.parquet

    values: list[Any] = pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
    return values


READERS: Mapping[str, Callable[[Path, str], list[Any]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".yaml": read_yaml,
    ".parquet": read_parquet,
}
