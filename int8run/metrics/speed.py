"""Speed of a generation, from step times that were taken with the device synchronized.

Where several denoisers take turns within an image (`int8.steps`), a median over all steps would be the time
of whichever computes most of them. The time of a step is then the mean of their medians, each counted as
often as it computes.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from int8run.generate.generate import Generation
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import compute_interval
from int8run.metrics.names import HIGH, LOW, SPEED_RATIO

BLOCK_STEPS = 4  # steps that count as one measurement where a run has few batches


def list_step_times(generation: Generation) -> list[float]:
    """All step times in milliseconds.

    The first step of each batch, which includes text encoding, is left out where there are others.
    """
    times = []
    for batch in generation.step_seconds:
        timed = batch[1:] or batch
        times += [1000 * seconds for seconds in timed]
    return times


def average_step_ms(generation: Generation) -> float:
    """The mean time of a step in milliseconds, the median over batches of it.

    Where a step cache skips steps the median of all steps would be that of one kind of them.
    """
    means = [statistics.fmean(limit_first_step(batch)) for batch in generation.step_seconds]
    return 1000 * statistics.median(means)


def limit_first_step(step_seconds: Sequence[float]) -> list[float]:
    """Step times of a batch, of which the first counts as the longest of the others at most.

    Text encoding is in the first one. Leaving it out, as where no cache skips steps, would flatter a cache:
    every cache computes that step.
    """
    first, *others = step_seconds
    return [min(first, max(others)), *others] if others else [first]


def select_main_steps(generation: Generation) -> list[list[float]]:
    """The step times of each batch in seconds, the first one included; of several denoisers those of one.

    That is the one which computes most steps.
    """
    main = find_main_denoiser(generation)
    if main is None:
        return generation.step_seconds
    selected = []
    for seconds, names in zip(generation.step_seconds, generation.step_denoisers, strict=True):
        own = [time for time, name in zip(seconds, names, strict=True) if name == main]
        # the first step, which other functions leave out, is in the list whoever computed it
        selected.append(own if names[0] == main else [seconds[0], *own])
    return selected


def find_main_denoiser(generation: Generation) -> str | None:
    """Of several denoisers that took turns the one with most steps; None: one computed all."""
    counts = generation.steps_by_denoiser
    return max(counts, key=lambda name: counts[name]) if counts else None


def list_times_by_denoiser(generation: Generation, known_ms: Mapping[str, float]) -> dict[str, list[float]]:
    """The step times in milliseconds of each of several denoisers that took turns.

    Args:
        generation: with its step times.
        known_ms: times of denoisers that are known from elsewhere. They stand in for one that computed first
            steps alone, whose times include text encoding.
    """
    first_steps: dict[str, list[float]] = {}
    later_steps: dict[str, list[float]] = {}
    for seconds, names in zip(generation.step_seconds, generation.step_denoisers, strict=True):
        for step, (time, name) in enumerate(zip(seconds, names, strict=True)):
            times = later_steps if step else first_steps
            times.setdefault(name, []).append(1000 * time)
    known = {name: [time] for name, time in known_ms.items() if name in first_steps}
    return {**first_steps, **known, **later_steps}


def compute_step_ms(
    generation: Generation, known_ms: Mapping[str, float], statistic: Callable[[Sequence[float]], float]
) -> float:
    """A statistic of all step times in milliseconds; of several denoisers the mean over the steps of theirs.

    Args:
        generation: with its step times.
        known_ms: as for `list_times_by_denoiser`.
        statistic: of a list of times.
    """
    if not generation.step_denoisers:
        return statistic(list_step_times(generation))
    total = 0.0
    counts = generation.steps_by_denoiser
    for name, times in list_times_by_denoiser(generation, known_ms).items():
        total += counts[name] * statistic(times)
    return total / sum(counts.values())


def compute_speed(candidate: Generation, baseline: Generation | None) -> dict[str, float]:
    """Step times, rates, and the ratio to the float model.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model, generated in turn with the candidate; None: there is no ratio.

    Returns:
        `speed/step_ms_p50`, `speed/step_ms_p90`, `speed/images_per_s`, for videos `speed/frames_per_s`, and
        with a baseline `speed/ratio_vs_float`, the ratio of the medians, or where the candidate has a step
        cache that of the means.
    """
    known_ms = {}
    if baseline is not None:
        known_ms["float"] = statistics.median(list_step_times(baseline))
    seconds = sum(candidate.image_seconds)
    metrics = {
        "speed/step_ms_p50": compute_step_ms(candidate, known_ms, statistics.median),
        "speed/step_ms_p90": compute_step_ms(candidate, known_ms, partial(compute_percentile, share=0.9)),
        "speed/images_per_s": len(candidate.image_seconds) / seconds,
    }
    if candidate.is_video:
        metrics["speed/frames_per_s"] = sum(map(len, candidate.frames)) / seconds
    if baseline is not None and candidate.step_counts is not None:
        metrics["speed/ratio_vs_float"] = average_step_ms(baseline) / average_step_ms(candidate)
    elif baseline is not None:
        metrics["speed/ratio_vs_float"] = known_ms["float"] / metrics["speed/step_ms_p50"]
    return metrics


def pair_blocks(
    candidate: Generation, baseline: Generation, least_batches: int
) -> tuple[list[float], list[float]]:
    """The step times of both models in milliseconds, one for each stretch in which they took turns.

    A stretch is a batch, whose median counts; its mean where the candidate has a step cache. Steps of one
    batch share what else the machine did, so they are no measurements of their own; only where there are few
    batches each is split into blocks of BLOCK_STEPS, and not with a step cache, which skips more in some
    parts of a call than in others. Of denoisers that take turns the one with most steps counts.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model, generated in turn with it.
        least_batches: fewer than these are split.

    Returns:
        Of the candidate and of the float model, as many.
    """
    candidate_blocks: list[float] = []
    float_blocks: list[float] = []
    has_cache = candidate.step_counts is not None
    summarize = statistics.fmean if has_cache else statistics.median
    is_split = len(candidate.step_seconds) < least_batches
    for batch, float_batch in zip(select_main_steps(candidate), select_main_steps(baseline), strict=False):
        if has_cache:
            blocks, float_blocks_of_batch = [limit_first_step(batch)], [limit_first_step(float_batch)]
        else:
            blocks = split_into_blocks(batch, is_split=is_split)
            float_blocks_of_batch = split_into_blocks(float_batch, is_split=is_split)
        # a float model that is only timed makes fewer steps
        for block, float_block in zip(blocks, float_blocks_of_batch, strict=False):
            candidate_blocks.append(1000 * summarize(block))
            float_blocks.append(1000 * summarize(float_block))
    return candidate_blocks, float_blocks


def split_into_blocks(step_seconds: Sequence[float], *, is_split: bool) -> list[list[float]]:
    """The timed steps of a batch in blocks of BLOCK_STEPS; what is left over belongs to the last block.

    Args:
        step_seconds: of all steps.
        is_split: False: the whole batch is one block.
    """
    timed = list(step_seconds[1:] or step_seconds)
    num_blocks = max(1, len(timed) // BLOCK_STEPS) if is_split else 1
    starts = [BLOCK_STEPS * number for number in range(num_blocks)]
    return [timed[start:end] for start, end in zip(starts, [*starts[1:], len(timed)], strict=True)]


def bound_speed_ratio(
    step_ms: Sequence[float], float_step_ms: Sequence[float], ratio: float, settings: IntervalSettings
) -> dict[str, float]:
    """The interval of a ratio to float, from the ratios of the stretches in which both took turns.

    It is that of the mean logarithm, as wide as these ratios scatter, around the ratio of the medians.

    Args:
        step_ms: of the candidate, by stretch.
        float_step_ms: of the float model.
        ratio: `speed/ratio_vs_float`.
        settings: of the interval.

    Returns:
        `speed/ratio_vs_float_low` and `_high`; nothing for a single stretch.
    """
    ratios = np.log(np.asarray(float_step_ms) / np.asarray(step_ms))
    interval = compute_interval(ratios, settings)
    if interval is None:
        return {}
    middle = float(ratios.mean())
    return {
        f"{SPEED_RATIO}{LOW}": ratio * math.exp(interval.low - middle),
        f"{SPEED_RATIO}{HIGH}": ratio * math.exp(interval.high - middle),
    }


def compute_percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least a share of all does not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))
