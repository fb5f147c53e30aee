"""Prompt sets, and the samples that they ask for: prompts times seeds."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anyascii import anyascii

from int8run.errors import ConfigError, FileError, check_range
from int8run.generate.prompt_row import (
    MAX_SEED,
    QUOTE,
    GivenFile,
    PromptRow,
    check_strength,
    format_value,
    read_files,
)
from int8run.generate.prompt_sources import HubPrompts
from int8run.generate.prompt_table import is_table, read_table
from int8run.generate.sample_inputs import INPUT_COLUMNS, NO_INPUTS, SampleInputs
from int8run.utils.paths import check_readable, to_local_path

MAX_SLUG_LENGTH = 40
MAX_SLUG_BYTES = 160  # of the 255 that a file name may have; the rest is number, seed and ending

# a path, or a list of paths
Files = str | Sequence[str] | None


@dataclass(frozen=True)
class PromptSet:
    """Prompts from the config, or from a file: one per line, or the rows of a table.

    Each is generated with `seeds_per_prompt` seeds. All other settings go with every prompt that has none of
    its own; None: the pipeline's.

    Args:
        take: how many prompts of the set; None: all.
        take_seed: which ones. A smaller number takes some of those that a larger one takes.
        hub: a published file, in the place of `prompts`; `path` names a copy of it.
    """

    prompts: Sequence[str] | None = ()
    path: str | None = None
    seeds_per_prompt: int = 1
    negative_prompt: str | None = None
    image: Files = None
    mask_image: Files = None
    last_image: Files = None
    control_image: Files = None
    video: Files = None
    reference_images: Files = None
    strength: float | None = None
    take: int | None = None
    take_seed: int = 0
    hub: HubPrompts | None = None

    def __post_init__(self) -> None:
        if self.take is not None:
            check_range("prompts.take", self.take, 1, 1_000_000, whole=True)
        check_range("prompts.take_seed", self.take_seed, 0, MAX_SEED, whole=True)
        check_range("prompts.seeds_per_prompt", self.seeds_per_prompt, 1, 10_000, whole=True)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(
                f"prompts.negative_prompt is {self.negative_prompt!r}, which is no text; quote it: "
                f"'prompts.negative_prompt=\"{self.negative_prompt}\"'"
            )
        if self.prompts is not None:
            check_prompts("prompts.prompts", self.prompts)
        if bool(self.prompts) == bool(self.path or self.hub):
            raise ConfigError(
                "prompts needs exactly one of prompts.prompts=[…] and prompts.path=<file, one prompt per "
                "line>"
            )
        try:
            check_strength(self.strength, "prompts.strength")
            self.list_files()
        except FileError as error:  # here it is a setting that is wrong, and no file
            raise ConfigError(str(error)) from error

    def list_files(self) -> dict[str, tuple[GivenFile, ...]]:
        """The inputs that go with every prompt, by column."""
        files = {}
        for column in INPUT_COLUMNS:
            value = getattr(self, column)
            if value is not None:
                files[column] = read_files(value, f"prompts.{column}", Path())
        return files

    def read_rows(self) -> list[PromptRow]:
        """What each prompt asks for, from the config or from the file.

        Raises:
            FileError: when the file is missing, is not text, or holds no prompt, and for a row of a table
                that cannot be.
        """
        files = self.list_files()
        rows = take_subset(self.read_own_rows(), self.take, self.take_seed)
        return [self.complete_row(row, files) for row in rows]

    def read_own_rows(self) -> list[PromptRow]:
        """What each prompt itself says; see read_rows."""
        if self.hub is not None:
            return [PromptRow(prompt) for prompt in self.hub.read(self.path)]
        if not self.path:
            return [PromptRow(prompt) for prompt in self.prompts or ()]
        text = read_prompt_file(self.path)
        path = to_local_path(self.path)
        if is_table(path):
            return read_table(text, path)
        prompts = parse_prompts(text)
        if not prompts:
            raise FileError(f"prompts.path={self.path} holds no prompt; write one per line")
        return [PromptRow(prompt) for prompt in prompts]

    def complete_row(self, row: PromptRow, files: Mapping[str, tuple[GivenFile, ...]]) -> PromptRow:
        """A row with what the whole set has and it has not.

        Args:
            row: whose own values win.
            files: of the whole set, by column.
        """
        return replace(
            row,
            negative_prompt=self.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            strength=self.strength if row.strength is None else row.strength,
            # in one order, whatever that of the columns: a sample is known again by its text
            files=dict(sorted({**files, **row.files}.items())),
        )


def take_subset(rows: Sequence[PromptRow], take: int | None, seed: int) -> list[PromptRow]:
    """Some rows of a set, in its order; the same ones on every machine and in every version of Python.

    Args:
        rows: all.
        take: how many; None: all.
        seed: which ones.

    Raises:
        ConfigError: for more than there are.
    """
    if take is None:
        return list(rows)
    if take > len(rows):
        raise ConfigError(
            f"prompts.take is {take}, and the set has {len(rows)} prompts; take at most that many"
        )

    def draw(number: int) -> bytes:
        return hashlib.sha256(f"{seed} {number}".encode()).digest()

    taken = sorted(range(len(rows)), key=draw)[:take]
    return [rows[number] for number in sorted(taken)]


def read_prompt_file(location: str) -> str:
    """The text of the file that `prompts.path` names.

    Raises:
        FileError: when it is missing, cannot be read, or is not UTF-8.
    """
    path = to_local_path(location)
    check_readable("prompts.path", path, takes_folder=False)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"prompts.path={location} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise FileError(f"prompts.path={location} could not be read: {error.strerror or error}") from error
    if "\0" in text:  # UTF-16 without a mark is UTF-8 with zeros
        raise FileError(f"prompts.path={location} is not UTF-8 text: it has zero bytes; save it as UTF-8")
    return text


def parse_prompts(text: str) -> list[str]:
    """The prompts in a text: one per line, without blank lines and `#` comments."""
    prompts = []
    # at line ends alone: pasted text has other separators inside of a line, which `splitlines` cuts at
    for line in text.split("\n"):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    return prompts


def check_prompts(setting: str, prompts: object) -> None:
    """Refuse everything but a list of texts.

    YAML and hydra read `1984`, `true` and `null` as other things than text. Such a value is not always what
    was typed (`1e3` has become 1000.0), so that it is not turned back.

    Args:
        setting: where the prompts stand, for the error.
        prompts: what stands there.

    Raises:
        ConfigError: naming the entry and how it is quoted.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        shown = format_value(prompts)
        raise ConfigError(f"{setting} is {shown}; it takes a list: {setting}=[{shown.strip(QUOTE)}]")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            shown = format_value(prompt).replace(QUOTE, "")
            raise ConfigError(
                f"{setting} has {shown} as entry {number}, which is no text; quote it: "
                f"'{setting}=[\"{shown}\"]'"
            )


