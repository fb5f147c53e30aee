"""One run on one screen: build, generate with both models in turn, measure, log."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.markup import escape

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import FileError
from int8run.generate.capture import capture_step
from int8run.generate.generate import Generation, PromptCache, generate
from int8run.generate.prompts import Sample, build_samples
from int8run.lora.header_info import Head, few_step_advice, read_heads, with_triggers
from int8run.metrics.memory import reset_peak_memory
from int8run.metrics.quality import average_quality, compare_generations, compute_trajectory_error
from int8run.models.loader import set_scheduler
from int8run.models.sampling import SCHEDULE_ARGUMENTS
from int8run.pipeline import process_cache
from int8run.pipeline.build import Built, build
from int8run.pipeline.float_baseline import cached_baseline
from int8run.report.console import Progress, build_result_table, format_pairs, print_lines
from int8run.tasks.run_metrics import has_scattered_times, measure_run
from int8run.tasks.run_outputs import candidate_label, describe_build, write_outputs
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class RunResult:
    """What a run measured and made."""

    metrics: Mapping[str, float]
    candidate: Generation
    baseline: Generation | None
    output_dir: Path


def run(spec: RunSpec, job: Job) -> RunResult:
    """Everything that one job does, in order. It leaves files, which a tracker copies afterwards: a lost tracker loses nothing."""
    out = job.output_dir
    progress = Progress(spec.progress, passing=job.sweep is not None)
    heads = read_heads(
        spec.lora, spec.model.lora_base, None if spec.lora_dir is None else Path(spec.lora_dir).expanduser()
    )
    wanted = with_triggers(
        build_samples(spec.prompts.read(), spec.prompts.seeds_per_prompt, spec.seed), heads, spec.lora
    )
    first = wanted[: spec.sampler.batch]
    kept, fresh = None, True
    if spec.metrics.baseline == "cached" and spec.differs:
        process_cache.forget_build()  # a model of an earlier job would stand beside the float one
        kept, fresh = cached_baseline(
            spec, heads, wanted, partial(generate_float, heads=heads, wanted=wanted, progress=progress)
        )
    built, reused = process_cache.reuse(spec.build_key, lambda: build(spec, first, heads, progress))
    set_scheduler(built.pipe, built.scheduler, spec.sampling)
    for line in [*spec.lora.unusual(), *find_few_step_warnings(spec, built, heads)]:
        log.warning("%s", line)
    change_s = built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    if job.sweep is None:
        print_lines(
            format_pairs(describe_build(spec, built, reused)), *([str(built.budget)] if built.budget else [])
        )

    reset_peak_memory(built.device)
    made = generate_all(spec, built, spec.candidate, wanted, progress)
    candidate, baseline = made[spec.candidate], kept or made.get("float")
    check_images(candidate, candidate_label(spec))
    denoiser = built.denoisers.get("float", built.denoisers[spec.candidate])
    calls = capture_step(built.pipe, built.component, denoiser, first, spec.sampling)
    errors = compute_trajectory_error(candidate, baseline) if baseline else []
    metrics = measure_run(spec, built, calls, candidate, baseline, errors, reused, fresh)
    if spec.lora.adapters:
        metrics["lora/change_ms"] = 1000 * change_s
    # after the peak of the memory was read: perceptual metrics load networks of their own
    quality = (
        compare_generations(candidate, baseline, [s.prompt for s in wanted], spec.metrics.perceptual)
        if baseline
        else []
    )
    metrics |= average_quality(quality) if quality else {}

    write_outputs(spec, built, candidate, baseline, wanted, metrics, quality, errors, out)
    if has_scattered_times(metrics):
        log.warning("step times scatter by more than twice: other work runs here, and the speeds say little")
    if job.sweep is None:
        title = f"{job.choices.get('model', 'model')} on {get_device_name(built.device)}; float is {spec.model.dtype}"
        print_lines("", build_result_table(title, metrics, candidate_label(spec)))
        tables = {
            "layers": out / "layers.csv",
            **({"encoders": out / "text_encoders.csv"} if spec.clip.is_quantized else {}),
        }
        places = {"pictures": out / "grid.png", **tables, "numbers": out / "metrics.json"}
        print_lines(*(escape(f"{name + ':':<10}{place}") for name, place in places.items()))
    return RunResult(metrics, candidate, baseline, out)


def generate_all(
    spec: RunSpec, built: Built, candidate: str, wanted: Sequence[Sample], progress: Progress
) -> dict[str, Generation]:
    """Float and INT8 in turn, batch by batch, after a short warm-up that is not timed."""
    sampling, stack = spec.sampling, spec.lora
    names = ["float", candidate] if spec.metrics.baseline == "run" else [candidate]
    key = repr((spec.float_key, wanted))
    known = process_cache.recall(key) if "float" in names and candidate != "float" else None
    if known is not None:
        log.info(
            "the float pictures are those of an earlier job with the same settings; the speed ratio compares two moments"
        )
        names = [candidate]
    use = {name: built.denoisers[name] for name in names}
    PromptCache.of(built.pipe).asked.clear()  # of earlier jobs
    warm_up = replace(
        sampling,
        steps=WARM_UP_STEPS,
        extra={k: v for k, v in sampling.extra.items() if k not in SCHEDULE_ARGUMENTS},
    )
    generate(
        built.pipe, built.component, use, wanted[: sampling.batch], warm_up, text_encoders=built.text_encoders
    )

    def on_fraction(fraction: float) -> None:
        if stack.scheduled:
            built.set_strengths(stack.strengths_at(fraction), stack.text_strengths)

    with progress.count("generate", len(wanted) * len(use)) as advance:
        made = generate(
            built.pipe,
            built.component,
            use,
            wanted,
            sampling,
            lambda name, batch, made: advance(len(batch)),
            on_fraction,
            built.text_encoders,
        )
    built.set_strengths(stack.strengths, stack.text_strengths)
    if known is not None:
        return {"float": known, **made}
    if "float" in made:
        process_cache.remember(key, made["float"], made["float"].bytes)
    return made


def check_images(made: Generation, who: str) -> None:
    """Refuse pictures that are none.

    Raises:
        FileError: when a model computed NaN or infinity.
    """
    broken = sum(not bool(torch.isfinite(latents).all()) for latents in made.trajectories)
    if broken:
        raise FileError(
            f"the latents of {broken} of {len(made.trajectories)} drawings of the {who} model are NaN or infinite; its weights are "
            "damaged, or model.dtype=float16 is too narrow for them"
        )


def generate_float(
    spec: RunSpec, heads: Sequence[Head], wanted: Sequence[Sample], progress: Progress
) -> Generation:
    """What the float model draws, built for it alone."""
    built = build(spec, wanted[: spec.sampler.batch], heads, progress)
    set_scheduler(built.pipe, built.scheduler, spec.sampling)
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    return generate_all(spec, built, "float", wanted, progress)["float"]


def find_few_step_warnings(spec: RunSpec, built: Built, heads: Sequence[Head]) -> list[str]:
    """What of this run speaks against its few-step LoRAs."""
    return few_step_advice(
        heads, spec.lora, spec.model.lora_base, str(spec.model.location), spec.sampling, built.pipe.scheduler
    )
