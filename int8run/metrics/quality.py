"""How different the INT8 images are from the float model's: one comparison per sample and frame."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from int8run.generate.generate import Generation
from int8run.metrics.perceptual import KEY_FRAMES_ONLY, MS_SSIM_SIDE, Measure, load_measures


@dataclass(frozen=True)
class SampleQuality:
    """One image or video beside the float model's.

    Args:
        values: each metric once; of a video the mean over those frames that have it.
        frames: the metrics of each frame; of an image there is one.
    """

    values: dict[str, float]
    frames: list[dict[str, float]]


def image_to_tensor(image: Image) -> Tensor:
    """An image as float [1, 3, H, W] in 0..1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@torch.no_grad()
def compare_generations(
    candidate: Generation, baseline: Generation, prompts: Sequence[str], perceptual: Sequence[str] = ()
) -> list[SampleQuality]:
    """Compare each image or video with the float model's; videos frame by frame.

    `psnr_db` has data range 1 and is infinite for identical images. `ssim` is Wang et al. 2004
    (doi 10.1109/TIP.2003.819861) with a Gaussian window of 11x11, sigma 1.5. `latent_rel_err` is
    `|a - b| / |b|` of the last latents, all frames together. `ms_ssim` is added where all images are large
    enough for it. `clip_score` uses the first, the middle and the last frame of a video.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model.
        prompts: one per image or video.
        perceptual: names of metrics in `metrics.perceptual` to add. One that cannot be computed is skipped
            with a warning.
    """
    smallest_side = min(find_smallest_side(candidate), find_smallest_side(baseline))
    always = ["ms_ssim"] if smallest_side >= MS_SSIM_SIDE else []
    measures = load_measures(dict.fromkeys([*always, *perceptual]), smallest_side)

    samples = zip(
        candidate.frames, baseline.frames, candidate.trajectories, baseline.trajectories, prompts, strict=True
    )
    qualities = []
    for frames, float_frames, latents, float_latents, prompt in samples:
        frame_metrics = compare_frames(frames, float_frames, prompt, measures)
        values = {}
        for name in frame_metrics[0]:
            # a metric of the key frames alone is missing from the others
            measured = [metrics[name] for metrics in frame_metrics if name in metrics]
            values[name] = compute_mean(measured)
        values["latent_rel_err"] = compute_relative_error(latents[-1], float_latents[-1])
        qualities.append(SampleQuality(values, frame_metrics))
    return qualities


def find_smallest_side(generation: Generation) -> int:
    """The shorter side of the smallest image, in pixels."""
    return min(min(frame.size) for frames in generation.frames for frame in frames)


def compare_frames(
    frames: Sequence[Image], float_frames: Sequence[Image], prompt: str, measures: Mapping[str, Measure]
) -> list[dict[str, float]]:
    """The metrics of each frame of a sample.

    Args:
        frames: of the INT8 model.
        float_frames: of the float model, as many.
        prompt: of the sample.
        measures: further metrics by name.
    """
    key_frames = set(select_key_frames(len(frames)).values())
    rows = []
    for number, (frame, float_frame) in enumerate(zip(frames, float_frames, strict=True)):
        x, y = image_to_tensor(frame), image_to_tensor(float_frame)
        metrics = {"psnr_db": compute_psnr(x, y), "ssim": compute_ssim(x, y)}
        for name, measure in measures.items():
            if name not in KEY_FRAMES_ONLY or number in key_frames:
                metrics |= measure(x, y, prompt)
        rows.append(metrics)
    return rows


def compute_psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images [1, 3, H, W] in 0..1; infinite for identical ones."""
    if torch.equal(x, y):
        return math.inf
    psnr: Tensor = peak_signal_noise_ratio(x, y, data_range=1.0)
    return psnr.item()


def compute_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM of two images [1, 3, H, W] in 0..1."""
    ssim = structural_similarity_index_measure(x, y, data_range=1.0, gaussian_kernel=True, sigma=1.5)
    assert isinstance(ssim, Tensor)  # and not a tuple with its maps, which are asked for with other arguments
    return ssim.item()


def select_key_frames(num_frames: int) -> dict[str, int]:
    """The frames that stand for a video, by what they are called; of an image the only one."""
    if num_frames > 2:
        return {"first": 0, "middle": num_frames // 2, "last": num_frames - 1}
    return dict(zip(("first", "last"), range(num_frames), strict=False))


def average_quality(samples: Sequence[SampleQuality]) -> dict[str, float]:
    """The mean of each metric over the samples that have it, under its public name; `float/…` is one already.

    What tells how an edit or a video is kept is a matter of samples with such inputs.
    """
    means = {}
    for name in list_metrics([sample.values for sample in samples]):
        public_name = name if "/" in name else f"quality/{name}"
        measured = [sample.values[name] for sample in samples if name in sample.values]
        means[public_name] = compute_mean(measured)
    return means


def compute_mean(values: Sequence[float]) -> float:
    """The mean of what was measured, without infinite values where there are others.

    The PSNR of one identical image or frame is infinite, and would make all of them look identical. So the
    mean says less good of them than is true, never better.
    """
    not_infinite = [value for value in values if not math.isinf(value)]
    return float(np.mean(not_infinite or values))


def list_metrics(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of all metrics that any of some rows has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def average_frames(samples: Sequence[SampleQuality], name: str) -> list[float]:
    """A metric of the first frame, the second and so on, each the mean over the samples that have it."""
    measured = [sample.frames for sample in samples if name in sample.frames[0]]
    frames_of_samples = zip(*measured, strict=True)
    return [compute_mean([frame[name] for frame in frames]) for frames in frames_of_samples]


def compute_trajectory_error(candidate: Generation, baseline: Generation) -> list[float]:
    """Relative latent error after each step, mean over samples: where the candidate drifts away.

    A sample whose strength leaves out the first steps counts in the last ones.
    """
    errors_of_samples = []
    for latents, float_latents in zip(candidate.trajectories, baseline.trajectories, strict=True):
        steps = zip(latents, float_latents, strict=True)
        errors_of_samples.append([compute_relative_error(x, y) for x, y in steps])
    from_the_end = zip_longest(*(reversed(errors) for errors in errors_of_samples))
    means = [float(np.mean([error for error in errors if error is not None])) for errors in from_the_end]
    return means[::-1]


def find_half_error_step(errors: Sequence[float]) -> int:
    """The first step, counted from 1, that has half of the last step's error; 0 without an error."""
    for step, error in enumerate(errors, 1):
        if 2 * error >= errors[-1] > 0:
            return step
    return 0


def compute_relative_error(actual: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = torch.linalg.vector_norm(actual - reference)
    ratio: Tensor = difference / torch.linalg.vector_norm(reference)
    return ratio.item()
