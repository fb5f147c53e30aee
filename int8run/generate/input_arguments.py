"""The arguments of a pipeline's call for the images, videos and further arguments of a sample.

`pipeline_call` asks for them. What a call takes is read by `call_inputs`; samples that do not fit were
refused before anything was loaded. Files are opened here, by `media`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from int8run.generate.call_inputs import (
    CONDITION_COLUMNS,
    CallInputs,
    find_object_class,
    is_list,
    load_facts,
    read_call_inputs,
)
from int8run.generate.media import open_image, open_mask, open_video
from int8run.generate.sample_inputs import (
    IMAGE,
    LAST_IMAGE,
    REFERENCE_IMAGES,
    STRENGTH,
    VIDEO,
    InputFile,
    SampleInputs,
    is_mask_column,
    is_video_column,
)
from int8run.models.sampling import NUM_FRAMES

Media = Any  # an image, or a video as the list of its frames


def build_input_arguments(
    pipe: DiffusionPipeline, inputs: SampleInputs, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call for the inputs of its sample.

    Args:
        pipe: to be called.
        inputs: of the only sample of the call.
        settings: the other arguments of the call.

    Raises:
        FileError: when an input cannot be read.
    """
    if inputs.is_empty:
        return {}
    call = read_call_inputs(type(pipe))
    opened = {column: [open_input(column, file) for file in files] for column, files in inputs.files.items()}
    arguments: dict[str, Any] = {}
    if call.condition is not None:
        columns = {column: opened.pop(column) for column in CONDITION_COLUMNS if column in opened}
        if columns:
            argument = call.arguments[IMAGE]
            arguments[argument] = build_conditions(call, columns, inputs.strength, settings)
    elif inputs.strength is not None:
        arguments[STRENGTH] = inputs.strength
    for argument, media in group_by_argument(call, opened).items():
        arguments[argument] = shape_argument(call, argument, media, arguments, settings)
    return {**arguments, **inputs.arguments}


def open_input(column: str, file: InputFile) -> Media:
    """An input as a call takes it: an image, a mask, or the frames of a video."""
    if is_video_column(column):
        return open_video(file)
    if is_mask_column(column):
        return open_mask(file)
    return open_image(file)


def group_by_argument(call: CallInputs, opened: Mapping[str, Sequence[Media]]) -> dict[str, list[Media]]:
    """What becomes each argument: of `image` and `reference_images` in one argument the image first.

    Args:
        call: what the pipeline takes.
        opened: the inputs, by column.
    """
    in_order = sorted(opened, key=lambda column: column == REFERENCE_IMAGES)
    # a mask may need the video that it is for
    in_order.sort(key=is_mask_column)
    grouped: dict[str, list[Media]] = {}
    for column in in_order:
        grouped.setdefault(call.arguments[column], []).extend(opened[column])
    return grouped


def shape_argument(
    call: CallInputs,
    argument: str,
    media: Sequence[Media],
    others: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Any:
    """Give an argument the form that the call wants: one thing, a list, frames, a tensor or an object.

    Args:
        call: what the pipeline takes.
        argument: its name.
        media: at least one image or video.
        others: arguments that are there already, such as the video of a mask.
        settings: of the call.
    """
    facts = load_facts()
    parameter = call.parameters[argument]
    first = media[0]
    if call.pipeline in facts.frame_tensors:
        return make_frame_tensor(first)
    condition = find_object_class(call.pipeline, parameter)
    if condition is not None:
        return [condition(frames=frames) for frames in media]
    if call.pipeline in facts.nested_images:
        return [list(media)]
    is_several = any(call.arguments.get(column) == argument for column in call.several)
    if is_several:
        return list(media)
    if is_list(parameter) and isinstance(first, Image):
        # one for each frame: a mask of a video
        return [first] * count_frames(call, others, settings)
    return first if len(media) == 1 else list(media)


def count_frames(call: CallInputs, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The number of frames of a call's video: of the given one, else of the one that it makes.

    Args:
        call: what the pipeline takes.
        arguments: for the inputs, as far as they are there.
        settings: of the call.
    """
    video = arguments.get(call.arguments.get(VIDEO, ""))
    if video is not None:
        return len(video)
    default = call.parameters[NUM_FRAMES].default if NUM_FRAMES in call.parameters else None
    return int(settings.get(NUM_FRAMES) or default or 1)


def build_conditions(
    call: CallInputs,
    columns: Mapping[str, Sequence[Media]],
    strength: float | None,
    settings: Mapping[str, Any],
) -> list[Any]:
    """The objects by which LTX's pipelines take images and videos at frames of the new video.

    Args:
        call: what the pipeline takes.
        columns: images and videos by column; a video begins with the first frame.
        strength: of each; None: that of their class.
        settings: of the call.
    """
    condition: Any = call.condition
    names = {item.name for item in fields(condition)}
    options: dict[str, Any] = {} if strength is None else {STRENGTH: strength}
    conditions = []
    for column, media in columns.items():
        kind = "frames"
        if kind not in names:
            kind = VIDEO if column == VIDEO else IMAGE
        place = find_place(call, names, settings, is_last=column == LAST_IMAGE)
        conditions += [condition(**{kind: frames}, **place, **options) for frames in media]
    return conditions


def find_place(
    call: CallInputs, names: Collection[str], settings: Mapping[str, Any], *, is_last: bool
) -> dict[str, int]:
    """Where a condition acts: LTX counts the frames of the video, LTX-2 those of its latents.

    Args:
        call: what the pipeline takes.
        names: of the condition's fields.
        settings: of the call.
        is_last: whether it is the end of the video; else its beginning.
    """
    if "frame_index" not in names:
        return {"index": -1 if is_last else 0}
    return {"frame_index": count_frames(call, {}, settings) - 1 if is_last else 0}


def make_frame_tensor(media: Media) -> Tensor:
    """Frames as a tensor [1, C, frames, height, width] of numbers from 0 to 1; an image is one frame."""
    frames = media if isinstance(media, list) else [media]
    arrays = [np.atleast_3d(np.asarray(frame, dtype=np.float32)) for frame in frames]
    stacked = torch.from_numpy(np.stack(arrays)) / 255  # [frames, height, width, C]
    return stacked.permute(3, 0, 1, 2).unsqueeze(0)
