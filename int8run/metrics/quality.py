"""How different the INT8 pictures are from the float model's, from the same prompts, seeds, scheduler and LoRAs."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from int8run.generate.generate import Generation
from int8run.metrics.perceptual import MS_SSIM_SIDE, measures


def to_tensor(image: Image) -> Tensor:
    """Float [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


@torch.no_grad()
def per_image(
    candidate: Generation, baseline: Generation, prompts: Sequence[str], perceptual: Sequence[str] = ()
) -> list[dict[str, float]]:
    """One row per picture.

    `psnr_db` has data range 1 and is infinite for equal pictures. `ssim` is Wang et al. 2004 with a Gaussian window of
    11x11, sigma 1.5. `latent_rel_err` is `|a - b| / |b|` of the last latents. `ms_ssim` comes with every picture that is
    large enough for it.

    Args:
        prompts: one per picture.
        perceptual: names of metrics in `metrics.perceptual` to add; each that cannot be had is named in the log and left out.
    """
    side = min(min(image.size) for image in (*candidate.images, *baseline.images))
    always = ["ms_ssim"] if side >= MS_SSIM_SIDE else []
    extra = measures(dict.fromkeys([*always, *perceptual]), side)
    rows = []
    images, latents = (candidate.images, baseline.images), (candidate.trajectories, baseline.trajectories)
    for a, b, la, lb, prompt in zip(*images, *latents, prompts, strict=True):
        x, y = to_tensor(a), to_tensor(b)
        row = {
            "psnr_db": math.inf if torch.equal(x, y) else peak_signal_noise_ratio(x, y, data_range=1.0).item(),
            "ssim": structural_similarity_index_measure(x, y, data_range=1.0, gaussian_kernel=True, sigma=1.5).item(),
            "latent_rel_err": relative_error(la[-1], lb[-1]),
        }
        for measure in extra:
            row |= measure(x, y, prompt)
        rows.append(row)
    return rows


def mean_quality(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over pictures of each column, under its public name; `float/…` is one already."""
    return {name if "/" in name else f"quality/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}


def trajectory_error(candidate: Generation, baseline: Generation) -> list[float]:
    """Relative latent error after each step, mean over samples: where the candidate drifts."""
    pairs = zip(candidate.trajectories, baseline.trajectories, strict=True)
    per_sample = [[relative_error(a, b) for a, b in zip(x, y, strict=True)] for x, y in pairs]
    return [float(np.mean(step)) for step in zip(*per_sample, strict=True)]


def half_error_step(errors: Sequence[float]) -> int:
    """The first step, counted from 1, after which half of the last step's error is there; 0 when there is no error."""
    return next((i for i, error in enumerate(errors, 1) if 2 * error >= errors[-1] > 0), 0)


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return (torch.linalg.vector_norm(actual - reference) / torch.linalg.vector_norm(reference)).item()
