"""`task=run`: one run on one screen. Build, generate with both models in turn, measure, write.

`options.Run` calls `run`. `run_metrics` has the numbers, `run_outputs` the files, `image_writer` the images.
How a model is built or a pipeline is called is not known here.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import FileError
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.capture import capture_step
from int8run.generate.generate import Differences, Generation, GenerationHooks, generate
from int8run.generate.generated_sampling import (
    describe_rounded,
    describe_skipped,
    is_skipped,
    list_rounded,
    read_generated_sampling,
)
from int8run.generate.input_files import read_samples
from int8run.generate.input_sizes import list_resized
from int8run.generate.negative_prompts import explain_unused_negative_prompt
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.prompts import Sample, split_batches
from int8run.generate.step_count import count_asked_steps, get_strength
from int8run.lora.header_info import (
    LoraHeader,
    add_trigger_words,
    list_few_step_warnings,
    read_lora_headers,
)
from int8run.metrics.memory import read_peak_bytes, reset_peak_memory
from int8run.metrics.quality import average_quality, compare_generations, compute_trajectory_error
from int8run.models.sampling import SCHEDULE_ARGUMENTS, Sampling
from int8run.models.schedulers import set_scheduler
from int8run.pipeline import process_cache
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.float_baseline import BaselineOrigin, get_float_baseline
from int8run.pipeline.sample_checks import check_samples
from int8run.report.console import Progress, print_lines
from int8run.report.formatting import format_pairs
from int8run.report.result_table import build_result_table
from int8run.report.step_times import has_scattered_times
from int8run.tasks.image_writer import ImageWriter
from int8run.tasks.run_edits import measure_edits
from int8run.tasks.run_metrics import DenoiserCalls, RunComparison, measure_run
from int8run.tasks.run_outputs import describe_build, name_candidate, write_outputs
from int8run.utils.hardware import get_device_name
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
WARM_UP_STEPS = 2
FLOAT_TIMING = "float_timing"  # name of a generation that only times the float model
TIMING_STEPS = 4  # of each batch; the first one is not counted


@dataclass(frozen=True)
class RunResult:
    """What a run measured and generated.

    Args:
        metrics: by their public names.
        candidate: what the compared model generated (`int8`, `clip` or `float`).
        baseline: what the float model generated; None when it did not run.
        output_dir: folder with the files of the run.
    """

    metrics: Mapping[str, float]
    candidate: Generation
    baseline: Generation | None
    output_dir: Path


@dataclass(frozen=True)
class RunInputs:
    """What a run is given besides its settings.

    Args:
        headers: of the LoRA files, in the order of the stack.
        writer: saves the images, and has the samples.
        progress: shows the steps.
    """

    headers: Sequence[LoraHeader]
    writer: ImageWriter
    progress: Progress

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples of the run, in order."""
        return self.writer.samples

    def get_first_batch(self, spec: RunSpec) -> Sequence[Sample]:
        """The samples of the pipeline's first call."""
        return split_batches(self.samples, spec.sampling.batch)[0]


def run(spec: RunSpec, job: Job) -> RunResult:
    """Do everything that one job does, in order.

    It leaves files, which a tracker copies afterwards, so nothing is lost where a tracker fails.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
    """
    headers = read_headers(spec)
    samples = read_samples(spec.prompts, spec.seed, job.output_dir, spec.sampling.input_size)
    check_samples(spec.model, samples, spec.sampler, spec.sampling)
    # a pipeline that needs an image needs one for the calibration, too
    spec = replace(spec, calibration=spec.calibration.with_inputs(samples))
    samples = add_trigger_words(samples, headers, spec.lora)
    inputs = RunInputs(
        headers=headers,
        writer=ImageWriter(spec, samples, job.output_dir),
        progress=Progress(enabled=spec.progress, transient=job.sweep is not None),
    )
    with reported_when_stopped(inputs.writer):
        return generate_and_measure(spec, job, inputs)


@contextmanager
def reported_when_stopped(writer: ImageWriter) -> Iterator[None]:
    """Where an interrupt or an error ends a run, log which images it leaves."""
    try:
        yield
    except BaseException:
        writer.report_kept()
        raise


