"""Prompt sets, and the samples that they ask for: prompts times seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.errors import ConfigError, FileError, check_range

MAX_SLUG_LENGTH = 40


@dataclass(frozen=True)
class PromptSet:
    """Prompts from the config, or one per line of a file; each is generated with `seeds_per_prompt` seeds.

    `negative_prompt` goes with every prompt; None: the sampling's, else the pipeline's own.
    """

    prompts: Sequence[str] = ()
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
        if isinstance(self.prompts, str):
            raise ConfigError(
                f"prompts.prompts is {self.prompts!r}; it takes a list: prompts.prompts=[{self.prompts}]"
            )
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
            return list(self.prompts)
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise FileError(f"prompts.path={self.path}: no such file (looked for {path.absolute()})")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError(f"prompts.path={self.path} is not UTF-8 text: {error}") from error
        lines = [line.strip() for line in text.splitlines()]
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise FileError(f"prompts.path={self.path} holds no prompt; write one per line")
        return prompts


@dataclass(frozen=True)
class Sample:
    """One image or video to generate.

    Args:
        prompt: what it shows.
        seed: of its noise.
        key: its file name and its name in the tracker, the same in every run with these prompts.
        negative_prompt: what it shall not show; None: that of the sampling, else of the pipeline.
    """

    prompt: str
    seed: int
    key: str
    negative_prompt: str | None = None


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
    """A prompt as part of a file name: `Red apple!` -> `red-apple`."""
    characters = [char if char.isascii() and char.isalnum() else "-" for char in text.lower()]
    return "".join(characters)[:MAX_SLUG_LENGTH].strip("-") or "empty"
