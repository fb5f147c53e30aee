"""Errors of a video that its single frames do not show: flicker, and drift from the image it begins with.

Called by `tasks.input_metrics`. Knows frames, not pipelines or files.
"""

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from int8run.metrics.edits import SquaredError, read_pixels, resize_to_output, subtract_pixels

FRAME_ERROR, FLICKER_ERROR = "frame_err", "flicker_err"
DRIFT, FLOAT_DRIFT = "drift", "float/drift"


def measure_flicker(frames: Sequence[Image], float_frames: Sequence[Image]) -> dict[str, float]:
    """How much of INT8's error moves from frame to frame.

    With frames x of the INT8 model and y of the float model, colors in 0..1:
    `flicker_err` is the root mean square of (x[t+1] - x[t]) - (y[t+1] - y[t]) over all neighbours t, t+1,
    and `frame_err` that of x[t] - y[t] over all frames. An error that stands still has no flicker; one that
    is new in each frame has √2 of the frames' own.

    Args:
        frames: of the INT8 model.
        float_frames: of the float model, as many.

    Returns:
        Both by name; empty for an image, which has no neighbours.
    """
    if len(frames) < 2:
        return {}
    frame_error, flicker_error = SquaredError(), SquaredError()
    earlier = None
    for frame, float_frame in zip(frames, float_frames, strict=True):
        differences = subtract_pixels(read_pixels(frame), read_pixels(float_frame))
        frame_error.add(differences)
        if earlier is not None:
            # (x1 - x0) - (y1 - y0) = (x1 - y1) - (x0 - y0)
            flicker_error.add(differences - earlier)
        earlier = differences
    return {FLICKER_ERROR: flicker_error.compute_rms(), FRAME_ERROR: frame_error.compute_rms()}


def measure_drift(frames: Sequence[Image], first_frame: Image) -> list[float]:
    """How far each frame is from the image that the video begins with.

    The root mean square of the differences of their colors in 0..1, with the image resized to the frames as
    pipelines resize it.

    Args:
        frames: of a video.
        first_frame: the input.
    """
    start = read_pixels(resize_to_output(first_frame.convert("RGB"), frames[0].size))
    drift = []
    for frame in frames:
        error = SquaredError()
        error.add(subtract_pixels(read_pixels(frame), start))
        drift.append(error.compute_rms())
    return drift


def compare_drift(
    frames: Sequence[Image], float_frames: Sequence[Image], first_frame: Image
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The drift of both videos from the image that they begin with.

    Args:
        frames: of the INT8 model.
        float_frames: of the float model, as many.
        first_frame: the input.

    Returns:
        The mean over frames of each model's drift, and both for each frame.
    """
    drift = measure_drift(frames, first_frame)
    float_drift = measure_drift(float_frames, first_frame)
    rows = [{DRIFT: own, FLOAT_DRIFT: other} for own, other in zip(drift, float_drift, strict=True)]
    return {DRIFT: float(np.mean(drift)), FLOAT_DRIFT: float(np.mean(float_drift))}, rows
