"""What a run writes into its output folder."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL.Image import Image

from int8run.config.run_spec import RunSpec
from int8run.generate.generate import Generation, get_frame_rate
from int8run.generate.prompts import Sample
from int8run.metrics.layers import compute_int8_shares
from int8run.metrics.quality import SampleQuality, select_key_frames
from int8run.models.loader import read_library_versions
from int8run.pipeline.build import Built
from int8run.report.run_files import (
    DIFFERENCE_GAIN,
    collect_environment,
    make_difference_image,
    make_image_grid,
    save_sample,
    write_json,
    write_layers_csv,
)
from int8run.tasks.run_metrics import collect_series

log = logging.getLogger(__name__)


def write_outputs(
    spec: RunSpec,
    built: Built,
    candidate: Generation,
    baseline: Generation | None,
    wanted: Sequence[Sample],
    metrics: Mapping[str, float],
    quality: Sequence[SampleQuality],
    errors: Sequence[float],
    out: Path,
) -> None:
    """Pictures or videos, grid, tables and facts into the output folder."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rate = get_frame_rate(built.pipe, spec.sampling)
    rows: list[tuple[str, list[Image]]] = []
    per_sample: list[dict[str, object]] = []
    for i, sample in enumerate(wanted):
        ours, floats = candidate.frames[i], baseline.frames[i] if baseline else []
        shown = select_key_frames(len(ours))
        file, *stills = (f"images/{name}" for name in save_sample(ours, shown, folder, sample.key, rate))
        float_file, *float_stills = (
            (f"images/{name}" for name in save_sample(floats, shown, folder, f"{sample.key}_float", rate))
            if floats
            else [None]
        )
        caption = f"{sample.prompt} · seed {sample.seed}"
        if stills:
            rows.append((caption, []))
        for number in shown.values():
            a, b = ours[number], floats[number : number + 1]
            rows.append(
                (
                    f"frame {number + 1} of {len(ours)}" if stills else caption,
                    [*b, a, *(make_difference_image(a, f) for f in b)],
                )
            )
        about = {
            "key": sample.key,
            "prompt": sample.prompt,
            "seed": sample.seed,
            "file": file,
            **(quality[i].values if quality else {}),
        }
        if float_file:
            about["float"] = float_file
        if stills:
            about |= {
                "stills": stills,
                "float_stills": float_stills,
                **({"frames": quality[i].frames} if quality else {}),
            }
        per_sample.append(about)
    columns = (
        ["float", candidate_label(spec), f"difference x {DIFFERENCE_GAIN}"]
        if baseline
        else [candidate_label(spec)]
    )
    make_image_grid(rows, columns).save(out / "grid.png")
    if candidate.sound:
        log.info("%s makes sound with its videos; it is neither compared nor kept", type(built.pipe).__name__)
    write_layers_csv(built.plans, out / "layers.csv")
    if spec.clip.is_quantized:
        write_layers_csv(built.encoders.plans, out / "text_encoders.csv")
    write_json(describe_environment(built), out / "environment.json")
    series = collect_series(candidate, baseline, quality, errors)
    # the last file: what has it is whole
    write_json(
        {"metrics": metrics, "series": series, "sampling": asdict(spec.sampling), "images": per_sample},
        out / "metrics.json",
    )


def describe_build(spec: RunSpec, built: Built, reused: bool) -> list[tuple[str, object]]:
    """What was built, for the line before the bars."""
    used = sorted({p.backend_used for p in built.plans if p.backend_used})
    share = compute_int8_shares(built.plans, built.work, built.params)["quant/macs_int8_share"]
    int8 = [p for p in built.plans if p.skip_reason is None]
    counts = f"{len(int8)} of {len(built.plans)} Linears INT8, {share:.1%} of the multiply-adds"
    said = [
        ("family", built.family.name),
        ("device", built.device),
        ("layers", counts if used else "all float"),
    ]
    if used:
        said += [
            ("outlier", format_counts(p.outlier.partition(" ")[0] for p in int8)),
            ("rounding", format_counts(p.rounding for p in int8)),
        ]
        said.append(("backend", "+".join(used)))
    if spec.lora.adapters:
        stack = spec.lora
        strengths = ", ".join(
            f"{a.name} {'→'.join(f'{s * stack.strength:g}' for _, s in a.schedule)}" for a in stack.adapters
        )
        modes = built.loras.modes
        how = "baked" if spec.lora.bakes else format_counts(Counter(modes).elements()) if modes else "merged"
        said.append(("lora", f"{strengths} ({how})"))
    for component, encoder in built.encoders.built.items():
        words = [plan.rounding if plan.skip_reason is None else "float" for plan in encoder.plans]
        said.append((component, ", ".join(f"{word} {n}" for word, n in Counter(words).most_common())))
    preset = spec.lora.preset_for(spec.model.lora_base, spec.sampler.steps)
    if preset is not None:
        said.append(
            (
                "few steps",
                f"{preset.name}: {spec.sampling.steps} steps, {type(built.pipe.scheduler).__name__}",
            )
        )
    if spec.compile != "none":
        said.append(("compile", spec.compile))
    if reused:
        said.append(("model", "reused"))
    return said


def format_counts(words: Iterable[str]) -> str:
    """One word for all, or each with its count: `convrot 20, none 12`."""
    counts = Counter(words).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{word} {n}" for word, n in counts)


def describe_environment(built: Built) -> dict[str, object]:
    """Facts about the machine and the libraries."""
    return collect_environment(built.device, read_library_versions())


def candidate_label(spec: RunSpec) -> str:
    """What stands beside the float model; with INT8 disabled and nothing else changed it is the float model itself."""
    names = {"int8": "INT8", "clip": f"clip={spec.clip.format}", "float": "float (int8.enable=false)"}
    return names[spec.candidate]
