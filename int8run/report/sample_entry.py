"""What metrics.json says of a sample's inputs: their names, their images, and a line about them.

Read by the gallery and MLflow's payload; runs of earlier versions have no inputs. `tasks.run_outputs` writes
it and captions its grid with the same line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Inputs that a result resembles, the first one that a sample has: what the report lays over the result.
COMPARED_COLUMNS = ("image", "video", "control_image", "last_image")


@dataclass(frozen=True)
class InputEntry:
    """One input file of a sample.

    Args:
        column: of a prompt table, such as `mask_image`.
        name: of the file.
        sha256: of its content.
        images: paths of what is shown of it, below the output folder: one, or one for each still of the
            sample where the input is a video.
    """

    column: str
    name: str
    sha256: str
    images: Sequence[str]

    @property
    def label(self) -> str:
        """Its name, with its column where that is not `image`: `mask_image: mask.png`."""
        return self.name if self.column == "image" else f"{self.column}: {self.name}"

    def get_image(self, still: int) -> str | None:
        """The image that stands beside a still of the sample; None where there is none."""
        if not self.images:
            return None
        return self.images[min(still, len(self.images) - 1)]


def read_input_entries(sample: Mapping[str, Any]) -> list[InputEntry]:
    """The input files of an entry of metrics.json, in order; none of a prompt alone."""
    entries = []
    for entry in sample.get("inputs") or []:
        entries.append(
            InputEntry(
                column=str(entry["column"]),
                name=str(entry["name"]),
                sha256=str(entry["sha256"]),
                images=list(entry.get("images") or []),
            )
        )
    return entries


def find_compared_input(entries: Sequence[InputEntry]) -> InputEntry | None:
    """The input that a result is laid over; None where no input resembles its result."""
    for column in COMPARED_COLUMNS:
        for entry in entries:
            if entry.column == column:
                return entry
    return None


def describe_inputs(sample: Mapping[str, Any]) -> str:
    """A line about a sample's inputs: `image: cat.png · strength 0.6`; empty of a prompt alone."""
    return " · ".join([*list_file_names(sample), *list_arguments(sample)])


def list_file_names(sample: Mapping[str, Any]) -> list[str]:
    """The names of a sample's input files, by column: `image: cat.png`, `reference_images: a.png, b.png`."""
    names: dict[str, list[str]] = {}
    for entry in read_input_entries(sample):
        names.setdefault(entry.column, []).append(entry.name)
    return [f"{column}: {', '.join(files)}" for column, files in names.items()]


def list_arguments(sample: Mapping[str, Any]) -> list[str]:
    """What a sample's call was given besides prompts and files: `strength 0.6`, `true_cfg_scale=4`."""
    texts = []
    if sample.get("strength") is not None:
        texts.append(f"strength {sample['strength']:g}")
    for name, value in (sample.get("arguments") or {}).items():
        texts.append(f"{name}={value}")
    return texts
