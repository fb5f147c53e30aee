"""The numbers of a run, named as in metrics.json."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from int8run.config.run_spec import RunSpec
from int8run.generate.generate import Generation, PromptCache, use_text_encoders
from int8run.metrics.embeddings import compute_encoder_metrics
from int8run.metrics.layers import (
    compute_int8_shares,
    compute_layer_metrics,
    count_module_bytes,
    measure_layer_outputs,
)
from int8run.metrics.memory import read_peak_bytes
from int8run.metrics.quality import SampleQuality, average_frames, find_half_error_step
from int8run.metrics.speed import compute_speed, list_step_times
from int8run.pipeline.build import BuiltModel, measure_lora_overhead
from int8run.text_encoders.base import find_text_encoders

log = logging.getLogger(__name__)

MAX_EMBEDDING_ERROR = 0.4  # twice that of nvfp4, the coarsest format


def measure_run(
    spec: RunSpec,
    built: BuiltModel,
    calls: Sequence[Mapping[str, Any]],
    candidate: Generation,
    baseline: Generation | None,
    errors: Sequence[float],
    reused: bool,
    fresh: bool,
) -> dict[str, float]:
    """All metrics but quality, under their public names.

    Args:
        errors: relative error of the latents after each step.
        fresh: the float model drew in this run; speeds of another day are not compared.
    """
    metrics = compute_speed(candidate, baseline if fresh else None)
    metrics["memory/peak_bytes"] = read_peak_bytes(built.device)
    encoders = find_text_encoders(built.pipe.components) | built.text_encoders.get(spec.candidate, {})
    metrics["memory/text_encoder_bytes"] = sum(map(count_module_bytes, encoders.values()))
    metrics["float/text_encoder_bytes"] = built.float_text_encoder_bytes
    if spec.clip.is_quantized:
        metrics |= compute_encoder_metrics(built.encoders.plans, list(pair_embeddings(built, spec.candidate)))
        if "clip/rel_err" not in metrics:
            log.info(
                "metrics.baseline=%s has no float text encoders in memory; embeddings are not compared",
                spec.metrics.baseline,
            )
        elif metrics["clip/rel_err"] > MAX_EMBEDDING_ERROR:
            log.warning(
                "the embeddings are %.0f %% from the float encoders', more than any format costs: the file is of another model, or is read "
                "otherwise than it was written",
                100 * metrics["clip/rel_err"],
            )
        metrics["memory/text_encoder_ratio"] = built.float_text_encoder_bytes / metrics["memory/text_encoder_bytes"]
    int8 = built.denoisers.get("int8")
    metrics["memory/denoiser_bytes"] = count_module_bytes(int8) if int8 else built.float_bytes
    metrics["memory/denoiser_ratio"] = built.float_bytes / metrics["memory/denoiser_bytes"]
    # a reused model cost this run nothing
    metrics["build/load_s"] = 0.0 if reused else built.seconds["load"]
    metrics["build/quantize_s"] = 0.0 if reused else built.seconds["quantize"]
    metrics["float/denoiser_bytes"] = built.float_bytes
    if baseline is not None:
        base = compute_speed(baseline, None) if fresh else {}
        metrics |= {name.replace("speed/", "float/"): value for name, value in base.items()}
        if int8 is not None:
            metrics["quality/half_error_step"] = find_half_error_step(errors)
    for plan in built.plans:  # a reused model still has what an earlier job measured
        plan.measured.pop("output_sqnr_db", None)
    if int8 is not None:
        if spec.metrics.layers and "float" in built.denoisers:
            measure_layer_outputs(built.denoisers["float"], int8, calls, built.plans)
        metrics |= compute_layer_metrics(built.plans) | compute_int8_shares(
            built.plans, built.macs, built.num_params
        )
    if built.budget is not None:
        metrics |= built.budget.metrics
    if spec.lora.adapters:
        loras = built.loras
        metrics["lora/modules_matched"] = loras.matches.n_matched
        metrics["lora/modules_unmatched"] = len(loras.matches.unmatched)
        metrics["lora/clipped_share"] = loras.clipped_share
        metrics |= {f"lora/layers_{mode}": count for mode, count in loras.layers_by_mode.items()}
        if loras.dynamic_layers and any(spec.lora.strengths):
            if built.lora_overhead is None:
                built.lora_overhead = measure_lora_overhead(built, calls)
            metrics["lora/overhead_ratio"] = built.lora_overhead
    return metrics


@torch.no_grad()
def pair_embeddings(built: BuiltModel, candidate: str) -> Iterator[tuple[Any, Any]]:
    """What the float text encoders, where they are, make of the prompts that were drawn, and what the quantized ones made of them."""
    if built.text_encoders.get("float"):
        use_text_encoders(built.pipe, "float", built.text_encoders["float"])
        yield from PromptCache.for_pipeline(built.pipe).iter_pairs(candidate)
        use_text_encoders(built.pipe, candidate, built.text_encoders[candidate])


def collect_series(
    candidate: Generation,
    baseline: Generation | None,
    quality: Sequence[SampleQuality],
    errors: Sequence[float],
) -> dict[str, list[float]]:
    """One value per step or frame, where there is one."""
    series: dict[str, Sequence[float]] = {"series/step_ms": list_step_times(candidate)}
    if baseline is not None:
        series |= {"series/float_step_ms": list_step_times(baseline), "series/latent_rel_err": errors}
        if candidate.is_video:
            series["series/frame_psnr_db"] = average_frames(quality, "psnr_db")
    return {name: list(values) for name, values in series.items()}


def has_scattered_times(metrics: Mapping[str, float]) -> bool:
    """Whether one step in ten took more than twice the median: a busy machine."""
    return any(
        metrics.get(f"{who}/step_ms_p90", 0) > 2 * metrics.get(f"{who}/step_ms_p50", 0)
        for who in ("speed", "float")
    )
