"""Opens the inputs of a sample for what comes after its result: measuring, the grid, the report.

Called by `tasks.run` and `tasks.run_outputs`. A pipeline's own arguments are made elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from int8run.generate.media import open_image, open_mask, open_video
from int8run.generate.prompts import slugify
from int8run.generate.sample_inputs import (
    IMAGE,
    MASK_IMAGE,
    VIDEO,
    InputFile,
    SampleInputs,
    is_mask_column,
    is_video_column,
)
from int8run.metrics.edits import EditSource, resize_to_output
from int8run.metrics.key_frames import select_key_frames
from int8run.report.image_files import fit_into, save_whole
from int8run.report.sample_entry import COMPARED_COLUMNS

HASH_LENGTH = 8  # hexadecimal digits of an input's content in the name of its image


@dataclass(frozen=True)
class InputImages:
    """What is shown of one input file.

    Args:
        column: that the file stands in.
        file: the input.
        images: one, or those of a video that stand beside the key frames of its result.
        key_frames: what these are called; empty for an image.
    """

    column: str
    file: InputFile
    images: Sequence[Image]
    key_frames: Sequence[str] = ()

    def get_image(self, key_frame: int) -> Image:
        """The image beside a key frame of the result, counted from 0."""
        return self.images[min(key_frame, len(self.images) - 1)]

    def name_files(self) -> list[str]:
        """A file name for each image: equal for equal contents, different for different ones."""
        name = f"input_{slugify(Path(self.file.name).stem)}_{self.file.sha256[:HASH_LENGTH]}"
        if is_mask_column(self.column):
            name += "_mask"
        width, height = self.images[0].size
        endings = [f"_{key_frame}" for key_frame in self.key_frames] or [""]
        return [f"{name}_{width}x{height}{ending}.png" for ending in endings]

    def save(self, folder: Path) -> list[str]:
        """Save the images that the folder does not have yet.

        Returns:
            The names of their files.
        """
        names = self.name_files()
        for name, image in zip(names, self.images, strict=True):
            if not (folder / name).exists():
                save_whole(image, folder / name)
        return names


def open_input_images(inputs: SampleInputs, frames: Sequence[Image]) -> list[InputImages]:
    """Open every input file of a sample, as large as its result.

    The one that the report lays over the result is resized as pipelines resize it, and so are masks; others
    keep their shape.

    Args:
        inputs: of the sample.
        frames: that were generated.

    Raises:
        FileError: when one cannot be read any more.
    """
    key_frames = select_key_frames(len(frames))
    size = frames[0].size
    compared = find_compared_column(inputs.files)
    opened = []
    for column, files in inputs.files.items():
        for number, file in enumerate(files):
            is_compared = column == compared and number == 0
            is_stretched = is_compared or is_mask_column(column)
            resize = resize_to_output if is_stretched else fit_into
            shown = open_shown_frames(column, file, key_frames)
            images = [resize(image, size) for image in shown]
            names = tuple(key_frames) if is_video_column(column) and len(frames) > 1 else ()
            opened.append(InputImages(column, file, images, names))
    return opened


def find_compared_column(files: Mapping[str, Sequence[InputFile]]) -> str | None:
    """The column whose first file the result is compared with; None where there is none."""
    return next((column for column in COMPARED_COLUMNS if column in files), None)


def open_shown_frames(column: str, file: InputFile, key_frames: Mapping[str, int]) -> list[Image]:
    """What is shown of an input file: an image, or the frames of a video at the result's key frames.

    Args:
        column: that it stands in.
        file: the input.
        key_frames: numbers of the result's key frames, by name. A shorter video has its last frame there.
    """
    if is_mask_column(column):
        return [open_mask(file)]
    if not is_video_column(column):
        return [open_image(file)]
    frames = open_video(file)
    return [frames[min(number, len(frames) - 1)] for number in key_frames.values()]


def open_edit_source(inputs: SampleInputs, num_frames: int) -> EditSource:
    """What a sample's result is an edit of, and its masks.

    That is its video, or for an image its first one. A video that begins with an image is no edit of it.

    Args:
        inputs: of the sample.
        num_frames: of the result; 1 of an image.

    Raises:
        FileError: when a file cannot be read any more.
    """
    images: list[Image] = []
    if VIDEO in inputs.files:
        images = open_video(inputs.files[VIDEO][0])
    elif IMAGE in inputs.files and num_frames == 1:
        images = [open_image(inputs.files[IMAGE][0])]
    masks = [open_mask(file) for file in inputs.files.get(MASK_IMAGE, ())]
    return EditSource(images=images, masks=masks)


def open_first_frame(inputs: SampleInputs, num_frames: int) -> Image | None:
    """The image that a video begins with; None for an image, and where a video tells what is to be seen.

    Args:
        inputs: of the sample.
        num_frames: of the result; 1 of an image.

    Raises:
        FileError: when the file cannot be read any more.
    """
    is_driven = any(is_video_column(column) for column in inputs.files)
    if num_frames == 1 or IMAGE not in inputs.files or is_driven:
        return None
    return open_image(inputs.files[IMAGE][0])
