"""A row of a prompt table, or a prompt of the settings: what it asks for, checked value by value.

`prompt_table` and `prompts` make rows, `input_files` makes samples of them. No input file is opened here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from int8run.errors import FileError
from int8run.generate.sample_inputs import INPUT_COLUMNS, STRENGTH, is_file_column
from int8run.models.sampling import SCHEDULE_ARGUMENTS
from int8run.utils.paths import to_local_path

PROMPT, NEGATIVE_PROMPT, SEED = "prompt", "negative_prompt", "seed"
# what a row may have besides arguments of the pipeline's call
ROW_COLUMNS = (PROMPT, NEGATIVE_PROMPT, *INPUT_COLUMNS, STRENGTH, SEED)
MAX_SEED = 2**63 - 1
QUOTE = '"'
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", flags=re.IGNORECASE)
ARGUMENT_NAME = re.compile(r"[a-zA-Z_]\w*")
TEXT_COLUMN = re.compile(r"(negative_)?prompt(_\d+)?")
# arguments that int8run gives a call itself, with what sets them; None: nothing may
OWN_ARGUMENTS: Mapping[str, str | None] = {
    **dict.fromkeys(SCHEDULE_ARGUMENTS, "sampler.extra"),
    "num_inference_steps": "sampler.steps",
    "num_images_per_prompt": "prompts.seeds_per_prompt",
    "num_videos_per_prompt": "prompts.seeds_per_prompt",
    "generator": "a column seed",
    "latents": "a column seed",
    "output_type": None,
    "return_dict": None,
    "callback": None,
    "callback_steps": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": None,
}


class GivenFile(NamedTuple):
    """A file that a row names.

    Args:
        place: where, for messages: `cats.csv, row 3 (line 4): image`.
        path: of the file; it need not be there.
    """

    place: str
    path: Path


@dataclass(frozen=True)
class PromptRow:
    """What one prompt of a set, or one row of a table, asks for.

    Args:
        prompt: what the image shows; empty where inputs alone make it.
        negative_prompt: what it shall not show; None: that of the sampling, else of the pipeline.
        seed: of its first sample; None: that of the run.
        files: by column, each at least one.
        strength: how much of the image is replaced; None: the pipeline's own.
        arguments: further arguments of the pipeline's call, by name.
        place: where it stands, for messages: `cats.csv, row 3 (line 4)`; empty for the settings.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    files: Mapping[str, tuple[GivenFile, ...]] = field(default_factory=dict)
    strength: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)


def build_row(values: Mapping[str, object], place: str, folder: Path) -> PromptRow:
    """Make a row of the values of a table.

    Args:
        values: by column; None is no value.
        place: where the row stands, for messages.
        folder: of the table; paths are relative to it.

    Raises:
        FileError: for a value that its column cannot have, and for a row that asks for nothing.
    """
    given = {name: value for name, value in values.items() if value is not None}
    files = {}
    for name in filter(is_file_column, given):
        files[name] = read_files(given[name], f"{place}: {name}", folder)
    arguments = {}
    for name in sorted(given):
        if name not in ROW_COLUMNS and name not in files:
            check_column(name, place)
            arguments[name] = given[name]
    prompt = check_text(given.get(PROMPT, ""), f"{place}: {PROMPT}")
    if not prompt.strip() and not files:
        raise FileError(f"{place} has neither a prompt nor an input; give it one, or leave the row out")
    negative_prompt = None
    if NEGATIVE_PROMPT in given:
        negative_prompt = check_text(given[NEGATIVE_PROMPT], f"{place}: {NEGATIVE_PROMPT}")
    return PromptRow(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=check_seed(given.get(SEED), f"{place}: {SEED}"),
        files=files,
        strength=check_strength(given.get(STRENGTH), f"{place}: {STRENGTH}"),
        arguments=arguments,
        place=place,
    )


def is_text_column(name: str) -> bool:
    """Whether what a column holds is text, even where it reads as a number."""
    return TEXT_COLUMN.fullmatch(name) is not None


def check_text(value: object, name: str) -> str:
    """Return a value that is text.

    Raises:
        FileError: for another one, and how it is quoted.
    """
    if isinstance(value, str):
        return value
    shown = format_value(value).replace(QUOTE, "")
    raise FileError(f'{name} is {shown}, which is no text; quote it: "{shown}"')


def check_seed(value: object, name: str) -> int | None:
    """Return a seed.

    Raises:
        FileError: for anything else than a whole number that torch takes; None passes.
    """
    if value is None:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 0 <= int(str(value)) <= MAX_SEED:
        raise FileError(f"{name} is {format_value(value)}; allowed is a whole number from 0 to {MAX_SEED}")
    return int(str(value))


def check_strength(value: object, name: str) -> float | None:
    """Return a strength.

    Raises:
        FileError: for anything else than a number above 0 and at most 1; None passes.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < float(str(value)) <= 1:
        raise FileError(
            f"{name} is {format_value(value)}; allowed is a number above 0 (little of the image is replaced) "
            "and at most 1 (all of it)"
        )
    return float(str(value))


def check_column(name: str, place: str) -> None:
    """Check that a column can be an argument of a call, and is none that int8run gives itself.

    Whether the pipeline has it is asked where the pipeline is known.

    Raises:
        FileError: when it cannot.
    """
    if name in ROW_COLUMNS:
        return
    if not ARGUMENT_NAME.fullmatch(name):
        columns = ", ".join(ROW_COLUMNS)
        raise FileError(
            f"{place} has a column {name!r}, which is no name of an argument; columns are {columns}, and "
            "arguments of the pipeline's call"
        )
    if name not in OWN_ARGUMENTS:
        return
    instead = OWN_ARGUMENTS[name]
    advice = "leave it out" if instead is None else f"use {instead}"
    raise FileError(f"{place} has a column {name}, which int8run gives the call itself; {advice}")


def read_files(value: object, place: str, folder: Path) -> tuple[GivenFile, ...]:
    """The files of a column: one path, or a list of them.

    Args:
        value: what stands in the column.
        place: where, for messages.
        folder: that paths are relative to.

    Raises:
        FileError: for what is no path, and for addresses.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    locations = list(value) if isinstance(value, Sequence) and is_list else [value]
    if not locations:
        raise FileError(f"{place} is an empty list; name a file, or leave it out")
    files = []
    for location in locations:
        if not isinstance(location, str) or not location.strip():
            shown = format_value(location)
            raise FileError(f"{place} is {shown}; it takes the path of a file, or a list of paths")
        check_no_address(location, place)
        path = to_local_path(location.strip())
        files.append(GivenFile(place, folder / path))  # an absolute path stays as it is
    return tuple(files)


def check_no_address(location: str, place: str) -> None:
    """Raise FileError for an address on the net, and for a file that is written out in its place."""
    if not ADDRESS.match(location):
        return
    parts = urlsplit(location)
    # without login and query, which may have passwords
    shown = f"{parts.scheme}://{parts.hostname}/…" if parts.hostname else f"{parts.scheme}:…"
    raise FileError(f"{place}={shown} is an address; download it first, and name the file")


def format_value(value: object) -> str:
    """A value as one writes it in YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)
