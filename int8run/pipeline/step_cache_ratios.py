"""Measures the ratios that `cache_steps=magcache` estimates its errors by, on calibration prompts."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from int8run.generate.generate import GenerationHooks, generate
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling
from int8run.pipeline.step_cache import CacheSwitch


def measure_ratios(
    switch: CacheSwitch, component: str, samples: Sequence[Sample], sampling: Sampling
) -> dict[str, list[float]]:
    """Generate some images and measure how much larger each step's residual is than that of the step before.

    Args:
        switch: the cache without ratios: it skips nothing then.
        component: the pipeline's name for the denoiser.
        samples: of the calibration.
        sampling: of the run.

    Returns:
        The mean over samples and prompts for each step, by the prefix of the denoiser's layers.
    """
    seen: dict[tuple[str, int, str], list[float]] = {}
    num_batches = 0

    def count_batch(*_: Any) -> None:
        nonlocal num_batches
        num_batches += 1
        switch.start()

    def note_ratios(fraction: float) -> None:
        # the pipeline's end forgets them, so that they are read after each step
        for part in switch.parts:
            for name, ratios in part.read_ratios().items():
                seen[part.prefix, num_batches, name] = ratios
        switch.begin_step()

    def end_batch(*_: Any) -> None:
        switch.stop()

    hooks = GenerationHooks(before_batch=count_batch, on_batch=end_batch, on_fraction=note_ratios)
    latents_only = replace(sampling, extra={**sampling.extra, "output_type": "latent"})
    try:
        generate(switch.pipe, component, {"": switch.denoiser}, samples, latents_only, hooks=hooks)
    finally:
        switch.stop()
    by_prefix = defaultdict(list)
    for (prefix, _, _), ratios in seen.items():
        by_prefix[prefix].append(ratios)
    return {prefix: average_steps(measured) for prefix, measured in by_prefix.items()}


def average_steps(measured: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each step over lists of one number per step, of which some may be shorter."""
    means = []
    for numbers in zip_longest(*measured):
        means.append(statistics.fmean(number for number in numbers if number is not None))
    return means
