"""Prompt sets: prompts times seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.errors import ConfigError, FileError, check_range


@dataclass(frozen=True)
class PromptSet:
    """Prompts from the config, or one per line of a file; each is generated with `seeds_per_prompt` seeds."""

    prompts: Sequence[str] = ()
    path: str | None = None
    seeds_per_prompt: int = 1

    def __post_init__(self) -> None:
        check_range("prompts.seeds_per_prompt", self.seeds_per_prompt, 1, 10_000, whole=True)
        if isinstance(self.prompts, str):
            raise ConfigError(
                f"prompts.prompts is {self.prompts!r}; it takes a list: prompts.prompts=[{self.prompts}]"
            )
        if bool(self.prompts) == bool(self.path):
            raise ConfigError(
                "prompts needs exactly one of prompts.prompts=[…] and prompts.path=<file, one prompt per line>"
            )

    def read(self) -> list[str]:
        """The prompts.

        Raises:
            FileError: when the file is missing or holds none.
        """
        if not self.path:
            return list(self.prompts)
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise FileError(f"prompts.path={self.path}: no such file (looked for {path.absolute()})")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise FileError(f"prompts.path={self.path} is not UTF-8 text: {error}") from error
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise FileError(f"prompts.path={self.path} holds no prompt; write one per line")
        return prompts


@dataclass(frozen=True)
class Sample:
    """One picture to make."""

    prompt: str
    seed: int
    key: str  # file name and tracker key, the same in every run with these prompts


def build_samples(prompts: Sequence[str], seeds_per_prompt: int, seed: int) -> list[Sample]:
    """Prompts × seeds; seed i of every prompt is `seed + i`, so that pictures of one seed share their noise."""
    return [
        Sample(prompt, seed + i, f"{n:03d}_{slugify(prompt)}_s{seed + i}")
        for n, prompt in enumerate(prompts)
        for i in range(seeds_per_prompt)
    ]


def slugify(text: str) -> str:
    """A prompt as part of a file name."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())[:40].strip("-") or "empty"
