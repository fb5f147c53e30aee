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

import torch

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import FileError
from int8run.generate.capture import capture_step
from int8run.generate.generate import Generation
from int8run.generate.input_files import read_samples
from int8run.generate.prompts import Sample
from int8run.lora.header_info import add_trigger_words
from int8run.metrics.clusters import choose_clusters
from int8run.metrics.equivalence import Equivalence
from int8run.metrics.loading import warn_of_missing_packages
from int8run.metrics.quality import (
    compare_generations,
    compare_sets,
    compute_trajectory_error,
    load_measures_for,
)
from int8run.metrics.sample_statistics import summarize_samples
from int8run.models.schedulers import set_scheduler
from int8run.pipeline import process_cache
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.float_baseline import BaselineOrigin, get_float_baseline
from int8run.pipeline.sample_checks import check_samples
from int8run.report.console import Progress
from int8run.tasks.build_description import name_candidate
from int8run.tasks.image_writer import ImageWriter
from int8run.tasks.input_metrics import measure_edits_and_videos
from int8run.tasks.noise_floor import NoiseFloor, draw_noise_floor
from int8run.tasks.noise_floor_metrics import (
    add_noise_floor,
    compare_with_noise_floor,
    flatten_equivalences,
)
from int8run.tasks.run_generation import FLOAT_TIMING, generate_all
from int8run.tasks.run_inputs import RunInputs, read_headers
from int8run.tasks.run_logs import (
    log_lora_warnings,
    log_rounded,
    log_unused_negative_prompts,
    print_build,
    print_result,
    warn_idle_cache,
    warn_idle_precision,
    warn_scattered_times,
)
from int8run.tasks.run_metrics import DenoiserCalls, RunComparison, measure_run
from int8run.tasks.run_outputs import write_outputs, write_run_card
from int8run.tasks.start_checks import check_start
from int8run.tasks.step_cache_metrics import measure_step_cache
from int8run.tasks.step_cache_setup import list_variants
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


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


def run(spec: RunSpec, job: Job) -> RunResult:
    """Do everything that one job does, in order.

    It leaves files, which a tracker copies afterwards, so nothing is lost where a tracker fails.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
    """
    check_start(spec)
    warn_of_missing_packages(spec.metrics.measures.values())
    samples = read_samples(spec.prompts, spec.seed, job.output_dir, spec.sampling.input_size)
    # before its LoRAs are downloaded: a model that is not there is the larger obstacle
    check_samples(spec.model, samples, spec.sampler, spec.sampling)
    headers = read_headers(spec)
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
    noise_floor = draw_noise_floor(spec, inputs)
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
    warn_idle_cache(spec, generations[spec.candidate])
    warn_idle_precision(spec, generations[spec.candidate])
    log_rounded(spec, built, inputs.samples, generations[spec.candidate])
    comparison = make_comparison(spec, inputs.samples, generations, baseline, is_float_timed=is_float_timed)

    calls = capture_denoiser_calls(spec, built, inputs)
    metrics = measure_run(spec, built, comparison, calls, is_reused=is_reused)
    if spec.lora.adapters:
        metrics["lora/change_ms"] = 1000 * change_seconds
    # after the peak of the memory was read: perceptual metrics load networks of their own
    metrics |= measure_step_cache(
        comparison.candidate, comparison.variants, comparison.baseline, comparison.timed_float
    )
    if baseline is not None:
        comparison = measure_quality(spec, comparison, baseline, noise_floor)
        metrics |= {**comparison.statistics.flatten(), **comparison.set_quality}
        metrics |= flatten_equivalences(comparison.equivalences)

    write_outputs(spec, built, comparison, metrics, inputs.writer)
    write_run_card(spec, job, built, metrics, comparison)
    warn_scattered_times(metrics)
    if is_alone:
        print_result(spec, job, built, comparison, metrics)
    return RunResult(metrics, comparison.candidate, baseline, job.output_dir)


def capture_denoiser_calls(spec: RunSpec, built: BuiltModel, inputs: RunInputs) -> DenoiserCalls:
    """The denoiser's arguments in one step of the first batch; of the float model where it is in memory."""
    denoiser = built.denoisers.get("float", built.denoisers[spec.candidate])
    batch = inputs.get_first_batch(spec)
    return capture_step(built.pipe, built.component, denoiser, batch, spec.sampling)


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
        is_interleaved=spec.runs_both_models,
        variants={name: generations[name] for name in list_variants(spec)},
    )


def measure_quality(
    spec: RunSpec, comparison: RunComparison, baseline: Generation, noise_floor: NoiseFloor | None
) -> RunComparison:
    """The comparison, completed with each sample's quality against the float model's image, and all's.

    Args:
        spec: the settings.
        comparison: what was generated.
        baseline: what the float model generated.
        noise_floor: the same, computed otherwise, where that was asked for.
    """
    prompts = [sample.prompt for sample in comparison.samples]
    clusters = choose_clusters(prompts, [repr(sample.inputs) for sample in comparison.samples])
    candidate = comparison.candidate
    loaded = load_measures_for(candidate, baseline, spec.metrics.measures.values())
    quality = compare_generations(candidate, baseline, prompts, loaded)
    quality = measure_edits_and_videos(comparison.samples, candidate, baseline, quality)
    set_quality = compare_sets(candidate, baseline, prompts, loaded)
    if spec.metrics.perceptual:
        set_quality["quality/measures_left_out"] = len(loaded.left_out)
    equivalences: Mapping[str, Equivalence] = {}
    if noise_floor is not None:
        quality = add_noise_floor(quality, baseline, noise_floor)
        if spec.has_comparison:
            equivalences = compare_with_noise_floor(quality, candidate, noise_floor, spec.metrics, clusters)
    keys = [sample.key for sample in comparison.samples]
    return replace(
        comparison,
        quality=quality,
        set_quality=set_quality,
        statistics=summarize_samples(quality, keys, spec.metrics.intervals, clusters),
        noise_floor=noise_floor,
        equivalences=equivalences,
    )


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
    else:
        log.info("the float model's speed was that of another time and is left out")
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
