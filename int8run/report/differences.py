"""What each setting differs from the best one by, and whether the samples tell them apart.

Quality is compared sample by sample (same prompt, seed and inputs), speed by the stretches in which INT8 and
float took turns. The closest is chosen by the same numbers; all pairs of settings share one error rate.
`comparison` asks; the words are those of `verdict` and `difference_table`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.errors import ConfigError
from int8run.metrics.clusters import Clusters, choose_clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import Difference, compare_independent, compare_pairs
from int8run.metrics.names import BLOCK_STEP_MS, FLOAT_BLOCK_STEP_MS
from int8run.metrics.psnr_limit import limit_psnr
from int8run.report.columns import PSNR_DB, STEP_MS
from int8run.report.ranking import Candidate, find_best
from int8run.report.runs import Run
from int8run.report.sample_files import SampleKey, list_sample_keys

SAMPLE_PSNR = "psnr_db"


@dataclass(frozen=True)
class Standing:
    """A candidate beside the best one of a metric.

    Args:
        candidate: that is not the best one.
        difference: by which the best one is ahead. Of PSNRs in dB; of speeds the natural logarithm of their
            ratio.
    """

    candidate: Candidate
    difference: Difference

    @property
    def is_tied(self) -> bool:
        """Whether the samples do not tell it from the best one."""
        return self.difference.sign <= 0


@dataclass(frozen=True)
class SharedSamples:
    """The PSNRs of several candidates on the samples that all of them have.

    Args:
        keys: of these samples.
        psnrs: of each candidate that has samples, by its name, in the order of `keys`, in dB.
    """

    keys: Sequence[SampleKey]
    psnrs: Mapping[str, Sequence[float]]

    @property
    def clusters(self) -> Clusters:
        """Which of the samples are independent."""
        return choose_clusters([key.prompt for key in self.keys], [key.inputs for key in self.keys])


def share_samples(candidates: Sequence[Candidate]) -> SharedSamples:
    """The PSNRs of the samples that all have; candidates of early versions have none, and are left out."""
    found = {}
    for candidate in candidates:
        psnrs = collect_sample_psnrs(candidate)
        if psnrs:
            found[candidate.name] = psnrs
    if not found:
        return SharedSamples([], {})
    first, *others = found.values()
    keys = [key for key in first if all(key in psnrs for psnrs in others)]
    return SharedSamples(keys, {name: [psnrs[key] for key in keys] for name, psnrs in found.items()})


def find_closest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with the largest mean PSNR over the samples that all have; empty where none has a PSNR.

    Identical images count as almost identical ones here too, so that the closest is ahead in the mean of the
    differences as well. Runs without samples, of early versions, are compared by their own means.
    """
    measured = [candidate for candidate in candidates if candidate.get_metric(PSNR_DB) is not None]
    shared = share_samples(measured)
    if not shared.keys:
        return find_best(candidates, PSNR_DB, direction=1)
    means = {name: statistics.fmean(psnrs) for name, psnrs in shared.psnrs.items()}
    best = max(means.values())
    return [candidate for candidate in candidates if means.get(candidate.name) == best]


def compare_quality(
    best: Candidate, others: Sequence[Candidate], settings: IntervalSettings
) -> list[Standing]:
    """Each candidate beside the closest to float, by the PSNR of the samples that all have.

    Args:
        best: the closest to float.
        others: what it is compared with.
        settings: of the intervals.
    """
    shared = share_samples([best, *others])
    clusters = shared.clusters
    settings = settings.share_among(count_pairs(1 + len(others)))
    of_best = shared.psnrs.get(best.name, [])
    standings = []
    for candidate in others:
        psnrs = shared.psnrs.get(candidate.name, [])
        if len(psnrs) == len(of_best):
            difference = compare_pairs(of_best, psnrs, settings, clusters)
        else:  # one of both has no samples
            difference = compare_pairs([], [], settings)
        standings.append(Standing(candidate, difference))
    return standings


def count_pairs(num_candidates: int) -> int:
    """How many pairs of settings there are: the best one could have been any of them.

    Comparisons with the best alone are fewer, but it is also the luckiest on these samples: of equal settings
    the best and the worst differ as the largest of all pairs does.
    """
    return num_candidates * (num_candidates - 1) // 2


def collect_sample_psnrs(candidate: Candidate) -> dict[SampleKey, float]:
    """The PSNR of each sample of a candidate, in dB; of several runs, such as strengths, its mean.

    Identical images count as almost identical ones, so that differences are finite.
    """
    psnrs: dict[SampleKey, list[float]] = {}
    for run in candidate.runs:
        samples = run.record.images
        for key, sample in zip(list_sample_keys(samples), samples, strict=True):
            psnr = read_psnr(sample)
            if psnr is not None:
                psnrs.setdefault(key, []).append(psnr)
    return {key: statistics.fmean(values) for key, values in psnrs.items()}


def read_psnr(sample: Mapping[str, Any]) -> float | None:
    """A sample's PSNR as a finite number; None where it has none.

    Args:
        sample: an entry of metrics.json; those of early versions do not say how large it is.
    """
    psnr = sample.get(SAMPLE_PSNR)
    if psnr is None or math.isnan(psnr):
        return None
    if "width" in sample and "height" in sample:
        psnr = limit_psnr(psnr, (sample["width"], sample["height"]))
    return float(psnr) if math.isfinite(psnr) else None


def compare_speed(
    best: Candidate, others: Sequence[Candidate], metric: str, settings: IntervalSettings
) -> list[Standing]:
    """Each candidate beside the fastest one, by the stretches that were timed.

    Args:
        best: the fastest.
        others: what it is compared with.
        metric: `speed/ratio_vs_float`, or `speed/step_ms_p50` where there is no float model beside INT8.
        settings: of the intervals.
    """
    best_speeds = collect_log_speeds(best, metric)
    settings = settings.share_among(count_pairs(1 + len(others)))
    standings = []
    for candidate in others:
        speeds = collect_log_speeds(candidate, metric)
        standings.append(Standing(candidate, compare_independent(best_speeds, speeds, settings)))
    return standings


def collect_log_speeds(candidate: Candidate, metric: str) -> list[float]:
    """The logarithm of the speed in each stretch that was timed; empty of runs of earlier versions.

    Args:
        candidate: of one run or several.
        metric: what speeds are compared by.
    """
    speeds = []
    for run in candidate.runs:
        step_ms = run.record.series.get(BLOCK_STEP_MS, [])
        float_step_ms = run.record.series.get(FLOAT_BLOCK_STEP_MS, [])
        if metric == STEP_MS:
            speeds += [-math.log(time) for time in step_ms]
        elif len(float_step_ms) == len(step_ms):
            speeds += [
                math.log(of_float / time) for time, of_float in zip(step_ms, float_step_ms, strict=True)
            ]
    return speeds


def read_interval_settings(runs: Sequence[Run]) -> IntervalSettings:
    """The settings of intervals that the first run has; the defaults where it is of an earlier version."""
    for run in runs:
        metrics = run.record.config.get("metrics") or {}
        written = metrics.get("intervals")
        if isinstance(written, Mapping):
            values = {str(key): value for key, value in written.items() if key != "_target_"}
            try:
                return IntervalSettings(**values)
            except (ConfigError, TypeError):  # of another version
                return IntervalSettings()
    return IntervalSettings()
