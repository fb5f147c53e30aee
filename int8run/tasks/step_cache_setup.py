"""The step caches of a run: whether its models can have them, and what is measured before they can.

`tasks.run_generation` asks before it generates. Which modules a cache needs was checked before the weights
were read.
"""

import logging

from int8run.cache_steps.base import FEW_STEPS, CacheCalls, StepPosition
from int8run.config.run_spec import RunSpec
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.capture import capture_step
from int8run.generate.generate import set_components, set_text_encoders
from int8run.generate.step_count import count_taken_steps, get_strength
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.step_cache import CacheSwitch
from int8run.pipeline.step_cache_fit import check_cache_fits
from int8run.pipeline.step_cache_ratios import measure_ratios
from int8run.tasks.run_inputs import RunInputs

log = logging.getLogger(__name__)
# names of generations beside those of the float model and of the candidate, where that has a step cache
INT8_WITHOUT_CACHE = "int8_without_cache"
FLOAT_WITH_CACHE = "float_with_cache"


def list_variants(spec: RunSpec) -> dict[str, str]:
    """What generates besides both models where the INT8 one has a step cache, and which model that is."""
    variants = {}
    if spec.splits_loss:
        variants[INT8_WITHOUT_CACHE] = "int8"
    if spec.has_cached_float:
        variants[FLOAT_WITH_CACHE] = "float"
    return variants


def make_step_caches(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> dict[str, CacheSwitch]:
    """The step cache of each model that has one, by the name of its generation.

    Args:
        spec: the settings.
        built: the model.
        inputs: samples of the run.

    Raises:
        ConfigError: where a model cannot have it.
    """
    if not spec.has_step_cache:
        return {}
    num_steps = count_steps_of_call(spec, built, inputs)
    if num_steps <= FEW_STEPS:
        log.warning(
            "cache_steps=%s and %d steps: with so few hardly any can be skipped without a large loss",
            spec.cache_steps.name,
            num_steps,
        )
    # of a model that an earlier job used the pipeline may have the components of the float one
    set_text_encoders(built.pipe, spec.candidate, built.text_encoders.get(spec.candidate, {}))
    set_components(built.pipe, built.components.get(spec.candidate, {}))
    switch = make_switch(spec, built, inputs, spec.candidate, num_steps)
    ratios = measure_step_ratios(spec, built, inputs, switch)
    switch.ratios = ratios
    caches = {spec.candidate: switch}
    if spec.has_cached_float:
        cached_float = make_switch(spec, built, inputs, "float", num_steps)
        cached_float.ratios = ratios
        caches[FLOAT_WITH_CACHE] = cached_float
    return caches


def count_steps_of_call(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> int:
    """The steps that a call takes of those that it is told; FEW_STEPS + 1 where the sampler names none."""
    if spec.sampling.steps is None:
        return FEW_STEPS + 1
    strength = get_strength(read_call_inputs(type(built.pipe)), inputs.samples, spec.sampling)
    return count_taken_steps(spec.sampling.steps, strength)


def make_switch(
    spec: RunSpec, built: BuiltModel, inputs: RunInputs, model: str, num_steps: int
) -> CacheSwitch:
    """The step cache of one model, which can have it.

    Args:
        spec: the settings.
        built: the model.
        inputs: samples of the run.
        model: `int8` or `float`.
        num_steps: of a call.

    Raises:
        ConfigError: where it cannot.
    """
    denoiser = built.denoisers[model]
    batch = inputs.get_first_batch(spec)
    with inputs.progress.track_step(f"Trying the step cache on {model}"):
        captured = capture_step(built.pipe, built.component, denoiser, batch, spec.sampling)
        described = check_cache_fits(spec.cache_steps, denoiser, captured, len(batch))
    calls = CacheCalls(
        StepPosition(),
        num_calls=num_steps,
        is_batched=described.is_batched,
        output_format=described.output_format,
    )
    return CacheSwitch(built.pipe, denoiser, spec.cache_steps, calls, built.macs)


def measure_step_ratios(
    spec: RunSpec, built: BuiltModel, inputs: RunInputs, switch: CacheSwitch
) -> dict[str, list[float]]:
    """The ratios of `cache_steps=magcache`, measured and logged; empty where none are needed."""
    cache = spec.cache_steps
    if not cache.num_calibration_prompts:
        return {}
    samples = spec.calibration.samples[: cache.num_calibration_prompts]
    with inputs.progress.track_step(f"Measuring cache_steps.ratios on {len(samples)} calibration prompts"):
        ratios = measure_ratios(switch, built.component, samples, spec.sampling)
    for prefix, measured in ratios.items():
        shown = ", ".join(f"{ratio:.5g}" for ratio in measured)
        log.info("measured%s: cache_steps.ratios=[%s]", f" of {prefix.rstrip('.')}" if prefix else "", shown)
    return ratios
