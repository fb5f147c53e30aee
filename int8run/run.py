"""One run on one screen: build, generate with both models in turn, measure, log."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from rich.markup import escape

from int8run import memo
from int8run.build import Built, build, lora_overhead
from int8run.generate.generate import Generation, generate
from int8run.generate.probe import record_call
from int8run.generate.prompts import Sample, samples
from int8run.machine import device_name
from int8run.metrics.layers import layer_metrics, measure_outputs, module_bytes
from int8run.metrics.memory import peak_bytes, reset_peak
from int8run.metrics.quality import half_error_step, mean_quality, per_image, trajectory_error
from int8run.metrics.speed import speed, step_times
from int8run.models.loader import library_versions
from int8run.report.files import DIFFERENCE_GAIN, difference, environment, grid, write_json, write_layers, write_yaml
from int8run.report.terminal import Progress, pairs_line, result_table, say
from int8run.spec import Job, RunSpec
from int8run.tracking.base import TrackedRun

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
    """Everything that one job does, in order. Files are written before they are logged, so a lost tracker loses nothing."""
    out = job.output_dir
    write_yaml(job.settings, out / "config.yaml")
    progress = Progress(spec.progress)
    with spec.tracker.start(job.name, job.params(), {"sweep": job.sweep or "none"}) as tracked:
        tracked.log_file(out / "config.yaml")
        wanted = samples(spec.prompts.read(), spec.prompts.seeds_per_prompt, spec.seed)
        first = wanted[: spec.sampler.batch]
        built, reused = memo.reuse(spec.build_key, lambda: build(spec, first, progress))
        built.set_strengths(spec.lora.strengths)
        candidate_name = "int8" if "int8" in built.denoisers else "float"
        say(pairs_line(facts(spec, built, reused)), *([str(built.budget)] if built.budget else []))

        reset_peak(built.pipe.device)
        made = generate_all(spec, built, candidate_name, wanted, progress)
        candidate, baseline = made[candidate_name], made.get("float")
        call = record_call(built.pipe, built.component, built.denoisers["float"], first, spec.sampler.over(spec.model.sampling))
        metrics = measure(spec, built, call, candidate, baseline, reused)
        # after the peak of the memory was read: perceptual metrics load networks of their own
        quality = per_image(candidate, baseline, [s.prompt for s in wanted], spec.metrics.perceptual) if baseline else []
        metrics |= mean_quality(quality) if quality else {}

        write_outputs(built, candidate, baseline, wanted, metrics, quality, out)
        log_outputs(tracked, candidate, baseline, wanted, metrics, out)
    title = f"{job.choices.get('model', 'model')} on {device_name(built.pipe.device)}; float is {spec.model.dtype}"
    say("", result_table(title, metrics, our_name(built)))
    if scattered(metrics):
        log.warning("step times scatter by more than twice: other work runs here, and the speeds above say little")
    places = {"pictures": out / "grid.png", "layers": out / "layers.csv", "numbers": out / "metrics.json", "runs": spec.tracker.where()}
    say(*(escape(f"{name + ':':<10}{place}") for name, place in places.items() if place))
    return RunResult(metrics, candidate, baseline, out)


def generate_all(spec: RunSpec, built: Built, candidate: str, wanted: Sequence[Sample], progress: Progress) -> dict[str, Generation]:
    """Float and INT8 in turn, batch by batch, after a short warm-up that is not timed."""
    use = {name: built.denoisers[name] for name in ("float", candidate) if name == candidate or spec.metrics.baseline == "run"}
    sampling = spec.sampler.over(spec.model.sampling)
    generate(built.pipe, built.component, use, wanted[: sampling.batch], replace(sampling, steps=WARM_UP_STEPS))
    with progress.count("generate", len(wanted) * len(use)) as advance:
        return generate(built.pipe, built.component, use, wanted, sampling, lambda name, batch, made: advance(len(batch)))


def measure(
    spec: RunSpec, built: Built, call: Mapping[str, Any], candidate: Generation, baseline: Generation | None, reused: bool
) -> dict[str, float]:
    """All metrics but quality, under their public names."""
    metrics = speed(candidate, baseline)
    metrics["memory/peak_bytes"] = peak_bytes(built.pipe.device)
    metrics["memory/text_encoder_bytes"] = sum(module_bytes(m) for m in built.text_encoders.values())
    int8 = built.denoisers.get("int8")
    float_bytes = module_bytes(built.denoisers["float"])
    metrics["memory/denoiser_bytes"] = module_bytes(int8) if int8 else float_bytes
    metrics["memory/denoiser_ratio"] = float_bytes / metrics["memory/denoiser_bytes"]
    # a reused model cost this run nothing
    metrics["build/load_s"] = 0.0 if reused else built.seconds["load"]
    metrics["build/quantize_s"] = 0.0 if reused else built.seconds["quantize"]
    metrics["float/denoiser_bytes"] = float_bytes
    if baseline is not None:
        base = speed(baseline, None)
        metrics |= {name.replace("speed/", "float/"): value for name, value in base.items()}
        if int8 is not None:
            metrics["quality/half_error_step"] = half_error_step(trajectory_error(candidate, baseline))
    for plan in built.plans:  # a reused model still has what an earlier job measured
        plan.measured.pop("output_sqnr_db", None)
    if int8 is not None:
        if spec.metrics.layers:
            measure_outputs(built.denoisers["float"], int8, call, built.plans)
        metrics |= layer_metrics(built.plans)
    if built.budget is not None:
        metrics |= built.budget.metrics
    if built.lora_files:
        metrics["lora/modules_matched"] = sum(len(pairs) for pairs in built.matches.by_module.values())
        metrics["lora/modules_unmatched"] = len(built.matches.unmatched)
        if built.branches is not None and any(spec.lora.strengths):
            metrics["lora/overhead_ratio"] = lora_overhead(built, call, spec.lora.strengths)
    return metrics


def write_outputs(
    built: Built, candidate: Generation, baseline: Generation | None, wanted: Sequence[Sample],
    metrics: Mapping[str, float], quality: Sequence[Mapping[str, float]], out: Path,
) -> None:  # fmt: skip
    """Pictures, grid, tables and facts into the output folder."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, list[Image]]] = []
    for i, sample in enumerate(wanted):
        images = [candidate.images[i]]
        if baseline is not None:
            images = [baseline.images[i], candidate.images[i], difference(candidate.images[i], baseline.images[i])]
            baseline.images[i].save(folder / f"{sample.key}_float.png")
        candidate.images[i].save(folder / f"{sample.key}.png")
        rows.append((f"{sample.prompt} · seed {sample.seed}", images))
    columns = ["float", our_name(built), f"difference x {DIFFERENCE_GAIN}"] if baseline else [our_name(built)]
    grid(rows, columns).save(out / "grid.png")
    write_layers(built.plans, out / "layers.csv")
    per_sample = [
        {"prompt": s.prompt, "seed": s.seed, "file": f"images/{s.key}.png", **q}
        for s, q in zip(wanted, quality or [{}] * len(wanted), strict=True)
    ]
    steps = [{"latent_rel_err": error} for error in trajectory_error(candidate, baseline)] if baseline else []
    write_json({"metrics": metrics, "images": per_sample, "steps": steps}, out / "metrics.json")
    write_json(environment_of(built), out / "environment.json")


