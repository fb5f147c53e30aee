"""One run on one screen: build, generate with both models in turn, measure, log."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from rich.markup import escape

from int8run import memo
from int8run.baseline import cached_baseline
from int8run.build import Built, build, lora_overhead
from int8run.errors import FileError
from int8run.generate.generate import Generation, TextCache, frame_rate, generate, use_text_encoders
from int8run.generate.probe import record_step
from int8run.generate.prompts import Sample, samples
from int8run.lora.heads import Head, few_step_advice, read_heads, with_triggers
from int8run.machine import device_name
from int8run.metrics.embeddings import encoder_metrics
from int8run.metrics.layers import int8_shares, layer_metrics, measure_outputs, module_bytes
from int8run.metrics.memory import peak_bytes, reset_peak
from int8run.metrics.quality import SampleQuality, frame_series, half_error_step, key_frames, mean_quality, per_image, trajectory_error
from int8run.metrics.speed import speed, step_times
from int8run.models.family import OWN_STEPS
from int8run.models.loader import library_versions, use_scheduler
from int8run.report.files import DIFFERENCE_GAIN, difference, environment, grid, save_sample, write_json, write_layers
from int8run.report.terminal import Progress, pairs_line, result_table, say
from int8run.spec import Job, RunSpec
from int8run.text_encoders.base import find_text_encoders

log = logging.getLogger(__name__)
WARM_UP_STEPS = 2
MOST_EMBEDDING_ERROR = 0.4  # twice that of nvfp4, the coarsest format


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
    heads = read_heads(spec.lora, spec.model.lora_base, None if spec.lora_dir is None else Path(spec.lora_dir).expanduser())
    wanted = with_triggers(samples(spec.prompts.read(), spec.prompts.seeds_per_prompt, spec.seed), heads, spec.lora)
    first = wanted[: spec.sampler.batch]
    kept, fresh = None, True
    if spec.metrics.baseline == "cached" and spec.differs:
        memo.forget_build()  # a model of an earlier job would stand beside the float one
        kept, fresh = cached_baseline(spec, heads, wanted, partial(draw_float, heads=heads, wanted=wanted, progress=progress))
    built, reused = memo.reuse(spec.build_key, lambda: build(spec, first, heads, progress))
    use_scheduler(built.pipe, built.scheduler, spec.sampling)
    for line in [*spec.lora.unusual(), *few_step_lines(spec, built, heads)]:
        log.warning("%s", line)
    change_s = built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    if job.sweep is None:
        say(pairs_line(facts(spec, built, reused)), *([str(built.budget)] if built.budget else []))

    reset_peak(built.device)
    made = generate_all(spec, built, spec.candidate, wanted, progress)
    candidate, baseline = made[spec.candidate], kept or made.get("float")
    check_pictures(candidate, our_name(spec))
    denoiser = built.denoisers.get("float", built.denoisers[spec.candidate])
    calls = record_step(built.pipe, built.component, denoiser, first, spec.sampling)
    errors = trajectory_error(candidate, baseline) if baseline else []
    metrics = measure(spec, built, calls, candidate, baseline, errors, reused, fresh)
    if spec.lora.adapters:
        metrics["lora/change_ms"] = 1000 * change_s
    # after the peak of the memory was read: perceptual metrics load networks of their own
    quality = per_image(candidate, baseline, [s.prompt for s in wanted], spec.metrics.perceptual) if baseline else []
    metrics |= mean_quality(quality) if quality else {}

    write_outputs(spec, built, candidate, baseline, wanted, metrics, quality, errors, out)
    if scattered(metrics):
        log.warning("step times scatter by more than twice: other work runs here, and the speeds say little")
    if job.sweep is None:
        title = f"{job.choices.get('model', 'model')} on {device_name(built.device)}; float is {spec.model.dtype}"
        say("", result_table(title, metrics, our_name(spec)))
        tables = {"layers": out / "layers.csv", **({"encoders": out / "text_encoders.csv"} if spec.clip.quantizes else {})}
        places = {"pictures": out / "grid.png", **tables, "numbers": out / "metrics.json"}
        say(*(escape(f"{name + ':':<10}{place}") for name, place in places.items()))
    return RunResult(metrics, candidate, baseline, out)


def generate_all(spec: RunSpec, built: Built, candidate: str, wanted: Sequence[Sample], progress: Progress) -> dict[str, Generation]:
    """Float and INT8 in turn, batch by batch, after a short warm-up that is not timed."""
    sampling, stack = spec.sampling, spec.lora
    names = ["float", candidate] if spec.metrics.baseline == "run" else [candidate]
    key = repr((spec.float_key, wanted))
    known = memo.recall(key) if "float" in names and candidate != "float" else None
    if known is not None:
        log.info("the float pictures are those of an earlier job with the same settings; the speed ratio compares two moments")
        names = [candidate]
    use = {name: built.denoisers[name] for name in names}
    TextCache.of(built.pipe).asked.clear()  # of earlier jobs
    warm_up = replace(sampling, steps=WARM_UP_STEPS, extra={k: v for k, v in sampling.extra.items() if k not in OWN_STEPS})
    generate(built.pipe, built.component, use, wanted[: sampling.batch], warm_up, text_encoders=built.text_encoders)

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
        memo.remember(key, made["float"], made["float"].bytes)
    return made


def check_pictures(made: Generation, who: str) -> None:
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


def draw_float(spec: RunSpec, heads: Sequence[Head], wanted: Sequence[Sample], progress: Progress) -> Generation:
    """What the float model draws, built for it alone."""
    built = build(spec, wanted[: spec.sampler.batch], heads, progress)
    use_scheduler(built.pipe, built.scheduler, spec.sampling)
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    return generate_all(spec, built, "float", wanted, progress)["float"]


def few_step_lines(spec: RunSpec, built: Built, heads: Sequence[Head]) -> list[str]:
    """What of this run speaks against its few-step LoRAs."""
    return few_step_advice(heads, spec.lora, spec.model.lora_base, str(spec.model.location), spec.sampling, built.pipe.scheduler)


def measure(
    spec: RunSpec, built: Built, calls: Sequence[Mapping[str, Any]], candidate: Generation, baseline: Generation | None,
    errors: Sequence[float], reused: bool, fresh: bool,
) -> dict[str, float]:  # fmt: skip
    """All metrics but quality, under their public names.

    Args:
        errors: relative error of the latents after each step.
        fresh: the float model drew in this run; speeds of another day are not compared.
    """
    metrics = speed(candidate, baseline if fresh else None)
    metrics["memory/peak_bytes"] = peak_bytes(built.device)
    encoders = find_text_encoders(built.pipe.components) | built.text_encoders.get(spec.candidate, {})
    metrics["memory/text_encoder_bytes"] = sum(map(module_bytes, encoders.values()))
    metrics["float/text_encoder_bytes"] = built.float_text_bytes
    if spec.clip.quantizes:
        metrics |= encoder_metrics(built.encoders.plans, list(embeddings(built, spec.candidate)))
        if "clip/rel_err" not in metrics:
            log.info("metrics.baseline=%s has no float text encoders in memory; embeddings are not compared", spec.metrics.baseline)
        elif metrics["clip/rel_err"] > MOST_EMBEDDING_ERROR:
            log.warning(
                "the embeddings are %.0f %% from the float encoders', more than any format costs: the file is of another model, or is read "
                "otherwise than it was written", 100 * metrics["clip/rel_err"],
            )  # fmt: skip
        metrics["memory/text_encoder_ratio"] = built.float_text_bytes / metrics["memory/text_encoder_bytes"]
    int8 = built.denoisers.get("int8")
    metrics["memory/denoiser_bytes"] = module_bytes(int8) if int8 else built.float_bytes
    metrics["memory/denoiser_ratio"] = built.float_bytes / metrics["memory/denoiser_bytes"]
    # a reused model cost this run nothing
    metrics["build/load_s"] = 0.0 if reused else built.seconds["load"]
    metrics["build/quantize_s"] = 0.0 if reused else built.seconds["quantize"]
    metrics["float/denoiser_bytes"] = built.float_bytes
    if baseline is not None:
        base = speed(baseline, None) if fresh else {}
        metrics |= {name.replace("speed/", "float/"): value for name, value in base.items()}
        if int8 is not None:
            metrics["quality/half_error_step"] = half_error_step(errors)
    for plan in built.plans:  # a reused model still has what an earlier job measured
        plan.measured.pop("output_sqnr_db", None)
    if int8 is not None:
        if spec.metrics.layers and "float" in built.denoisers:
            measure_outputs(built.denoisers["float"], int8, calls, built.plans)
        metrics |= layer_metrics(built.plans) | int8_shares(built.plans, built.work, built.params)
    if built.budget is not None:
        metrics |= built.budget.metrics
    if spec.lora.adapters:
        loras = built.loras
        metrics["lora/modules_matched"] = loras.matches.matched
        metrics["lora/modules_unmatched"] = len(loras.matches.unmatched)
        metrics["lora/clipped_share"] = loras.clipped_share
        metrics |= {f"lora/layers_{mode}": count for mode, count in loras.modes.items()}
        if loras.dynamic and any(spec.lora.strengths):
            if built.lora_overhead is None:
                built.lora_overhead = lora_overhead(built, calls)
            metrics["lora/overhead_ratio"] = built.lora_overhead
    return metrics


@torch.no_grad()
def embeddings(built: Built, candidate: str) -> Iterator[tuple[Any, Any]]:
    """What the float text encoders, where they are, make of the prompts that were drawn, and what the quantized ones made of them."""
    if built.text_encoders.get("float"):
        use_text_encoders(built.pipe, "float", built.text_encoders["float"])
        yield from TextCache.of(built.pipe).compared(candidate)
        use_text_encoders(built.pipe, candidate, built.text_encoders[candidate])


def write_outputs(
    spec: RunSpec, built: Built, candidate: Generation, baseline: Generation | None, wanted: Sequence[Sample],
    metrics: Mapping[str, float], quality: Sequence[SampleQuality], errors: Sequence[float], out: Path,
) -> None:  # fmt: skip
    """Pictures or videos, grid, tables and facts into the output folder."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rate = frame_rate(built.pipe, spec.sampling)
    rows: list[tuple[str, list[Image]]] = []
    per_sample: list[dict[str, object]] = []
    for i, sample in enumerate(wanted):
        ours, floats = candidate.frames[i], baseline.frames[i] if baseline else []
        shown = key_frames(len(ours))
        file, *stills = (f"images/{name}" for name in save_sample(ours, shown, folder, sample.key, rate))
        float_file, *float_stills = (
            (f"images/{name}" for name in save_sample(floats, shown, folder, f"{sample.key}_float", rate)) if floats else [None]
        )
        caption = f"{sample.prompt} · seed {sample.seed}"
        if stills:
            rows.append((caption, []))
        for number in shown.values():
            a, b = ours[number], floats[number : number + 1]
            rows.append((f"frame {number + 1} of {len(ours)}" if stills else caption, [*b, a, *(difference(a, f) for f in b)]))
        about = {"key": sample.key, "prompt": sample.prompt, "seed": sample.seed, "file": file, **(quality[i].values if quality else {})}
        if float_file:
            about["float"] = float_file
        if stills:
            about |= {"stills": stills, "float_stills": float_stills, **({"frames": quality[i].frames} if quality else {})}
        per_sample.append(about)
    columns = ["float", our_name(spec), f"difference x {DIFFERENCE_GAIN}"] if baseline else [our_name(spec)]
    grid(rows, columns).save(out / "grid.png")
    if candidate.sound:
        log.info("%s makes sound with its videos; it is neither compared nor kept", type(built.pipe).__name__)
    write_layers(built.plans, out / "layers.csv")
    if spec.clip.quantizes:
        write_layers(built.encoders.plans, out / "text_encoders.csv")
    write_json(environment_of(built), out / "environment.json")
    series = series_of(candidate, baseline, quality, errors)
    # the last file: what has it is whole
    write_json({"metrics": metrics, "series": series, "sampling": asdict(spec.sampling), "images": per_sample}, out / "metrics.json")


