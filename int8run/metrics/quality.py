"""How different the INT8 images are from the float model's: one comparison per sample and frame."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from int8run.generate.generate import Generation
from int8run.metrics.base import Measure, SamplePair, Scope, UnavailableError
from int8run.metrics.images import image_to_tensor
from int8run.metrics.key_frames import select_key_frames
from int8run.metrics.loading import LoadedMeasures, load_measures
from int8run.metrics.measures.ms_ssim import MsSsim

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleQuality:
    """One image or video beside the float model's.

    Args:
        values: each metric once; of a video the mean over those frames that have it.
        frames: the metrics of each frame; of an image there is one.
    """

    values: dict[str, float]
    frames: list[dict[str, float]]


def load_measures_for(
    candidate: Generation, baseline: Generation, measures: Iterable[Measure] = ()
) -> LoadedMeasures:
    """Load the metrics that some images are compared by; MS-SSIM without being asked where it is defined.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model.
        measures: that are asked for.
    """
    smallest_side = min(find_smallest_side(candidate), find_smallest_side(baseline))
    by_name = {measure.name: measure for measure in measures}
    if smallest_side >= MsSsim.needs.min_side:
        by_name = {MsSsim.name: MsSsim(), **by_name}
    return load_measures(by_name.values(), smallest_side)


@torch.no_grad()
def compare_generations(
    candidate: Generation,
    baseline: Generation,
    prompts: Sequence[str],
    loaded: LoadedMeasures | None = None,
) -> list[SampleQuality]:
    """Compare each image or video with the float model's; videos frame by frame.

    `psnr_db` has data range 1 and is infinite for identical images. `ssim` is Wang et al. 2004
    (doi 10.1109/TIP.2003.819861) with a Gaussian window of 11x11, sigma 1.5. `latent_rel_err` is
    `|a - b| / |b|` of the last latents, all frames together.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model.
        prompts: one per image or video.
        loaded: further metrics; None: there are none.
    """
    loaded = loaded or load_measures((), 0)
    pairs = pair_samples(candidate, baseline, prompts)
    latents = zip(candidate.trajectories, baseline.trajectories, strict=True)
    qualities = []
    for pair, (own_latents, float_latents) in zip(pairs, latents, strict=True):
        frame_metrics = compare_frames(pair, loaded)
        values = {}
        for name in list_metrics(frame_metrics):
            # a metric of the key frames alone is missing from the others
            measured = [metrics[name] for metrics in frame_metrics if name in metrics]
            values[name] = compute_mean(measured)
        for compare_sample in loaded.functions[Scope.SAMPLE].values():
            values |= compare_sample(pair)
        values["latent_rel_err"] = compute_relative_error(own_latents[-1], float_latents[-1])
        qualities.append(SampleQuality(values, frame_metrics))
    return qualities


@torch.no_grad()
def compare_sets(
    candidate: Generation, baseline: Generation, prompts: Sequence[str], loaded: LoadedMeasures
) -> dict[str, float]:
    """Compare all images with all of the float model's, by the metrics of sets; under their public names.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model.
        prompts: one per image or video.
        loaded: the metrics, of which those of sets are computed; one that cannot be is noted there.
    """
    pairs = pair_samples(candidate, baseline, prompts)
    values = {}
    for name, compare in loaded.functions[Scope.SET].items():
        try:
            distances = compare(pairs)
        except UnavailableError as error:
            log.warning("quality/%s is left out because %s", name, error)
            loaded.left_out.append(name)
            continue
        for metric, value in distances.items():
            values[make_public(metric)] = value
    return values


def pair_samples(candidate: Generation, baseline: Generation, prompts: Sequence[str]) -> list[SamplePair]:
    """Each image or video beside the float model's.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model.
        prompts: one per image or video.
    """
    samples = zip(candidate.frames, baseline.frames, prompts, strict=True)
    return [SamplePair(frames, float_frames, prompt) for frames, float_frames, prompt in samples]


def find_smallest_side(generation: Generation) -> int:
    """The shorter side of the smallest image, in pixels."""
    return min(min(frame.size) for frames in generation.frames for frame in frames)


def compare_frames(pair: SamplePair, loaded: LoadedMeasures) -> list[dict[str, float]]:
    """The metrics of each frame of a sample.

    Args:
        pair: of the INT8 and of the float model.
        loaded: further metrics.
    """
    key_frames = set(select_key_frames(len(pair.frames)).values())
    of_all = loaded.functions[Scope.FRAME].values()
    of_key_frames = loaded.functions[Scope.KEY_FRAMES].values()
    rows = []
    for number, (frame, float_frame) in enumerate(zip(pair.frames, pair.float_frames, strict=True)):
        x, y = image_to_tensor(frame), image_to_tensor(float_frame)
        metrics = {"psnr_db": compute_psnr(x, y), "ssim": compute_ssim(x, y)}
        functions = [*of_all, *of_key_frames] if number in key_frames else of_all
        for compare in functions:
            metrics |= compare(x, y, pair.prompt)
        rows.append(metrics)
    return rows


def compute_psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images [1, 3, H, W] in 0..1; infinite for identical ones."""
    if torch.equal(x, y):
        return math.inf
    psnr: Tensor = peak_signal_noise_ratio(x, y, data_range=1.0)
    return psnr.item()


def compute_sample_psnr(frames: Sequence[Image], float_frames: Sequence[Image]) -> float:
    """PSNR of a sample in dB: of a video the mean over its frames, as `compare_generations` has it."""
    psnrs = []
    for frame, float_frame in zip(frames, float_frames, strict=True):
        psnrs.append(compute_psnr(image_to_tensor(frame), image_to_tensor(float_frame)))
    return compute_mean(psnrs)


def compute_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM of two images [1, 3, H, W] in 0..1."""
    ssim = structural_similarity_index_measure(x, y, data_range=1.0, gaussian_kernel=True, sigma=1.5)
    assert isinstance(ssim, Tensor)  # and not a tuple with its maps, which are asked for with other arguments
    return ssim.item()


def average_quality(samples: Sequence[SampleQuality]) -> dict[str, float]:
    """The mean of each metric over the samples that have it, under its public name; `float/…` is one already.

    What tells how an edit or a video is kept is a matter of samples with such inputs. A value that is not a
    number is left out where others are finite; `sample_statistics` says so.
    """
    means = {}
    for name in list_metrics([sample.values for sample in samples]):
        measured = [sample.values[name] for sample in samples if name in sample.values]
        known = [value for value in measured if not math.isnan(value)]
        has_finite = any(map(math.isfinite, known))
        means[make_public(name)] = compute_mean(known if has_finite else measured)
    return means


def make_public(name: str) -> str:
    """The name that a run's metrics have: `quality/lpips`; `float/clip_score` is one already."""
    return name if "/" in name else f"quality/{name}"


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
