"""The numbers of a run, under the names that metrics.json has.

Called by `tasks.run`, which knows what was generated. Quality is measured by `metrics.quality`, after these.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from int8run.backends.autotune_cache import open_cache_of
from int8run.backends.best_float import find_best_float
from int8run.config.run_spec import RunSpec
from int8run.generate.generate import Generation, set_text_encoders
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.prompts import Sample
from int8run.layers.plan import ATTENTION, FLOAT, LINEAR
from int8run.metrics.embeddings import compute_encoder_metrics
from int8run.metrics.energy import compute_energy
from int8run.metrics.equivalence import Equivalence
from int8run.metrics.layers import (
    compute_attention_metrics,
    compute_int8_shares,
    compute_layer_metrics,
    count_module_bytes,
    count_own_bytes,
    measure_layer_outputs,
)
from int8run.metrics.names import BLOCK_STEP_MS, FLOAT_BLOCK_STEP_MS, SCATTERS, SPEED_RATIO
from int8run.metrics.quality import SampleQuality, average_frames, find_half_error_step
from int8run.metrics.sample_statistics import SampleStatistics
from int8run.metrics.speed import (
    bound_speed_ratio,
    compute_speed,
    list_step_times,
    pair_blocks,
)
from int8run.metrics.videos import DRIFT, FLOAT_DRIFT
from int8run.models.given_model import find_text_encoders
from int8run.pipeline.built_model import BuiltModel, measure_lora_overhead
from int8run.report.columns import SAME_FILE_LAYERS
from int8run.report.step_times import has_scattered_times
from int8run.tasks.controlnet_metrics import measure_controlnets
from int8run.tasks.noise_floor import NoiseFloor
from int8run.tasks.vae_metrics import measure_vae

log = logging.getLogger(__name__)
MAX_EMBEDDING_ERROR = 0.4  # twice that of nvfp4, the coarsest format
LEAST_BATCHES = 6  # that are paired as they are; steps of fewer are split into blocks
# the denoiser's keyword arguments in one step, as `generate.capture` records them
DenoiserCalls = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunComparison:
    """What a run generated: the candidate's images or videos, and the float model's beside them.

    Args:
        samples: prompts and seeds, one per image or video.
        candidate: what the compared model generated (`int8`, `clip` or `float`).
        baseline: what the float model generated, in this run or before; None without a float model.
        timed_float: the generation that has the float model's times in this run: `baseline`, or a few steps
            where the images of `baseline` are those of an earlier job of this process. None where no float
            model ran in this run: speeds of different runs are not compared.
        latent_errors: relative error of the latents after each step; empty without a baseline.
        is_interleaved: whether both models took turns, so that their times can be paired.
        quality: one per sample; empty without a baseline, and until it is measured.
        set_quality: what is said of all samples at once, by public names; as empty.
        statistics: of the quality of all samples.
        variants: with a step cache, what INT8 generated without it and float with it, by the names of
            `run_generation`.
        noise_floor: what the float model generated, computed otherwise, where that was asked for.
        equivalences: INT8's distance to float against those of the float model to itself.
    """

    samples: Sequence[Sample]
    candidate: Generation
    baseline: Generation | None
    timed_float: Generation | None
    latent_errors: Sequence[float]
    is_interleaved: bool = False
    variants: Mapping[str, Generation] = field(default_factory=dict)
    quality: Sequence[SampleQuality] = ()
    set_quality: Mapping[str, float] = field(default_factory=dict)
    statistics: SampleStatistics = SampleStatistics()  # noqa: RUF009  # frozen
    noise_floor: NoiseFloor | None = None
    equivalences: Mapping[str, Equivalence] = field(default_factory=dict)

    @property
    def paired_times(self) -> tuple[list[float], list[float]] | None:
        """Step times of the candidate and of float for each stretch in which they took turns, in ms."""
        if not self.is_interleaved or self.timed_float is None:
            return None
        return pair_blocks(self.candidate, self.timed_float, LEAST_BATCHES)


def measure_run(
    spec: RunSpec, built: BuiltModel, comparison: RunComparison, calls: DenoiserCalls, *, is_reused: bool
) -> dict[str, float]:
    """Measure all but quality.

    Args:
        spec: the settings.
        built: the model that ran.
        comparison: what it generated.
        calls: of the denoiser in one step.
        is_reused: whether an earlier job built the model.

    Returns:
        Metrics by their public names.
    """
    comparable = comparison.timed_float
    metrics = measure_speed(spec, built, comparison, calls)
    metrics |= compute_energy(comparison.candidate, comparable)
    metrics["memory/peak_bytes"] = comparison.candidate.peak_bytes
    if comparable is not None and comparable.peak_bytes:  # those that an earlier job generated have none
        metrics["float/peak_bytes"] = comparable.peak_bytes
    metrics |= measure_text_encoders(spec, built)
    if built.controlnets:
        denoiser = built.denoisers[spec.candidate]
        metrics |= measure_controlnets(built.controlnets, denoiser, with_outputs=spec.metrics.layers)
    metrics |= measure_denoiser_size(spec, built)
    for name, count in comparison.candidate.steps_by_denoiser.items():
        metrics[f"steps/{name}"] = count
    # a reused model cost this run nothing
    metrics["build/load_s"] = 0.0 if is_reused else built.seconds["load"]
    metrics["build/quantize_s"] = 0.0 if is_reused else built.seconds["quantize"]
    metrics["float/denoiser_bytes"] = built.float_bytes
    if comparable is not None:
        metrics |= measure_float_speed(comparable)
    metrics[SCATTERS] = int(has_scattered_times(metrics))
    if comparison.baseline is not None and "int8" in built.denoisers:
        metrics["quality/half_error_step"] = find_half_error_step(comparison.latent_errors)
    if comparison.baseline is not None and built.num_dequantized_layers:
        metrics[SAME_FILE_LAYERS] = built.num_dequantized_layers
    metrics |= measure_layers(spec, built, calls)
    if built.vae is not None:
        metrics |= measure_vae(built.vae, built.device)
    if built.mixed_precision is not None:
        metrics |= built.mixed_precision.metrics
    if spec.lora.adapters:
        metrics |= measure_loras(spec, built, calls)
    return metrics


def measure_speed(
    spec: RunSpec, built: BuiltModel, comparison: RunComparison, calls: DenoiserCalls
) -> dict[str, float]:
    """Step times and rates of the compared model, and its ratios to float with their interval.

    Args:
        spec: the settings.
        built: the model that ran.
        comparison: what it generated.
        calls: of the denoiser in one step.
    """
    metrics = compute_speed(comparison.candidate, comparison.timed_float)
    if comparison.timed_float is None:
        return metrics
    ratio = metrics[SPEED_RATIO]
    if comparison.paired_times is not None:
        step_ms, float_step_ms = comparison.paired_times
        metrics |= bound_speed_ratio(step_ms, float_step_ms, ratio, spec.metrics.intervals)
    return metrics | compare_with_best_float(spec, built, calls, ratio)


def compare_with_best_float(
    spec: RunSpec, built: BuiltModel, calls: DenoiserCalls, ratio_vs_float: float
) -> dict[str, float]:
    """Compare INT8 with the fastest float dtype of this machine, measured once for each built model.

    Args:
        spec: the settings.
        built: the model that ran.
        calls: of the denoiser in one step.
        ratio_vs_float: the ratio to the model's own dtype.

    Returns:
        Nothing where there is no INT8 model, or where a copy of the float one cannot be timed beside it.
    """
    has_both = {"float", "int8"} <= built.denoisers.keys()
    if not has_both or spec.compile != "none" or spec.offload != "none":
        return {}
    if not built.is_best_float_tried:
        built.is_best_float_tried = True
        dtype = getattr(torch, spec.model.dtype)
        built.best_float = find_best_float(
            built.denoisers["float"],
            calls,
            dtype=dtype,
            largest=find_largest_layer(built),
            cache=open_cache_of(spec.backend, built.device, dtype),
        )
    if built.best_float is None:
        return {}
    return {"speed/ratio_vs_best_float": ratio_vs_float * built.best_float.time_share}


def find_largest_layer(built: BuiltModel) -> tuple[int, int, int]:
    """Rows, in_features and out_features of the Linear with the most multiply-adds in one step."""
    linears = [plan for plan in built.plans if plan.kind == LINEAR]
    plan = max(linears, key=lambda plan: built.macs.get(plan.name, 0))
    rows = built.macs.get(plan.name, 0) // (plan.in_features * plan.out_features)
    return max(1, rows), plan.in_features, plan.out_features


def measure_float_speed(generation: Generation) -> dict[str, float]:
    """The times and rates of the float model. A few steps without images have no rates."""
    names = {}
    for name, value in compute_speed(generation, None).items():
        if generation.frames or "step_ms" in name:
            names[name.replace("speed/", "float/")] = value
    return names


def measure_text_encoders(spec: RunSpec, built: BuiltModel) -> dict[str, float]:
    """Measure the memory of the text encoders, and the error of their embeddings if they are quantized."""
    encoders = find_text_encoders(built.pipe.components) | built.text_encoders.get(spec.candidate, {})
    nbytes = sum(count_module_bytes(encoder) for encoder in encoders.values())
    metrics: dict[str, float] = {
        "memory/text_encoder_bytes": nbytes,
        "float/text_encoder_bytes": built.float_text_encoder_bytes,
    }
    if not spec.clip.is_quantized:
        return metrics
    pairs = list(pair_embeddings(built, spec.candidate))
    metrics |= compute_encoder_metrics(built.encoders.plans, pairs)
    error = metrics.get("clip/rel_err")
    if error is None:
        log.info(
            "metrics.baseline=%s has no float text encoders in memory; embeddings are not compared",
            spec.metrics.baseline,
        )
    elif error > MAX_EMBEDDING_ERROR:
        log.warning(
            "the embeddings are %.0f %% from the float encoders', more than any format costs: "
            "the file is of another model, or is read otherwise than it was written",
            100 * error,
        )
    metrics["memory/text_encoder_ratio"] = built.float_text_encoder_bytes / nbytes
    return metrics


@torch.no_grad()
def pair_embeddings(built: BuiltModel, candidate: str) -> Iterator[tuple[Any, Any]]:
    """Encode the prompts of the run with the float text encoders, where they are in memory.

    Args:
        built: the model that ran.
        candidate: name of its text encoders, as in `BuiltModel.text_encoders`.

    Yields:
        What `encode_prompt` returns with the float encoders, and what it returned with the candidate's.
    """
    float_encoders = built.text_encoders.get("float")
    if not float_encoders:
        return
    set_text_encoders(built.pipe, "float", float_encoders)
    yield from PromptCache.for_pipeline(built.pipe).iter_pairs(candidate)
    set_text_encoders(built.pipe, candidate, built.text_encoders[candidate])


def measure_denoiser_size(spec: RunSpec, built: BuiltModel) -> dict[str, float]:
    """Measure the memory of the denoiser, and how many times smaller than the float one it is.

    Where the float denoiser computes some of the steps, it counts as well.
    """
    int8 = built.denoisers.get("int8")
    nbytes = count_module_bytes(int8) if int8 is not None else built.float_bytes
    if int8 is not None and spec.int8.has_float_steps:
        nbytes += count_own_bytes(built.denoisers["float"], int8)
    return {"memory/denoiser_bytes": nbytes, "memory/denoiser_ratio": built.float_bytes / nbytes}


def measure_layers(spec: RunSpec, built: BuiltModel, calls: DenoiserCalls) -> dict[str, float]:
    """Measure the INT8 layers, their outputs only where the float layers are in memory; updates the plans."""
    for plan in built.plans:  # a reused model still has what an earlier job measured
        if plan.kind != ATTENTION:
            plan.measured.pop("output_sqnr_db", None)
    int8 = built.denoisers.get("int8")
    if int8 is None:
        return {}
    if spec.metrics.layers and "float" in built.denoisers:
        measure_layer_outputs(built.denoisers["float"], int8, calls, built.plans)
    shares = compute_int8_shares(built.plans, built.num_params)
    metrics = compute_layer_metrics(built.plans) | shares
    if spec.int8.attention != FLOAT:
        metrics |= compute_attention_metrics(built.plans)
    return metrics


def measure_loras(spec: RunSpec, built: BuiltModel, calls: DenoiserCalls) -> dict[str, float]:
    """Count what the LoRAs changed, and measure the time that their branches take, once per built model."""
    loras = built.loras
    metrics: dict[str, float] = {
        "lora/modules_matched": loras.matches.n_matched,
        "lora/modules_unmatched": len(loras.matches.unmatched),
        "lora/clipped_share": loras.clipped_share,
    }
    for mode, count in loras.layers_by_mode.items():
        metrics[f"lora/layers_{mode}"] = count
    if loras.dynamic_layers and any(spec.lora.strengths):
        if built.lora_overhead is None:
            built.lora_overhead = measure_lora_overhead(built, calls)
        metrics["lora/overhead_ratio"] = built.lora_overhead
    return metrics


def collect_series(comparison: RunComparison) -> dict[str, list[float]]:
    """Collect what has one value per step or frame."""
    candidate = comparison.candidate
    series = {"series/step_ms": list_step_times(candidate)}
    if comparison.timed_float is not None:
        series["series/float_step_ms"] = list_step_times(comparison.timed_float)
    if comparison.paired_times is not None:
        series[BLOCK_STEP_MS], series[FLOAT_BLOCK_STEP_MS] = comparison.paired_times
    else:
        series[BLOCK_STEP_MS], _ = pair_blocks(candidate, candidate, LEAST_BATCHES)
    if comparison.baseline is None:
        return series
    series["series/latent_rel_err"] = list(comparison.latent_errors)
    if candidate.is_video:
        series["series/frame_psnr_db"] = average_frames(comparison.quality, "psnr_db")
    drift_series = {"series/drift": DRIFT, "series/float_drift": FLOAT_DRIFT}
    for name, metric in drift_series.items():
        drift = average_frames(comparison.quality, metric)
        if drift:
            series[name] = drift
    return series
