"""Speed of a generation, from step times that were taken device-synchronised."""

import statistics

import numpy as np

from int8run.generate.generate import Generation


def list_step_times(made: Generation) -> list[float]:
    """All step times in milliseconds, the first step of each batch left out where there are others: it holds text encoding."""
    return [1000 * s for batch in made.step_seconds for s in (batch[1:] or batch)]


def compute_speed(candidate: Generation, baseline: Generation | None) -> dict[str, float]:
    """Percentiles of the candidate's steps, its pictures or videos per second, and the median ratio to an interleaved baseline.

    `speed/frames_per_s` comes with videos.
    """
    ours = list_step_times(candidate)
    values = {
        "speed/step_ms_p50": statistics.median(ours),
        "speed/step_ms_p90": compute_percentile(ours, 0.9),
        "speed/images_per_s": len(candidate.image_seconds) / sum(candidate.image_seconds),
    }
    if candidate.is_video:
        values["speed/frames_per_s"] = sum(map(len, candidate.frames)) / sum(candidate.image_seconds)
    if baseline is not None:
        values["speed/ratio_vs_float"] = (
            statistics.median(list_step_times(baseline)) / values["speed/step_ms_p50"]
        )
    return values


def compute_percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    return float(np.quantile(values, share, method="inverted_cdf"))
