"""What a trial measured: how far its images are from those of the reference, how long they took, its memory.

The reference is the float model with the base recipe, so that all trials of a search are compared with the
same images, whatever steps or LoRAs they have of their own.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from int8run.errors import FileError
from int8run.metrics.clusters import Clusters, choose_clusters, gather_clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import Interval, compute_interval
from int8run.metrics.names import BLOCK_STEP_MS, SCATTERS
from int8run.metrics.psnr_limit import limit_psnr
from int8run.tracking.run_record import Record

SECONDS, BYTES = "seconds", "bytes"
COSTS = (SECONDS, BYTES)


@dataclass(frozen=True)
class Measurement:
    """The numbers of one trial.

    Args:
        psnrs_db: of each sample to the reference; identical images have the PSNR of almost identical ones.
        prompts: of each sample.
        seconds: per image, text encoding and decoding included.
        seconds_low, seconds_high: interval of `seconds`, as wide as its timed stretches scatter.
        bytes: of the denoiser and the text encoders.
        scatters: whether the times of its steps say little, because other work ran beside it.
    """

    psnrs_db: Sequence[float]
    prompts: Sequence[str]
    seconds: float
    seconds_low: float
    seconds_high: float
    bytes: float
    scatters: bool = False

    @property
    def quality_db(self) -> float:
        """The mean PSNR."""
        return statistics.fmean(self.psnrs_db)

    @property
    def squared_errors(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Mean squared error of each sample, of pixels in 0..1."""
        return np.asarray([10 ** (-psnr / 10) for psnr in self.psnrs_db])

    @property
    def clusters(self) -> Clusters:
        """Which samples are independent."""
        return choose_clusters(list(self.prompts), ["" for _ in self.prompts])

    def get_cost(self, minimise: str) -> float:
        """What a search minimises: one of COSTS."""
        return self.seconds if minimise == SECONDS else self.bytes

    def compute_quality_interval(self, settings: IntervalSettings) -> Interval | None:
        """The interval of the mean PSNR over prompts."""
        gathered = gather_clusters(list(self.psnrs_db), self.clusters.labels)
        return compute_interval(gathered, settings)

    def to_json(self) -> dict[str, object]:
        """As search.json has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Measurement":
        """From what search.json has."""
        return cls(**{**facts, "psnrs_db": tuple(facts["psnrs_db"]), "prompts": tuple(facts["prompts"])})


def measure_trial(record: Record, reference: Record, settings: IntervalSettings) -> Measurement:
    """Read what a run left, and compare its images with the float images of the reference.

    Args:
        record: of the trial.
        reference: of a run of the same samples, with images of the float model.
        settings: of the interval of the time.

    Raises:
        FileError: an image, or a number, is missing.
    """
    metrics = record.metrics
    rate, weights = metrics.get("speed/images_per_s"), metrics.get("memory/denoiser_bytes")
    if not rate or weights is None:
        raise FileError(f"{record.folder} has no speed or no memory in its metrics.json")
    seconds = 1 / rate
    low, high = bound_seconds(record, settings)
    psnrs, prompts = [], []
    for sample, other in pair_samples(record, reference):
        psnrs.append(compare_files(record.folder, sample, reference.folder, other))
        prompts.append(str(sample["prompt"]))
    return Measurement(
        psnrs_db=tuple(psnrs),
        prompts=tuple(prompts),
        seconds=seconds,
        seconds_low=seconds * low,
        seconds_high=seconds * high,
        bytes=weights + metrics.get("memory/text_encoder_bytes", 0.0),
        scatters=bool(metrics.get(SCATTERS)),
    )


def pair_samples(record: Record, reference: Record) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each sample of a trial beside the same one of the reference.

    Raises:
        FileError: the two have other samples.
    """
    by_key = {(sample["prompt"], sample["seed"]): sample for sample in reference.images}
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for sample in record.images:
        other = by_key.get((sample["prompt"], sample["seed"]))
        if other is None or other.get("float") is None:
            raise FileError(
                f"{reference.folder} has no float image of {sample['prompt']!r}, seed {sample['seed']}, to "
                f"compare {record.folder} with"
            )
        pairs.append((sample, other))
    if not pairs:
        raise FileError(f"{record.folder} has no images")
    return pairs


def compare_files(
    folder: Path, sample: Mapping[str, Any], reference_folder: Path, other: Mapping[str, Any]
) -> float:
    """The PSNR of a sample to the reference, in dB; of a video that of its stills together.

    Args:
        folder: of the trial.
        sample: its entry in metrics.json.
        reference_folder: of the reference.
        other: the entry of the same sample there.
    """
    names = sample.get("stills") or [sample["file"]]
    float_names = other.get("float_stills") or [other["float"]]
    squared, size = [], (0, 0)
    for name, float_name in zip(names, float_names, strict=False):
        pixels, float_pixels = read_pixels(folder / name), read_pixels(reference_folder / float_name)
        if pixels.shape != float_pixels.shape:
            raise FileError(f"{folder / name} and {reference_folder / float_name} have different sizes")
        squared.append(float(np.mean((pixels - float_pixels) ** 2)))
        size = (pixels.shape[1], pixels.shape[0])
    error = statistics.fmean(squared)
    return limit_psnr(math.inf if error == 0 else -10 * math.log10(error), size)


def read_pixels(path: Path) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """An image as [H, W, 3] in 0..1.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def bound_seconds(record: Record, settings: IntervalSettings) -> tuple[float, float]:
    """The limits of a time as factors of it, from the stretches in which the steps were timed.

    (1, 1) where there are fewer than two.
    """
    times = [time for time in record.series.get(BLOCK_STEP_MS, []) if time > 0]
    logarithms = np.log(np.asarray(times, dtype=np.float64))
    interval = compute_interval(logarithms, settings)
    if interval is None:
        return 1.0, 1.0
    middle = float(logarithms.mean())
    return math.exp(interval.low - middle), math.exp(interval.high - middle)
