"""The rows and headings of a run's `grid.png`: inputs, float, INT8 and difference side by side.

Called by `tasks.run_outputs`, which saves the grid. How it is drawn is `report.image_files`'s.
"""

from collections.abc import Mapping, Sequence

from PIL.Image import Image

from int8run.config.run_spec import RunSpec
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import MASK_IMAGE
from int8run.metrics.key_frames import select_key_frames
from int8run.report.image_files import (
    DIFFERENCE_GAIN,
    STRIP_COLUMNS,
    GridHeading,
    GridRow,
    make_difference_image,
    make_image_strip,
)
from int8run.report.sample_entry import describe_inputs
from int8run.tasks.build_description import name_candidate
from int8run.tasks.input_images import InputImages
from int8run.tasks.run_metrics import RunComparison


def name_grid_columns(spec: RunSpec, comparison: RunComparison) -> list[GridHeading]:
    """The headings of the grid.

    Args:
        spec: the settings.
        comparison: of all samples.
    """
    columns: list[GridHeading] = []
    if any(sample.inputs.files for sample in comparison.samples):
        columns.append(name_inputs(comparison.samples))
    if comparison.baseline is None:
        return [*columns, name_candidate(spec)]
    return [*columns, "float", name_candidate(spec), f"difference x {DIFFERENCE_GAIN}"]


def name_inputs(samples: Sequence[Sample]) -> GridHeading:
    """What stands above the inputs: `image` and `mask`; `input` where samples have different ones."""
    labels_of_samples = {label_inputs(sample) for sample in samples if sample.inputs.files}
    if len(labels_of_samples) > 1:
        return "input"
    (labels,) = labels_of_samples
    return labels if len(labels) <= STRIP_COLUMNS else "input"


def label_inputs(sample: Sample) -> tuple[str, ...]:
    """A label for each input of a sample: its column, once where a column has several files."""
    labels: list[str] = []
    for column, files in sample.inputs.files.items():
        label = "mask" if column == MASK_IMAGE else column.replace("_", " ")
        labels += [label, *[""] * (len(files) - 1)]
    return tuple(labels)


def make_grid_rows(
    comparison: RunComparison,
    index: int,
    entry: Mapping[str, object],
    inputs: Sequence[InputImages] | None,
) -> list[GridRow]:
    """Make the row of a sample in the grid; for a video one row for each key frame, below a caption.

    Args:
        comparison: of all samples.
        index: of the sample.
        entry: of the sample in metrics.json.
        inputs: that it began with; None where the grid has no column for them.
    """
    sample = comparison.samples[index]
    frames = comparison.candidate.frames[index]
    captions = [f"{sample.prompt} · seed {sample.seed}"]
    about_inputs = describe_inputs(entry)
    if about_inputs:
        captions.append(about_inputs)
    is_video = len(frames) > 1
    # an image stands below its last caption, a video's key frames have captions of their own
    rows: list[GridRow] = [(caption, []) for caption in (captions if is_video else captions[:-1])]
    for position, number in enumerate(select_key_frames(len(frames)).values()):
        caption = f"frame {number + 1} of {len(frames)}" if is_video else captions[-1]
        images: list[Image | None] = []
        if inputs is not None:
            images.append(make_input_cell(inputs, position, frames[0].size))
        images += make_grid_images(comparison, index, number)
        rows.append((caption, images))
    return rows


def make_input_cell(inputs: Sequence[InputImages], key_frame: int, size: tuple[int, int]) -> Image | None:
    """The inputs beside a key frame, side by side; None without any.

    Args:
        inputs: of the sample.
        key_frame: of its result, counted from 0.
        size: width and height of its result.
    """
    if not inputs:
        return None
    return make_image_strip([one.get_image(key_frame) for one in inputs], size)


def make_grid_images(comparison: RunComparison, index: int, frame: int) -> list[Image]:
    """The images of a row: that of the candidate; with a baseline between the float one and the difference.

    Args:
        comparison: of all samples.
        index: of the sample.
        frame: of the sample.
    """
    image = comparison.candidate.frames[index][frame]
    if comparison.baseline is None:
        return [image]
    float_image = comparison.baseline.frames[index][frame]
    return [float_image, image, make_difference_image(image, float_image)]
