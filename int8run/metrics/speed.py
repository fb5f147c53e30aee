"""Speed of a generation, from step times that were taken with the device synchronized."""

import statistics
from collections.abc import Sequence

import numpy as np

from int8run.generate.generate import Generation


def list_step_times(generation: Generation) -> list[float]:
    """All step times in milliseconds.

    The first step of each batch, which includes text encoding, is left out where there are others.
    """
    times = []
    for batch in generation.step_seconds:
        timed = batch[1:] or batch
        times += [1000 * seconds for seconds in timed]
    return times


def compute_speed(candidate: Generation, baseline: Generation | None) -> dict[str, float]:
    """Step times, rates, and the ratio to the float model.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model, generated in turn with the candidate; None: there is no ratio.

    Returns:
        `speed/step_ms_p50`, `speed/step_ms_p90`, `speed/images_per_s`, for videos `speed/frames_per_s`, and
        with a baseline `speed/ratio_vs_float`, the ratio of the medians.
    """
    step_times = list_step_times(candidate)
    seconds = sum(candidate.image_seconds)
    metrics = {
        "speed/step_ms_p50": statistics.median(step_times),
        "speed/step_ms_p90": compute_percentile(step_times, 0.9),
        "speed/images_per_s": len(candidate.image_seconds) / seconds,
    }
    if candidate.is_video:
        metrics["speed/frames_per_s"] = sum(map(len, candidate.frames)) / seconds
    if baseline is not None:
        float_median = statistics.median(list_step_times(baseline))
        metrics["speed/ratio_vs_float"] = float_median / metrics["speed/step_ms_p50"]
    return metrics


def compute_percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least a share of all does not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))
