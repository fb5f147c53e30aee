"""Which image files a run has of which sample: what the gallery finds in metrics.json.

No image is opened here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from int8run.report.runs import Run
from int8run.report.sample_entry import (
    InputEntry,
    find_compared_input,
    list_arguments,
    list_file_names,
    read_input_entries,
)


@dataclass(frozen=True)
class InputImageFile:
    """What is shown of an input.

    Args:
        label: its name, with its column where that is not `image`.
        path: of its image; None where the run saved none.
        is_compared: whether results are laid over it.
    """

    label: str
    path: Path | None
    is_compared: bool


class SampleKey(NamedTuple):
    """What the images of one row have in common.

    Args:
        prompt, seed: of the sample.
        repeat: 1 for the first sample with this prompt, seed and inputs, 2 for the second.
        frame: which still of a video; empty for an image.
        inputs: columns and contents of the files that the sample began with.
    """

    prompt: str
    seed: int
    repeat: int = 1
    frame: str = ""
    inputs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SampleFiles:
    """The files of one cell.

    Args:
        image: of the INT8 model.
        float_image: of the float model; None where it generated none.
        psnr: of the sample, in dB.
        inputs: what is shown of each input.
        input_names: their names, by column.
        arguments: what its call was given besides prompts and files.
    """

    image: Path
    float_image: Path | None
    psnr: float | None
    inputs: Sequence[InputImageFile] = ()
    input_names: str = ""
    arguments: Sequence[str] = ()


def find_sample_files(run: Run) -> dict[SampleKey, SampleFiles]:
    """The files of each image of a run; of a video those of its stills."""
    folder = run.record.folder
    found = {}
    for key, sample in zip(list_sample_keys(run.record.images), run.record.images, strict=True):
        entries = read_input_entries(sample)
        names = sample.get("stills") or [sample["file"]]
        float_names = sample.get("float_stills") or [sample.get("float")]
        for position, name in enumerate(names):
            float_name = float_names[position] if position < len(float_names) else None
            found[key._replace(frame=name_frame(sample, name))] = SampleFiles(
                image=folder / name,
                float_image=folder / float_name if float_name else None,
                psnr=sample.get("psnr_db"),
                inputs=list_input_images(entries, position, folder),
                input_names=" · ".join(list_file_names(sample)),
                arguments=list_arguments(sample),
            )
    return found


def list_sample_keys(samples: Sequence[Mapping[str, Any]]) -> list[SampleKey]:
    """The key of each sample: equal in two runs where both generated the same thing.

    Args:
        samples: entries of metrics.json.
    """
    num_seen: Counter[SampleKey] = Counter()
    keys = []
    for sample in samples:
        key = SampleKey(
            prompt=str(sample.get("prompt", "")),
            seed=int(sample.get("seed", 0)),
            inputs=tuple((entry.column, entry.sha256) for entry in read_input_entries(sample)),
        )
        num_seen[key] += 1
        keys.append(key._replace(repeat=num_seen[key]))
    return keys


def list_input_images(entries: Sequence[InputEntry], still: int, folder: Path) -> list[InputImageFile]:
    """What is shown of the inputs beside a still of a sample.

    Args:
        entries: the inputs.
        still: its position among the sample's stills; 0 for an image.
        folder: of the run.
    """
    compared = find_compared_input(entries)
    shown = []
    for entry in entries:
        image = entry.get_image(still)
        path = None if image is None else folder / image
        shown.append(InputImageFile(entry.label, path, is_compared=entry is compared))
    return shown


def name_frame(sample: Mapping[str, object], still: str) -> str:
    """Which frame a still shows, from its name: `000_fox_s0_first.png` -> `first`; empty for an image."""
    if not sample.get("stills"):
        return ""
    return Path(still).stem.removeprefix(f"{Path(str(sample['file'])).stem}_")