def log_outputs(
    tracked: TrackedRun, candidate: Generation, baseline: Generation | None, wanted: Sequence[Sample],
    metrics: Mapping[str, float], out: Path,
) -> None:  # fmt: skip
    """The same to the tracker, with one value per step where there is one."""
    tracked.log_metrics(metrics)
    tracked.log_series("series/step_ms", step_times(candidate))
    if baseline is not None:
        tracked.log_series("series/float_step_ms", step_times(baseline))
        tracked.log_series("series/latent_rel_err", trajectory_error(candidate, baseline))
    for sample, image in zip(wanted, candidate.images, strict=True):
        tracked.log_image(f"sample/{sample.key}", image)
    for name in ("grid.png", "layers.csv", "metrics.json", "environment.json"):
        tracked.log_file(out / name)


def scattered(metrics: Mapping[str, float]) -> bool:
    """Whether one step in ten took more than twice the median: a busy machine."""
    return any(metrics.get(f"{who}/step_ms_p90", 0) > 2 * metrics.get(f"{who}/step_ms_p50", 0) for who in ("speed", "float"))


def facts(spec: RunSpec, built: Built, reused: bool) -> list[tuple[str, object]]:
    """What was built, for the line before the bars."""
    used = sorted({p.backend_used for p in built.plans if p.backend_used})
    counts = f"{sum(p.keep_float is None for p in built.plans)} of {len(built.plans)} Linears INT8"
    said = [("family", built.family.name), ("device", built.pipe.device), ("layers", counts if used else "all float")]
    if used:
        int8 = [p for p in built.plans if p.keep_float is None]
        said += [("outlier", counted(p.outlier.partition(" ")[0] for p in int8)), ("rounding", counted(p.rounding for p in int8))]
        said.append(("backend", "+".join(used)))
    if spec.lora.adapters:
        strengths = ", ".join(f"{a.name} {s:g}" for a, s in zip(spec.lora.adapters, spec.lora.strengths, strict=True))
        said.append(("lora", f"{strengths} ({'baked' if spec.lora.bakes else 'dynamic'})"))
    if spec.compile != "none":
        said.append(("compile", spec.compile))
    if reused:
        said.append(("model", "reused"))
    return said


def counted(words: Iterable[str]) -> str:
    """One word for all, or each with its count: `convrot 20, none 12`."""
    counts = Counter(words).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{word} {n}" for word, n in counts)


def environment_of(built: Built) -> dict[str, object]:
    """Facts about the machine and the libraries."""
    return environment(built.pipe.device, library_versions())


def our_name(built: Built) -> str:
    """What stands beside the float model; with INT8 disabled it is the float model itself."""
    return "INT8" if "int8" in built.denoisers else "float (int8.enable=false)"
