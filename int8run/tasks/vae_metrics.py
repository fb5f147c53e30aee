"""What the INT8 VAE costs and brings: the same latents are decoded by it and by the float one.

`run_metrics` calls `measure_vae`. The quality of a run as a whole includes this error.
"""

import logging
from functools import partial

import torch
from torch import Tensor

from int8run.layers.plan import LayerPlan
from int8run.layers.plan_summary import select_int8_plans
from int8run.metrics.layers import count_module_bytes
from int8run.metrics.quality import compute_psnr
from int8run.pipeline.vae import QuantizedVae, decode_latents
from int8run.utils.timing import time_medians

log = logging.getLogger(__name__)
ROUNDS = 3  # of each VAE, after one that warms up: an image of a large VAE takes seconds


def measure_vae(vae: QuantizedVae, device: torch.device) -> dict[str, float]:
    """Decode the latents that a run recorded with both VAEs.

    Args:
        vae: both, and the latents of the first image.
        device: where they run.

    Returns:
        Metrics by their public names; without quality and times where the pipeline decoded nothing.
    """
    num_bytes = count_module_bytes(vae.int8_vae)
    metrics: dict[str, float] = {
        **count_layers(vae.plans),
        "vae/memory_bytes": num_bytes,
        "vae/memory_ratio": count_module_bytes(vae.float_vae) / num_bytes,
    }
    if not vae.latents:
        log.warning("the pipeline decoded no latents by its VAE; what int8.vae=int8 costs is not measured")
        return metrics
    latents = vae.latents[0][:1].to(device)
    decode_float = partial(decode_latents, vae.float_vae, latents)
    decode_int8 = partial(decode_latents, vae.int8_vae, latents)
    with vae.placed(device, latents.dtype):
        metrics["vae/psnr_db"] = compute_psnr(to_colors(decode_int8()), to_colors(decode_float()))
        float_seconds, int8_seconds = time_medians([decode_float, decode_int8], device, ROUNDS)
    metrics["vae/decode_ms"] = 1000 * int8_seconds
    metrics["vae/decode_ratio"] = float_seconds / int8_seconds
    return metrics


def to_colors(image: Tensor) -> Tensor:
    """What a VAE makes, -1..1, as colors in 0..1."""
    return (image / 2 + 0.5).clamp(0, 1)


def count_layers(plans: list[LayerPlan]) -> dict[str, float]:
    """How many layers are INT8, and how good the worst weight is."""
    int8_plans = select_int8_plans(plans)
    metrics: dict[str, float] = {
        "vae/layers_int8": len(int8_plans),
        "vae/layers_float": len(plans) - len(int8_plans),
    }
    sqnr = [plan.measured["weight_sqnr_db"] for plan in int8_plans if "weight_sqnr_db" in plan.measured]
    if sqnr:
        metrics["vae/weight_sqnr_db_min"] = min(sqnr)
    return metrics