@dataclass(frozen=True)
class Sample:
    """One image or video to generate.

    Args:
        prompt: what it shows.
        seed: of its noise.
        key: its file name and its name in the tracker, the same in every run with these prompts.
        negative_prompt: what it shall not show; None: that of the sampling, else of the pipeline.
        inputs: images, videos and arguments that it brings.
    """

    prompt: str
    seed: int
    key: str
    negative_prompt: str | None = None
    inputs: SampleInputs = NO_INPUTS


def build_samples(prompts: Sequence[str], seeds_per_prompt: int, seed: int) -> list[Sample]:
    """Prompts × seeds, without any inputs; see `build_row_samples`."""
    rows = [PromptRow(prompt) for prompt in prompts]
    return build_row_samples(rows, [NO_INPUTS] * len(rows), seeds_per_prompt, seed)


def build_row_samples(
    rows: Sequence[PromptRow], inputs: Sequence[SampleInputs], seeds_per_prompt: int, seed: int
) -> list[Sample]:
    """Rows × seeds.

    Args:
        rows: in order.
        inputs: of each row.
        seeds_per_prompt: samples of each row.
        seed: of the first sample of each row that has none of its own; sample i has `seed + i`, so that
            samples of one seed share their noise.
    """
    samples = []
    for number, (row, row_inputs) in enumerate(zip(rows, inputs, strict=True)):
        first_seed = seed if row.seed is None else row.seed
        for sample_seed in range(first_seed, first_seed + seeds_per_prompt):
            key = f"{number:03d}_{slugify(name_row(row))}_s{sample_seed}"
            samples.append(Sample(row.prompt, sample_seed, key, row.negative_prompt, row_inputs))
    return samples


def name_row(row: PromptRow) -> str:
    """What the files of a row are named by: its prompt, else its first input."""
    if row.prompt.strip() or not row.files:
        return row.prompt
    first_column = next(iter(row.files.values()))
    return first_column[0].path.stem


def split_batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """What each call of a pipeline generates: a sample with inputs by itself, others together.

    Args:
        samples: in order.
        size: most samples of one call.
    """
    batches: list[list[Sample]] = []
    for sample in samples:
        last = batches[-1] if batches else []
        is_open = 0 < len(last) < size and last[0].inputs.is_empty
        if is_open and sample.inputs.is_empty:
            last.append(sample)
        else:
            batches.append([sample])
    return batches


def slugify(text: str) -> str:
    """A prompt as part of a file name: `Red apple!` -> `red-apple`, `狐狸` as it is.

    Letters and digits of every script stay, with the marks that belong to them. A prompt of symbols alone has
    their names: `🦊` -> `fox`.
    """
    normal = unicodedata.normalize("NFC", text.lower())
    slug = join_letters(normal) or join_letters(anyascii(text).lower())
    shortened = slug[:MAX_SLUG_LENGTH]
    while len(shortened.encode()) > MAX_SLUG_BYTES:
        shortened = shortened[:-1]
    return shortened.strip("-") or "empty"


def join_letters(text: str) -> str:
    """The letters and digits of a text, with a dash for all that stands between them."""
    characters = [char if unicodedata.category(char)[0] in "LNM" else "-" for char in text]
    return "".join(characters).strip("-")
