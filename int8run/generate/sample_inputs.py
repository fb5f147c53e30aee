"""What a sample brings besides its prompt: images, videos, and further arguments of the pipeline's call.

A row of a prompt table makes them, a call reads them. They compare and print by content: where a file lies
does not matter, so that the float images of an earlier run are found again. No file is opened here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Inputs that are files, as the columns of a prompt table and the settings of `prompts` are called.
INPUT_COLUMNS = ("image", "mask_image", "last_image", "control_image", "video", "reference_images")


@dataclass(frozen=True)
class InputFile:
    """An image or a video that a sample begins with.

    Args:
        name: of the file, without its folder.
        path: where it is; does not count when two are compared.
        sha256: of its content, in hexadecimal digits.
    """

    name: str
    path: Path = field(repr=False, compare=False)
    sha256: str


@dataclass(frozen=True)
class SampleInputs:
    """The inputs of one sample.

    Args:
        files: by column, each at least one.
        strength: how much of the image is replaced, 0 to 1; None: the pipeline's own.
        arguments: further arguments of the pipeline's call, by name.
    """

    files: Mapping[str, tuple[InputFile, ...]] = field(default_factory=dict)
    strength: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether a prompt alone makes the sample."""
        return not self.files and self.strength is None and not self.arguments

    @property
    def all_files(self) -> list[InputFile]:
        """The files of every column, in order."""
        return [file for files in self.files.values() for file in files]


NO_INPUTS = SampleInputs()


def read_input_file(path: Path) -> InputFile:
    """Describe a file that is there, with the hash of its content.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(name=path.name, path=path, sha256=digest)
