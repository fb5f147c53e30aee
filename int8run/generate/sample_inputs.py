"""What a sample brings besides its prompt: images, videos, and further arguments of the pipeline's call.

A row of a prompt table makes them, a call reads them. They compare and print by content: where a file lies
does not matter, so that the float images of an earlier run are found again. No file is opened here.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Inputs that are files, as the columns of a prompt table and the settings of `prompts` are called.
IMAGE, MASK_IMAGE, LAST_IMAGE, VIDEO = "image", "mask_image", "last_image", "video"
CONTROL_IMAGE, REFERENCE_IMAGES = "control_image", "reference_images"
INPUT_COLUMNS = (IMAGE, MASK_IMAGE, LAST_IMAGE, CONTROL_IMAGE, VIDEO, REFERENCE_IMAGES)
STRENGTH = "strength"
# Some pipelines have further ones, such as `pose_video`; diffusers names them alike.
FILE_COLUMN = re.compile(r"(?:\w+_)?(?:image|images|video|videos)")

# what `media` makes of the colors of a file; another word where it makes other pixels of the same file
COLORS = "sRGB"


@dataclass(frozen=True)
class InputFile:
    """An image or a video that a sample begins with.

    Two are equal where their content is, the size at which it is opened, and the colors that it has then.

    Args:
        name: of the file, without its folder.
        path: where it is.
        sha256: of its content, in hexadecimal digits.
        place: where a setting or a table names it, for messages: `cats.csv, row 3 (line 4): image`.
        size: width and height that it is brought to when it is opened; None: it stays as it is.
        colors: what its pixels are then; in the keys of caches, so that nothing is taken out of them that was
            generated when profiles were ignored.
    """

    name: str = field(repr=False, compare=False)
    path: Path = field(repr=False, compare=False)
    sha256: str
    place: str = field(default="", repr=False, compare=False)
    size: tuple[int, int] | None = None
    colors: str = COLORS

    @property
    def label(self) -> str:
        """The file for a message, with where it is named."""
        return f"{self.place}={self.name}" if self.place else self.name


@dataclass(frozen=True)
class SampleInputs:
    """The inputs of one sample.

    Args:
        files: by column, each at least one.
        strength: how much of the image is replaced, 0 to 1; None: the pipeline's own.
        arguments: further arguments of the pipeline's call, by name.
        place: where a table says so, for messages: `cats.csv, row 3 (line 4)`; empty for the settings.
    """

    files: Mapping[str, tuple[InputFile, ...]] = field(default_factory=dict)
    strength: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether a prompt alone makes the sample."""
        return not self.files and self.strength is None and not self.arguments

    @property
    def all_files(self) -> list[InputFile]:
        """The files of every column, in order."""
        return [file for files in self.files.values() for file in files]


NO_INPUTS = SampleInputs()


def is_file_column(name: str) -> bool:
    """Whether what a column or an argument of this name holds are files."""
    return FILE_COLUMN.fullmatch(name) is not None


def is_video_column(name: str) -> bool:
    """Whether the files of a column are videos."""
    return name.endswith(("video", "videos"))


def is_mask_column(name: str) -> bool:
    """Whether the files of a column are masks: white is what changes."""
    return name == MASK_IMAGE or name.endswith(f"_{MASK_IMAGE}")


def read_input_file(path: Path, place: str = "") -> InputFile:
    """Describe a file that is there, with the hash of its content.

    Args:
        path: of the file.
        place: where it is named, for messages.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(name=path.name, path=path, sha256=digest, place=place)
