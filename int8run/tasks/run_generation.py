"""The generation of a run: both models in turn, after a warm-up, or a few steps of one to time it.

`tasks.run` calls `generate_all`. What is measured of the result is not known here.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from int8run.config.run_spec import RunSpec
from int8run.generate.generate import Differences, Generation, GenerationHooks, generate
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.prompts import Sample
from int8run.generate.step_count import count_asked_steps
from int8run.layers.plan import FLOAT, INT8
from int8run.metrics.energy import open_energy_meter
from int8run.metrics.memory import read_peak_bytes, reset_peak_memory
from int8run.models.sampling import Sampling, drop_schedule
from int8run.pipeline import process_cache
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.step_cache import StepCaches
from int8run.tasks.run_inputs import RunInputs
from int8run.tasks.step_cache_setup import list_variants, make_step_caches

log = logging.getLogger(__name__)

WARM_UP_STEPS = 2
WARM_UP_SCHEDULE = ((0.0, FLOAT), (0.5, INT8))  # where both denoisers share the steps: one for each
FLOAT_TIMING = "float_timing"  # name of a generation that only times the float model
TIMING_STEPS = 4  # of each batch; the first one is not counted


def generate_all(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> dict[str, Generation]:
    """Generate with the float model and the candidate in turn, after a short warm-up that is not timed.

    Args:
        spec: the settings.
        built: the model, at the strengths of the LoRAs.
        inputs: samples, and what saves each image when it is there.

    Returns:
        The candidate's generation under its name, and `float` with `metrics.baseline=run`. Where the float
        images are those of an earlier job there is FLOAT_TIMING, too: a few steps of the float model now.
        With a step cache also INT8_WITHOUT_CACHE and FLOAT_WITH_CACHE, as far as they are asked for.
    """
    candidate = spec.candidate
    names = [candidate]
    images_key = repr((spec.float_key, inputs.samples))
    known_float = None
    if spec.runs_both_models:
        names = ["float", candidate]
        known_float = process_cache.get(images_key)
    if known_float is not None:
        log.info(
            "the float images are those of an earlier job with the same settings; "
            "its speed is measured again, with a few steps beside each batch"
        )
    denoisers = {name: built.denoisers[name] for name in names}
    variants = list_variants(spec)
    denoisers |= {name: built.denoisers[owner] for name, owner in variants.items()}
    caches = StepCaches(make_step_caches(spec, built, inputs))
    with caches.removed_at_end():
        run_warm_up(spec, built, denoisers, inputs.get_first_batch(spec), caches)
        generations = generate_in_turn(
            spec, built, denoisers, inputs, caches, only_times_float=known_float is not None
        )
    # a schedule has left its last strengths
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    if known_float is not None:
        float_timing = generations.pop("float")
        return {"float": known_float, FLOAT_TIMING: float_timing, **generations}
    if "float" in generations:
        process_cache.put(images_key, generations["float"], generations["float"].nbytes)
    return generations


def generate_in_turn(
    spec: RunSpec,
    built: BuiltModel,
    denoisers: Mapping[str, torch.nn.Module],
    inputs: RunInputs,
    caches: StepCaches,
    *,
    only_times_float: bool,
) -> dict[str, Generation]:
    """Generate with each denoiser in turn, and save each image when it is there.

    Args:
        spec: the settings.
        built: the model.
        denoisers: by name.
        inputs: samples, and what saves their images.
        caches: step caches of some of the denoisers.
        only_times_float: whether `float` runs a few steps only and makes no images.
    """
    variants = list_variants(spec)
    models_with_images = [name for name in denoisers if name not in variants]
    other_samplings = {}
    if only_times_float:
        models_with_images.remove("float")
        other_samplings["float"] = shorten_for_timing(built.pipe, inputs.samples, spec.sampling)
    num_images = len(inputs.samples) * len(models_with_images)
    recording = nullcontext() if built.vae is None else built.vae.recording()
    with recording, inputs.progress.track_loop("Generating", num_images, line_each=True) as advance:
        hooks = make_hooks(
            spec, built, inputs, caches, models_with_images=models_with_images, advance=advance
        )
        return generate(
            built.pipe,
            built.component,
            denoisers,
            inputs.samples,
            spec.sampling,
            hooks=hooks,
            differences=Differences(
                built.text_encoders,
                other_samplings,
                built.components,
                owners=variants,
                step_denoisers=built.list_step_denoisers(spec.int8.steps, spec.offload),
            ),
        )


def make_hooks(
    spec: RunSpec,
    built: BuiltModel,
    inputs: RunInputs,
    caches: StepCaches,
    *,
    models_with_images: Collection[str],
    advance: Callable[[int], None],
) -> GenerationHooks:
    """What happens beside the generation of each batch: memory, energy, images, strengths of a schedule.

    Args:
        spec: the settings.
        built: the model.
        inputs: what saves images.
        caches: step caches of some of the denoisers.
        models_with_images: names of the denoisers whose images are kept.
        advance: is told how many images came.
    """
    meter = open_energy_meter(built.device)

    def start_batch(name: str) -> None:
        caches.start(name)
        reset_peak_memory(built.device)
        meter.start()

    def begin_step(fraction: float) -> None:
        meter.update()
        caches.begin_step(fraction)
        if spec.lora.is_scheduled:
            built.set_strengths(spec.lora.get_strengths_at(fraction), spec.lora.text_strengths)

    def keep_batch(name: str, batch: Sequence[Sample], generation: Generation) -> None:
        generation.joules += meter.stop()
        caches.stop(generation)
        generation.peak_bytes = max(generation.peak_bytes, read_peak_bytes(built.device))
        if name in models_with_images:
            inputs.writer.write_batch(name, batch, generation, built.pipe)
            advance(len(batch))

    return GenerationHooks(
        before_batch=start_batch,
        on_batch=keep_batch,
        on_fraction=begin_step,
    )


def run_warm_up(
    spec: RunSpec,
    built: BuiltModel,
    denoisers: Mapping[str, torch.nn.Module],
    batch: Sequence[Sample],
    caches: StepCaches,
) -> None:
    """Generate one batch with a few steps, which compiles kernels and fills caches before anything is timed.

    Args:
        spec: the settings.
        built: the model.
        denoisers: that are timed later.
        batch: samples of one batch.
        caches: step caches of some of the denoisers.
    """
    steps = WARM_UP_SCHEDULE if spec.int8.has_float_steps else None
    # forget the prompts that earlier jobs asked for
    PromptCache.for_pipeline(built.pipe).requested.clear()
    generate(
        built.pipe,
        built.component,
        denoisers,
        batch,
        shorten_sampling(built.pipe, batch, spec.sampling, WARM_UP_STEPS),
        hooks=GenerationHooks(
            before_batch=caches.start,
            on_batch=lambda name, batch, generation: caches.stop(generation),
            on_fraction=caches.begin_step,
        ),
        differences=Differences(
            built.text_encoders,
            components=built.components,
            owners=list_variants(spec),
            step_denoisers=built.list_step_denoisers(steps, spec.offload),
        ),
    )


def shorten_sampling(pipe: Any, batch: Sequence[Sample], sampling: Sampling, steps: int) -> Sampling:
    """The same sampling with fewer steps, and without `sigmas` or `timesteps`, which fix their number.

    Args:
        pipe: to be called.
        batch: what it generates.
        sampling: how.
        steps: that a call takes, whatever the strength.
    """
    return replace(drop_schedule(sampling), steps=count_asked_steps(pipe, batch, sampling, steps))


def shorten_for_timing(pipe: Any, samples: Sequence[Sample], sampling: Sampling) -> Sampling:
    """A sampling of a few steps, to time a model; it makes no image.

    Args:
        pipe: to be called.
        samples: that it generates.
        sampling: how.
    """
    steps = min(sampling.steps or TIMING_STEPS, TIMING_STEPS)
    shortened = shorten_sampling(pipe, samples, sampling, steps)
    return replace(shortened, extra={**shortened.extra, "output_type": "latent"})
