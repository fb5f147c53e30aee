"""Prompt sets, and the samples that they ask for: prompts times seeds."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from anyascii import anyascii

from int8run.errors import ConfigError, FileError, check_range
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs
from int8run.utils.paths import check_readable, expand_path

MAX_SLUG_LENGTH = 40
MAX_SLUG_BYTES = 160  # of the 255 that a file name may have; the rest is number, seed and ending
QUOTE = '"'


@dataclass(frozen=True)
class PromptSet:
    """Prompts from the config, or one per line of a file; each is generated with `seeds_per_prompt` seeds.

    `negative_prompt` goes with every prompt; None: the sampling's, else the pipeline's own.
    """

    prompts: Sequence[str] | None = ()
    path: str | None = None
    seeds_per_prompt: int = 1
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        check_range("prompts.seeds_per_prompt", self.seeds_per_prompt, 1, 10_000, whole=True)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(
                f"prompts.negative_prompt is {self.negative_prompt!r}, which is no text; quote it: "
                f"'prompts.negative_prompt=\"{self.negative_prompt}\"'"
            )
        if self.prompts is not None:
            check_prompts("prompts.prompts", self.prompts)
        if bool(self.prompts) == bool(self.path):
            raise ConfigError(
                "prompts needs exactly one of prompts.prompts=[…] and prompts.path=<file, one prompt per "
                "line>"
            )

    def read(self) -> list[str]:
        """The prompts, from the config or from the file: one per line, without blank lines and `#` comments.

        Raises:
            FileError: when the file is missing, is not text, or holds no prompt.
        """
        if not self.path:
            return list(self.prompts or ())
        prompts = parse_prompts(read_prompt_file(self.path))
        if not prompts:
            raise FileError(f"prompts.path={self.path} holds no prompt; write one per line")
        return prompts


def read_prompt_file(location: str) -> str:
    """The text of the file that `prompts.path` names.

    Raises:
        FileError: when it is missing, cannot be read, or is not UTF-8.
    """
    path = expand_path(location)
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


def format_value(value: object) -> str:
    """A value as one writes it in YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)


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


def build_samples(
    prompts: Sequence[str], seeds_per_prompt: int, seed: int, negative_prompt: str | None = None
) -> list[Sample]:
    """Prompts × seeds.

    Args:
        prompts: in order.
        seeds_per_prompt: samples of each prompt.
        seed: of the first sample of each prompt; sample i has `seed + i`, so that samples of one seed share
            their noise.
        negative_prompt: of every sample.
    """
    samples = []
    for number, prompt in enumerate(prompts):
        for sample_seed in range(seed, seed + seeds_per_prompt):
            key = f"{number:03d}_{slugify(prompt)}_s{sample_seed}"
            samples.append(Sample(prompt, sample_seed, key, negative_prompt))
    return samples


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