def series_of(
    candidate: Generation, baseline: Generation | None, quality: Sequence[SampleQuality], errors: Sequence[float]
) -> dict[str, list[float]]:  # fmt: skip
    """One value per step or frame, where there is one."""
    series: dict[str, Sequence[float]] = {"series/step_ms": step_times(candidate)}
    if baseline is not None:
        series |= {"series/float_step_ms": step_times(baseline), "series/latent_rel_err": errors}
        if candidate.is_video:
            series["series/frame_psnr_db"] = frame_series(quality, "psnr_db")
    return {name: list(values) for name, values in series.items()}


def scattered(metrics: Mapping[str, float]) -> bool:
    """Whether one step in ten took more than twice the median: a busy machine."""
    return any(metrics.get(f"{who}/step_ms_p90", 0) > 2 * metrics.get(f"{who}/step_ms_p50", 0) for who in ("speed", "float"))


def facts(spec: RunSpec, built: Built, reused: bool) -> list[tuple[str, object]]:
    """What was built, for the line before the bars."""
    used = sorted({p.backend_used for p in built.plans if p.backend_used})
    share = int8_shares(built.plans, built.work, built.params)["quant/macs_int8_share"]
    int8 = [p for p in built.plans if p.keep_float is None]
    counts = f"{len(int8)} of {len(built.plans)} Linears INT8, {share:.1%} of the multiply-adds"
    said = [("family", built.family.name), ("device", built.device), ("layers", counts if used else "all float")]
    if used:
        said += [("outlier", counted(p.outlier.partition(" ")[0] for p in int8)), ("rounding", counted(p.rounding for p in int8))]
        said.append(("backend", "+".join(used)))
    if spec.lora.adapters:
        stack = spec.lora
        strengths = ", ".join(f"{a.name} {'→'.join(f'{s * stack.strength:g}' for _, s in a.schedule)}" for a in stack.adapters)
        modes = built.loras.modes
        how = "baked" if spec.lora.bakes else counted(Counter(modes).elements()) if modes else "merged"
        said.append(("lora", f"{strengths} ({how})"))
    for component, encoder in built.encoders.built.items():
        words = [plan.rounding if plan.keep_float is None else "float" for plan in encoder.plans]
        said.append((component, ", ".join(f"{word} {n}" for word, n in Counter(words).most_common())))
    preset = spec.lora.preset_for(spec.model.lora_base, spec.sampler.steps)
    if preset is not None:
        said.append(("few steps", f"{preset.name}: {spec.sampling.steps} steps, {type(built.pipe.scheduler).__name__}"))
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
    return environment(built.device, library_versions())


def our_name(spec: RunSpec) -> str:
    """What stands beside the float model; with INT8 disabled and nothing else changed it is the float model itself."""
    names = {"int8": "INT8", "clip": f"clip={spec.clip.format}", "float": "float (int8.enable=false)"}
    return names[spec.candidate]