def generate_and_measure(spec: RunSpec, job: Job, inputs: RunInputs) -> RunResult:
    """Build the models, generate with them, and measure.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        inputs: samples, and what saves their images.
    """
    is_alone = job.sweep is None
    cached_baseline, is_float_timed = get_cached_baseline(spec, inputs)
    built, is_reused = process_cache.get_or_build(
        spec.build_key,
        lambda: build_model(spec, inputs.get_first_batch(spec), inputs.headers, inputs.progress),
    )
    change_seconds = apply_settings(spec, built, inputs)
    if is_alone:
        print_build(spec, built, is_reused=is_reused)

    generations = generate_all(spec, built, inputs)
    # where the float model is the candidate, it is compared with itself: its PSNR is infinite
    baseline = cached_baseline or generations.get("float")
    if baseline is not None:
        inputs.writer.write_all("float", baseline, built.pipe)
    check_latents(generations[spec.candidate], name_candidate(spec))
    log_rounded(spec, built, inputs.samples, generations[spec.candidate])
    comparison = make_comparison(spec, inputs.samples, generations, baseline, is_float_timed=is_float_timed)

    calls = capture_denoiser_calls(spec, built, inputs)
    metrics = measure_run(spec, built, comparison, calls, is_reused=is_reused)
    if spec.lora.adapters:
        metrics["lora/change_ms"] = 1000 * change_seconds
    # after the peak of the memory was read: perceptual metrics load networks of their own
    if baseline is not None:
        comparison = measure_quality(spec, comparison, baseline)
        metrics |= average_quality(comparison.quality)

    write_outputs(spec, built, comparison, metrics, inputs.writer)
    warn_scattered_times(metrics)
    if is_alone:
        print_result(spec, job, built, metrics)
    return RunResult(metrics, comparison.candidate, baseline, job.output_dir)


