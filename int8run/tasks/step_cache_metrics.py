"""What a step cache skipped, what that saved, and which part of the loss is its own.

`tasks.run` asks for it. Three comparisons tell the parts apart: INT8 without the cache to float is the loss
of INT8, INT8 with the cache to INT8 without it is that of the cache, and INT8 with the cache to float is of
both.
"""

from collections.abc import Mapping

from int8run.generate.generate import Generation
from int8run.metrics.names import STEPS_SKIPPED_SHARE
from int8run.metrics.quality import compute_mean, compute_sample_psnr
from int8run.metrics.speed import average_step_ms
from int8run.tasks.step_cache_setup import FLOAT_WITH_CACHE, INT8_WITHOUT_CACHE


def measure_step_cache(
    candidate: Generation,
    variants: Mapping[str, Generation],
    baseline: Generation | None,
    timed_float: Generation | None,
) -> dict[str, float]:
    """Measure a step cache.

    Args:
        candidate: of the INT8 model with the cache.
        variants: INT8_WITHOUT_CACHE and FLOAT_WITH_CACHE, as far as they were generated.
        baseline: of the float model; None: it did not run.
        timed_float: the generation that has the float model's times in this run, if any.

    Returns:
        Metrics by their public names; nothing without a cache.
    """
    counts = candidate.step_counts
    if counts is None:
        return {}
    step_ms = average_step_ms(candidate)
    metrics = {
        "cache/steps_computed": counts.computed,
        "cache/steps_skipped": counts.skipped,
        "cache/macs_skipped_share": counts.macs_skipped_share,
        STEPS_SKIPPED_SHARE: counts.skipped_share,
        "cache/step_ms_mean": step_ms,
    }
    int8 = variants.get(INT8_WITHOUT_CACHE)
    if int8 is not None:
        metrics["cache/ratio_vs_int8"] = average_step_ms(int8) / step_ms
        metrics["cache/psnr_to_int8_db"] = average_psnr(candidate, int8)
        metrics |= compare_with_float("int8", int8, baseline, timed_float)
    cached_float = variants.get(FLOAT_WITH_CACHE)
    if cached_float is not None:
        metrics |= compare_with_float("float", cached_float, baseline, timed_float)
    return metrics


def compare_with_float(
    name: str, generation: Generation, baseline: Generation | None, timed_float: Generation | None
) -> dict[str, float]:
    """`cache/<name>_psnr_db` and `cache/<name>_ratio`: the loss and the speed of one model beside float.

    Args:
        name: of the model in the metrics.
        generation: of it.
        baseline: of the float model, if it ran.
        timed_float: the generation that has its times in this run, if any.
    """
    metrics = {}
    if baseline is not None:
        metrics[f"cache/{name}_psnr_db"] = average_psnr(generation, baseline)
    if timed_float is not None:
        metrics[f"cache/{name}_ratio"] = average_step_ms(timed_float) / average_step_ms(generation)
    return metrics


def average_psnr(generation: Generation, other: Generation) -> float:
    """The mean over samples of the PSNR of one generation to another, in dB; infinite where all are equal."""
    pairs = zip(generation.frames, other.frames, strict=True)
    return compute_mean([compute_sample_psnr(frames, other_frames) for frames, other_frames in pairs])
