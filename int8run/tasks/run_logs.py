"""What a run says in the terminal: warnings about its settings, what was built, and the table of results.

Called by `tasks.run`. The files of a run are written by `tasks.run_outputs`.
"""

import logging
from collections.abc import Mapping, Sequence

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.generate import Generation
from int8run.generate.generated_sampling import (
    describe_rounded,
    describe_skipped,
    describe_tiled,
    is_skipped,
    is_tiled,
    list_rounded,
    read_generated_sampling,
)
from int8run.generate.input_sizes import list_resized
from int8run.generate.negative_prompts import explain_unused_negative_prompt
from int8run.generate.prompts import Sample
from int8run.generate.step_count import get_strength
from int8run.layers.plan import FLOAT
from int8run.lora.header_info import LoraHeader, list_few_step_warnings
from int8run.pipeline.built_model import BuiltModel
from int8run.report.console import print_lines
from int8run.report.formatting import format_pairs
from int8run.report.noise_floor_text import describe_noise_floors
from int8run.report.result_table import build_result_table
from int8run.report.step_times import has_scattered_times
from int8run.tasks.build_description import describe_build, name_candidate
from int8run.tasks.noise_floor_metrics import describe_noise_floor
from int8run.tasks.run_metrics import RunComparison
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)


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
    call = read_call_inputs(type(built.pipe))
    strength = get_strength(call, samples, spec.sampling)
    unasked = []
    for change in list_rounded(spec.sampling, read_generated_sampling(spec.sampling, generation)):
        if is_skipped(change, strength):
            log.info("%s", describe_skipped(change, pipeline, strength))
        elif is_tiled(change, call.parameters):
            log.info("%s", describe_tiled(change, pipeline))
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


def warn_idle_cache(spec: RunSpec, generation: Generation) -> None:
    """Log that a step cache has skipped nothing."""
    counts = generation.step_counts
    if counts is not None and not counts.skipped:
        log.warning(
            "cache_steps=%s skipped none of %d steps: they change by more than its settings allow; "
            "int8run --help cache_steps lists them",
            spec.cache_steps.name,
            counts.computed,
        )


def warn_idle_precision(spec: RunSpec, generation: Generation) -> None:
    """Log that a precision of `int8.steps` has computed no step, where there are few."""
    counts = generation.steps_by_denoiser
    if spec.int8.steps is None or not counts:
        return
    asked = dict.fromkeys(precision for _, precision in spec.int8.steps)
    for precision in asked:
        if precision not in counts:
            log.warning(
                "int8.steps asks for %s, and none of the %d steps begins in its part",
                precision,
                sum(counts.values()),
            )


def warn_scattered_times(metrics: Mapping[str, float]) -> None:
    """Log that speeds say little, where steps of one model took very different times."""
    if has_scattered_times(metrics):
        log.warning(
            "step times scatter by more than twice: other work runs on this machine, so the speeds say little"
        )


def print_build(spec: RunSpec, built: BuiltModel, *, is_reused: bool) -> None:
    """Print what was built, and what a mixed precision search found."""
    print_lines(format_pairs(describe_build(spec, built, is_reused=is_reused)))
    if built.mixed_precision is not None:
        print_lines(str(built.mixed_precision))


def print_result(
    spec: RunSpec, job: Job, built: BuiltModel, comparison: RunComparison, metrics: Mapping[str, float]
) -> None:
    """Print the table of results and where the files are.

    Args:
        spec: the settings.
        job: where they came from, and where the files are.
        built: the model.
        comparison: what was generated.
        metrics: by their public names.
    """
    model = job.choices.get("model", "model")
    title = f"{model} on {get_device_name(built.device)}; float is {spec.model.dtype}"
    statistics = comparison.statistics.to_json()
    table = build_result_table(
        title,
        metrics,
        name_candidate(spec),
        has_both_models=spec.runs_both_models,
        best_float="" if built.best_float is None else built.best_float.dtype,
        num_steps=len(comparison.latent_errors),
        statistics=statistics,
    )
    print_lines("", table)
    if comparison.noise_floor is not None:
        noise_floor = describe_noise_floor(comparison.noise_floor, comparison.equivalences)
        print_lines(*describe_noise_floors(noise_floor, metrics, statistics["metrics"]))
    for name, file in list_result_files(spec).items():
        print_lines(f"{name + ':':<10}{job.output_dir / file}")


def list_result_files(spec: RunSpec) -> dict[str, str]:
    """The files that a run with these settings names at its end, by what is in them."""
    files = {"images": "grid.png", "layers": "layers.csv"}
    if spec.clip.is_quantized:
        files["encoders"] = "text_encoders.csv"
    if spec.int8.vae != FLOAT:
        files["vae"] = "vae.csv"
    return files | {"numbers": "metrics.json"}
