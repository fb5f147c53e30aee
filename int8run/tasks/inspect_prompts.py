"""What `task=inspect` says about a prompt table: what each row has, and what of its inputs cannot be used.

Called by `inspect_file`. A table that cannot be read at all is an error, an input that cannot is shown beside
its row.
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.errors import ConfigError, FileError
from int8run.generate.call_inputs import CallInputs
from int8run.generate.input_files import check_file, check_mask_size
from int8run.generate.media import MediaFacts
from int8run.generate.prompt_row import NEGATIVE_PROMPT, PROMPT, SEED, GivenFile, PromptRow
from int8run.generate.prompt_table import is_table
from int8run.generate.prompts import PromptSet
from int8run.generate.sample_inputs import STRENGTH, is_video_column
from int8run.models.family import ModelSource
from int8run.pipeline.sample_checks import find_call, list_column_problems
from int8run.tasks.file_description import FileDescription, Row, format_setting
from int8run.tracking.setting_names import split_override
from int8run.utils.paths import check_readable
from int8run.utils.plurals import count_noun
from int8run.utils.text import make_visible, shorten_text

TEXT = ".txt"
MAX_ROWS = 20  # that are shown, and as many of those with a problem
MAX_PROMPT_LENGTH = 80


class InputFacts:
    """What is known of the inputs of a table, each file looked at once."""

    def __init__(self) -> None:
        self.facts: dict[tuple[Path, bool], MediaFacts] = {}
        self.problems: dict[tuple[Path, bool], str] = {}

    def describe(self, column: str, file: GivenFile) -> str:
        """A file as its row shows it: its name and its size, or what is wrong with it."""
        source = (file.path, is_video_column(column))
        if source not in self.facts and source not in self.problems:
            self.look_at(column, file)
        if source in self.problems:
            return self.problems[source]
        facts = self.facts[source]
        frames = f", {count_noun(facts.frames, 'frame')}" if facts.frames > 1 else ""
        return f"{file.path.name} ({facts.size}{frames})"

    def look_at(self, column: str, file: GivenFile) -> None:
        """Check a file by its header."""
        source = (file.path, is_video_column(column))
        plain = GivenFile(column, file.path)  # the row is named beside it
        try:
            check_readable(plain.place, plain.path, takes_folder=False)
            self.facts[source] = check_file(column, plain, decodes=False)
        except FileError as error:
            self.problems[source] = str(error)

    def find_problems(self, row: PromptRow) -> list[str]:
        """What is wrong with the inputs of a row."""
        problems = []
        for column, files in row.files.items():
            for file in files:
                self.describe(column, file)
                problem = self.problems.get((file.path, is_video_column(column)))
                if problem is not None:
                    problems.append(problem)
        if problems:
            return problems
        try:
            check_mask_size(row, self.facts)
        except FileError as error:
            problems.append(str(error).removeprefix(f"{row.place}: "))
        return problems


def inspects_prompts(path: Path) -> bool:
    """Whether a file is a prompt table or a list of prompts, by its suffix."""
    return is_table(path) or path.suffix.lower() == TEXT


@dataclass(frozen=True)
class NamedModel:
    """A model that the command line names beside a table.

    Args:
        source: its settings.
        words: of the command line that name it, such as `model=sdxl` and `model.mode=inpaint`.
    """

    source: ModelSource
    words: tuple[str, ...]


def find_named_model(source: ModelSource, overrides: Sequence[str]) -> NamedModel | None:
    """The model that the command line names; None where it names none.

    Args:
        source: the settings of the model, named or not.
        overrides: the words of the command line.
    """
    words = [word for word in overrides if split_override(word)[0].partition(".")[0] == "model"]
    return NamedModel(source, tuple(words)) if words else None


def inspect_prompts(path: Path, model: NamedModel | None = None) -> FileDescription:
    """Describe a prompt table, or a list of prompts.

    Args:
        path: of the file.
        model: that the table is for; None: nothing is said of any.

    Raises:
        FileError: when it cannot be read, or one of its rows cannot be.
    """
    rows = PromptSet(path=str(path)).read_rows()
    kind = "prompt table" if is_table(path) else "prompts, one per line"
    described: list[Row] = [
        ("kind", kind),
        ("size", f"{path.stat().st_size / 1e3:.1f} kB, {count_noun(len(rows), 'row')}"),
        ("columns", count_columns(rows)),
    ]
    call = None
    if model is not None:
        call, takes = read_model_call(model.source)
        described.append(("the model takes", takes))
    inputs = InputFacts()
    problems = {}
    for number, row in enumerate(rows, start=1):
        found = inputs.find_problems(row)
        if call is not None:
            found += list_column_problems(call, list(row.files))
        if found:
            problems[number] = found
    described += describe_rows(rows, inputs)
    described += describe_problems(rows, problems)
    if problems:
        return FileDescription(path.name, described)
    words = [] if model is None else [shlex.quote(word) for word in model.words]
    command = " ".join(["int8run", *words, "prompts=file", format_setting("prompts.path", path)])
    return FileDescription(path.name, described, [("to generate them", command)])


def read_model_call(model: ModelSource) -> tuple[CallInputs | None, str]:
    """What a model's pipeline takes, and the same in words; None where it is not known, and the reason."""
    try:
        call = find_call(model)
    except (ConfigError, FileError) as error:
        return None, f"not known: {error}"
    return call, f"{call.pipeline}: {call.describe()}"


def count_columns(rows: Sequence[PromptRow]) -> str:
    """How many rows have each column: `prompt 3, image 2, strength 1`."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(name for name, _ in list_values(row))
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def list_values(row: PromptRow) -> Iterator[tuple[str, object]]:
    """The columns of a row that have a value, inputs left out: they are named alone."""
    if row.prompt:
        yield PROMPT, row.prompt
    for name in row.files:
        yield name, None
    for name, value in ((NEGATIVE_PROMPT, row.negative_prompt), (STRENGTH, row.strength), (SEED, row.seed)):
        if value is not None:
            yield name, value
    yield from row.arguments.items()


def describe_rows(rows: Sequence[PromptRow], inputs: InputFacts) -> Iterator[Row]:
    """A line for each of the first rows, and how many there are more."""
    for number, row in enumerate(rows[:MAX_ROWS], start=1):
        yield f"row {number}", describe_row(row, inputs)
    if len(rows) > MAX_ROWS:
        yield "…", count_noun(len(rows) - MAX_ROWS, "more row")


def describe_row(row: PromptRow, inputs: InputFacts) -> str:
    """What a row has: its prompt, its inputs, its settings."""
    parts = [shorten_text(make_visible(row.prompt), MAX_PROMPT_LENGTH) or "no prompt"]
    for column, files in row.files.items():
        shown = []
        for file in files:
            if (file.path, is_video_column(column)) in inputs.problems:
                shown.append(file.path.name)
            else:
                shown.append(inputs.describe(column, file))
        parts.append(f"{column} {', '.join(shown)}")
    for name, value in list_values(row):
        if name != PROMPT and name not in row.files:
            parts.append(f"{name} {make_visible(value)}")
    return " · ".join(parts)


def describe_problems(rows: Sequence[PromptRow], problems: Mapping[int, Sequence[str]]) -> Iterator[Row]:
    """A line for each of the first rows with a problem, and how many there are more.

    Args:
        rows: of the table.
        problems: by the number of their row.
    """
    for number, found in list(problems.items())[:MAX_ROWS]:
        yield f"problem in row {number}", "; ".join(found)
    if len(problems) > MAX_ROWS:
        yield "problems", f"in {len(problems)} of {count_noun(len(rows), 'row')}"