def capture_denoiser_calls(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> DenoiserCalls:
    """The denoiser's arguments in one step of the first batch; of the float model where it is in memory."""
    denoiser = built.denoisers.get("float", built.denoisers[spec.candidate])
    batch = inputs.get_first_batch(spec)
    return capture_step(built.pipe, built.component, denoiser, batch, spec.sampling)


def warn_scattered_times(metrics: Mapping[str, float]) -> None:
    """Log that speeds say little, where steps of one model took very different times."""
    if has_scattered_times(metrics):
        log.warning(
            "step times scatter by more than twice: other work runs on this machine, so the speeds say little"
        )


def apply_settings(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> float:
    """Give a model, which may be that of an earlier job, the scheduler and the strengths of this one.

    Logs what is unusual about the LoRAs, and negative prompts without effect.

    Args:
        spec: the settings.
        built: the model.
        inputs: samples and LoRA headers.

    Returns:
        Seconds that the change of strengths took.
    """
    set_scheduler(built.pipe, built.scheduler, spec.sampling)
    log_lora_warnings(spec, built, inputs.headers)
    log_unused_negative_prompts(spec, built, inputs.samples)
    return built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)


def make_comparison(
    spec: RunSpec,
    samples: Sequence[Sample],
    generations: Mapping[str, Generation],
    baseline: Generation | None,
    *,
    is_float_timed: bool,
) -> RunComparison:
    """Set what the candidate generated beside what the float model generated, if it did.

    Args:
        spec: the settings.
        samples: that were generated.
        generations: of this run, by the names of `generate_all`.
        baseline: what the float model generated, in this run or before.
        is_float_timed: whether the float model ran in this run, be it for a few steps only; False where
            `baseline` comes from the cache on disk.
    """
    candidate = generations[spec.candidate]
    latent_errors: Sequence[float] = []
    if baseline is not None:
        latent_errors = compute_trajectory_error(candidate, baseline)
    timed_float = None
    if is_float_timed:
        timed_float = generations.get(FLOAT_TIMING, baseline)
    return RunComparison(
        samples=samples,
        candidate=candidate,
        baseline=baseline,
        timed_float=timed_float,
        latent_errors=latent_errors,
    )


def measure_quality(spec: RunSpec, comparison: RunComparison, baseline: Generation) -> RunComparison:
    """The comparison, completed with each sample's quality against the float model's image."""
    prompts = [sample.prompt for sample in comparison.samples]
    quality = compare_generations(comparison.candidate, baseline, prompts, spec.metrics.perceptual)
    quality = measure_edits(comparison.samples, comparison.candidate, baseline, quality)
    return replace(comparison, quality=quality)


def read_headers(spec: RunSpec) -> list[LoraHeader]:
    """Read the headers of the LoRA files, in the order of the stack."""
    lora_dir = None if spec.lora_dir is None else expand_path(spec.lora_dir)
    return read_lora_headers(spec.lora, spec.model.lora_base, lora_dir)


def get_cached_baseline(spec: RunSpec, inputs: RunInputs) -> tuple[Generation | None, bool]:
    """With `metrics.baseline=cached`, get what the float model generates before any other model is built.

    Args:
        spec: the settings.
        inputs: samples, and what saves their images.

    Returns:
        What the float model generated, and whether it ran for that in this run (False: its images come from
        the cache on disk). (None, True) with another `metrics.baseline`: where a float model runs then, it
        does so beside the candidate.
    """
    if spec.metrics.baseline != "cached" or not spec.has_comparison:
        return None, True
    # else a model of an earlier job would be in memory beside the float one
    process_cache.clear_build()
    origin = BaselineOrigin(
        model=spec.model,
        headers=inputs.headers,
        samples=inputs.samples,
        settings_key=spec.float_key,
        device=spec.device,
    )
    generate = partial(generate_float, spec.float_only, inputs)
    baseline, is_fresh = get_float_baseline(origin, spec.cache, generate)
    if is_fresh:
        log.info("the float model ran before, not in turn with INT8: their speed ratio compares two moments")
    return baseline, is_fresh


def generate_float(spec: RunSpec, inputs: RunInputs) -> Generation:
    """Build the float model alone and let it generate.

    Args:
        spec: of the float model.
        inputs: samples, and what saves their images.
    """
    built = build_model(spec, inputs.get_first_batch(spec), inputs.headers, inputs.progress)
    set_scheduler(built.pipe, built.scheduler, spec.sampling)
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    return generate_all(spec, built, inputs)["float"]


def generate_all(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> dict[str, Generation]:
    """Generate with the float model and the candidate in turn, after a short warm-up that is not timed.

    Args:
        spec: the settings.
        built: the model, at the strengths of the LoRAs.
        inputs: samples, and what saves each image when it is there.

    Returns:
        The candidate's generation under its name, and `float` with `metrics.baseline=run`. Where the float
        images are those of an earlier job there is FLOAT_TIMING, too: a few steps of the float model now.
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
    run_warm_up(spec, built, denoisers, inputs.get_first_batch(spec))
    generations = generate_in_turn(spec, built, denoisers, inputs, only_times_float=known_float is not None)
    # a schedule has left its last strengths
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    if known_float is not None:
        float_timing = generations.pop("float")
        return {"float": known_float, FLOAT_TIMING: float_timing, candidate: generations[candidate]}
    if "float" in generations:
        process_cache.put(images_key, generations["float"], generations["float"].nbytes)
    return generations


def generate_in_turn(
    spec: RunSpec,
    built: BuiltModel,
    denoisers: Mapping[str, torch.nn.Module],
    inputs: RunInputs,
    *,
    only_times_float: bool,
) -> dict[str, Generation]:
    """Generate with each denoiser in turn, and save each image when it is there.

    Args:
        spec: the settings.
        built: the model.
        denoisers: by name.
        inputs: samples, and what saves their images.
        only_times_float: whether `float` runs a few steps only and makes no images.
    """
    models_with_images = list(denoisers)
    other_samplings = {}
    if only_times_float:
        models_with_images.remove("float")
        other_samplings["float"] = shorten_for_timing(built.pipe, inputs.samples, spec.sampling)
    num_images = len(inputs.samples) * len(models_with_images)

    def set_scheduled_strengths(fraction: float) -> None:
        if spec.lora.is_scheduled:
            built.set_strengths(spec.lora.get_strengths_at(fraction), spec.lora.text_strengths)

    with inputs.progress.track_loop("Generating", num_images, line_each=True) as advance:

        def keep_batch(name: str, batch: Sequence[Sample], generation: Generation) -> None:
            generation.peak_bytes = max(generation.peak_bytes, read_peak_bytes(built.device))
            if name in models_with_images:
                inputs.writer.write_batch(name, batch, generation, built.pipe)
                advance(len(batch))

        return generate(
            built.pipe,
            built.component,
            denoisers,
            inputs.samples,
            spec.sampling,
            hooks=GenerationHooks(
                before_batch=lambda name: reset_peak_memory(built.device),
                on_batch=keep_batch,
                on_fraction=set_scheduled_strengths,
            ),
            differences=Differences(built.text_encoders, other_samplings),
        )


def run_warm_up(
    spec: RunSpec, built: BuiltModel, denoisers: Mapping[str, torch.nn.Module], batch: Sequence[Sample]
) -> None:
    """Generate one batch with a few steps, which compiles kernels and fills caches before anything is timed.

    Args:
        spec: the settings.
        built: the model.
        denoisers: that are timed later.
        batch: samples of one batch.
    """
    # forget the prompts that earlier jobs asked for
    PromptCache.for_pipeline(built.pipe).requested.clear()
    generate(
        built.pipe,
        built.component,
        denoisers,
        batch,
        shorten_sampling(built.pipe, batch, spec.sampling, WARM_UP_STEPS),
        differences=Differences(built.text_encoders),
    )


def shorten_sampling(pipe: Any, batch: Sequence[Sample], sampling: Sampling, steps: int) -> Sampling:
    """The same sampling with fewer steps, and without `sigmas` or `timesteps`, which fix their number.

    Args:
        pipe: to be called.
        batch: what it generates.
        sampling: how.
        steps: that a call takes, whatever the strength.
    """
    extra = {name: value for name, value in sampling.extra.items() if name not in SCHEDULE_ARGUMENTS}
    return replace(sampling, steps=count_asked_steps(pipe, batch, sampling, steps), extra=extra)


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


def check_latents(generation: Generation, name: str) -> None:
    """Check that a model computed finite latents.

    Args:
        generation: of the model.
        name: of the model, for the message.

    Raises:
        FileError: when latents are NaN or infinite.
    """
    broken = sum(not torch.isfinite(latents).all() for latents in generation.trajectories)
    if broken:
        samples = count_noun(len(generation.trajectories), "sample")
        raise FileError(
            f"the latents of {broken} of {samples} of the {name} model are NaN or infinite; "
            "its weights are damaged, or model.dtype=float16 is too narrow for them"
        )


def log_rounded(spec: RunSpec, built: BuiltModel, samples: Sequence[Sample], generation: Generation) -> None:
    """Log where the pipeline did not do what it was asked for: a size, a number of frames, of steps.

    Also logs what size it makes of inputs.

    Args:
        spec: the settings.
        built: the model.
        samples: that were generated.
        generation: of them.
    """
    pipeline = type(built.pipe).__name__
    strength = get_strength(read_call_inputs(type(built.pipe)), samples, spec.sampling)
    unasked = []
    for change in list_rounded(spec.sampling, read_generated_sampling(spec.sampling, generation)):
        if is_skipped(change, strength):
            log.info("%s", describe_skipped(change, pipeline, strength))
        else:
            unasked.append(change)
    if unasked:
        log.warning("%s", describe_rounded(unasked, pipeline))
    for resized in list_resized(samples, generation.frames):
        log.info("%s", resized.describe(pipeline))


def log_lora_warnings(spec: RunSpec, built: BuiltModel, headers: Sequence[LoraHeader]) -> None:
    """Log unusual strengths, and settings that a few-step LoRA was not made for."""
    few_step_warnings = list_few_step_warnings(
        headers,
        spec.lora,
        lora_base=spec.model.lora_base,
        location=str(spec.model.location),
        sampling=spec.sampling,
        scheduler=built.pipe.scheduler,
    )
    for line in [*spec.lora.list_unusual_strengths(), *few_step_warnings]:
        log.warning("%s", line)


def log_unused_negative_prompts(spec: RunSpec, built: BuiltModel, samples: Sequence[Sample]) -> None:
    """Log that negative prompts change nothing, where they do not.

    Only prompts that the user gave count, not the checkpoint's default.
    """
    # `sampler` is what the user set, `sampling` the same with all defaults
    asked = [spec.sampler.extra.get("negative_prompt"), *(sample.negative_prompt for sample in samples)]
    unused = explain_unused_negative_prompt(built.pipe, asked, spec.sampling)
    if unused is not None:
        log.warning("%s", unused)


def print_build(spec: RunSpec, built: BuiltModel, *, is_reused: bool) -> None:
    """Print what was built, and what a mixed precision search found."""
    print_lines(format_pairs(describe_build(spec, built, is_reused=is_reused)))
    if built.mixed_precision is not None:
        print_lines(str(built.mixed_precision))


def print_result(spec: RunSpec, job: Job, built: BuiltModel, metrics: Mapping[str, float]) -> None:
    """Print the table of results and where the files are."""
    model = job.choices.get("model", "model")
    title = f"{model} on {get_device_name(built.device)}; float is {spec.model.dtype}"
    table = build_result_table(title, metrics, name_candidate(spec), has_both_models=spec.runs_both_models)
    print_lines("", table)
    files = {"images": "grid.png", "layers": "layers.csv"}
    if spec.clip.is_quantized:
        files["encoders"] = "text_encoders.csv"
    files["numbers"] = "metrics.json"
    for name, file in files.items():
        print_lines(f"{name + ':':<10}{job.output_dir / file}")
