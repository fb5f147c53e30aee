"""How different the INT8 pictures are from the float model's, from the same prompts, seeds, scheduler and LoRAs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from int8run.generate.generate import Generation
from int8run.metrics.perceptual import KEY_FRAMES_ONLY, MS_SSIM_SIDE, load_measures


@dataclass(frozen=True)
class SampleQuality:
    """One picture or video beside the float model's."""

    values: dict[str, float]  # each metric once: of a video the mean over those frames that have it
    frames: list[dict[str, float]]  # the metrics of each frame; of a picture there is one


def image_to_tensor(image: Image) -> Tensor:
    """Float [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


@torch.no_grad()
def compare_generations(
    candidate: Generation, baseline: Generation, prompts: Sequence[str], perceptual: Sequence[str] = ()
) -> list[SampleQuality]:
    """One row per picture or video; the frames of a video are compared one by one.

    `psnr_db` has data range 1 and is infinite for equal pictures. `ssim` is Wang et al. 2004 with a Gaussian window of
    11x11, sigma 1.5. `latent_rel_err` is `|a - b| / |b|` of the last latents, all frames together. `ms_ssim` comes with
    every picture that is large enough for it. `clip_score` looks at the first, the middle and the last frame.

    Args:
        prompts: one per picture or video.
        perceptual: names of metrics in `metrics.perceptual` to add; each that cannot be had is named in the log and left out.
    """
    side = min(
        min(frame.size) for made in (candidate, baseline) for frames in made.frames for frame in frames
    )
    always = ["ms_ssim"] if side >= MS_SSIM_SIDE else []
    extra = load_measures(dict.fromkeys([*always, *perceptual]), side)
    rows = []
    samples = zip(
        candidate.frames, baseline.frames, candidate.trajectories, baseline.trajectories, prompts, strict=True
    )
    for ours, floats, our_latents, float_latents, prompt in samples:
        shown = select_key_frames(len(ours)).values()
        frames = []
        for number, (a, b) in enumerate(zip(ours, floats, strict=True)):
            x, y = image_to_tensor(a), image_to_tensor(b)
            frame = {
                "psnr_db": math.inf
                if torch.equal(x, y)
                else peak_signal_noise_ratio(x, y, data_range=1.0).item(),
                "ssim": structural_similarity_index_measure(
                    x, y, data_range=1.0, gaussian_kernel=True, sigma=1.5
                ).item(),
            }
            for name, measure in extra.items():
                if name not in KEY_FRAMES_ONLY or number in shown:
                    frame |= measure(x, y, prompt)
            frames.append(frame)
        values = {
            name: float(np.mean([frame[name] for frame in frames if name in frame])) for name in frames[0]
        }
        rows.append(
            SampleQuality(
                values | {"latent_rel_err": compute_relative_error(our_latents[-1], float_latents[-1])},
                frames,
            )
        )
    return rows


def select_key_frames(count: int) -> dict[str, int]:
    """The frames that stand for a video, by what they are called; of a picture the only one."""
    return (
        {"first": 0, "middle": count // 2, "last": count - 1}
        if count > 2
        else dict(zip(("first", "last"), range(count), strict=False))
    )


def average_quality(rows: Sequence[SampleQuality]) -> dict[str, float]:
    """The mean over samples of each metric, under its public name; `float/…` is one already."""
    names = rows[0].values
    return {
        name if "/" in name else f"quality/{name}": float(np.mean([row.values[name] for row in rows]))
        for name in names
    }


def average_frames(rows: Sequence[SampleQuality], name: str) -> list[float]:
    """A metric of the first frame, the second and so on, each the mean over samples."""
    return [
        float(np.mean([frame[name] for frame in frames]))
        for frames in zip(*(row.frames for row in rows), strict=True)
    ]


def compute_trajectory_error(candidate: Generation, baseline: Generation) -> list[float]:
    """Relative latent error after each step, mean over samples: where the candidate drifts."""
    pairs = zip(candidate.trajectories, baseline.trajectories, strict=True)
    per_sample = [[compute_relative_error(a, b) for a, b in zip(x, y, strict=True)] for x, y in pairs]
    return [float(np.mean(step)) for step in zip(*per_sample, strict=True)]


def find_half_error_step(errors: Sequence[float]) -> int:
    """The first step, counted from 1, after which half of the last step's error is there; 0 when there is no error."""
    return next((i for i, error in enumerate(errors, 1) if 2 * error >= errors[-1] > 0), 0)


def compute_relative_error(actual: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return (torch.linalg.vector_norm(actual - reference) / torch.linalg.vector_norm(reference)).item()
