"""What the float model differs from itself by, and whether INT8 differs by more.

Called by `tasks.run` after INT8's images were compared with float's. `noise_floor` has the images, and
`metrics.equivalence` the test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from int8run.generate.generate import Generation
from int8run.metrics.clusters import Clusters
from int8run.metrics.equivalence import Equivalence, compare_with_margin
from int8run.metrics.psnr_limit import limit_psnr
from int8run.metrics.quality import SampleQuality, compute_sample_psnr
from int8run.metrics.settings import MetricsSettings
from int8run.tasks.noise_floor import NoiseFloor

PSNR = "psnr_db"


def add_noise_floor(
    quality: Sequence[SampleQuality], baseline: Generation, noise_floor: NoiseFloor
) -> list[SampleQuality]:
    """Add each sample's PSNR of the float model to itself.

    Args:
        quality: of INT8's samples.
        baseline: the float model as it is.
        noise_floor: the same, computed otherwise.
    """
    completed = list(quality)
    for metric, generation in noise_floor.generations.items():
        name = metric.removeprefix("quality/")
        pairs = zip(completed, generation.frames, baseline.frames, strict=True)
        completed = [
            replace(sample, values=sample.values | {name: compute_sample_psnr(frames, float_frames)})
            for sample, frames, float_frames in pairs
        ]
    return completed


def compare_with_noise_floor(
    quality: Sequence[SampleQuality],
    candidate: Generation,
    noise_floor: NoiseFloor,
    settings: MetricsSettings,
    clusters: Clusters | None = None,
) -> dict[str, Equivalence]:
    """Test INT8's distance to float against each distance of the float model to itself.

    Args:
        quality: of the samples, with `add_noise_floor`.
        candidate: what INT8 generated.
        noise_floor: what the float model generated, computed otherwise.
        settings: margin and level.
        clusters: which samples are independent; None: all.

    Returns:
        By the metric of each variation.
    """
    sizes = [frames[0].size for frames in candidate.frames]
    found = {}
    for metric in noise_floor.generations:
        name = metric.removeprefix("quality/")
        differences = []
        for sample, size in zip(quality, sizes, strict=True):
            int8, itself = limit_psnr(sample.values[PSNR], size), limit_psnr(sample.values[name], size)
            differences.append(int8 - itself)
        found[metric] = compare_with_margin(differences, settings.margin_db, settings.intervals, clusters)
    return found


def flatten_equivalences(equivalences: Mapping[str, Equivalence]) -> dict[str, float]:
    """The metrics of the tests: the mean gap to each noise floor, and the p-value."""
    metrics = {}
    for metric, found in equivalences.items():
        stem = metric.removesuffix("_db")
        metrics[f"{stem}_gap_db"] = found.mean_db
        if found.p_value is not None:
            metrics[f"{stem}_p"] = found.p_value
    return metrics


def describe_noise_floor(noise_floor: NoiseFloor, equivalences: Mapping[str, Equivalence]) -> dict[str, Any]:
    """The part `noise_floor` of metrics.json: what was drawn, what could not be, and the tests.

    Args:
        noise_floor: what was drawn.
        equivalences: by metric; empty where there is no INT8 model.
    """
    drawn = {}
    for variation in noise_floor.variations:
        entry: dict[str, Any] = {"varied": list(variation.changes)}
        if variation.metric in equivalences:
            entry["test"] = equivalences[variation.metric].to_json()
        drawn[variation.metric] = entry
    return {"drawn": drawn, "not_varied": list(noise_floor.impossible)}
