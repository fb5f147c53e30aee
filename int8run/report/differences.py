"""What each setting differs from the best one by, and whether the samples tell them apart.

Quality is compared sample by sample (same prompt, seed and inputs), speed by the stretches in which INT8 and
float took turns. `comparison` asks; the words are those of `verdict` and `difference_table`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.errors import ConfigError
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import Difference, compare_independent, compare_pairs
from int8run.metrics.names import BLOCK_STEP_MS, FLOAT_BLOCK_STEP_MS
from int8run.metrics.psnr_limit import limit_psnr
from int8run.report.columns import STEP_MS
from int8run.report.ranking import Candidate
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


def compare_quality(
    best: Candidate, others: Sequence[Candidate], settings: IntervalSettings
) -> list[Standing]:
    """Each candidate beside the closest to float, by the PSNR of the samples that both have.

    Args:
        best: the closest to float.
        others: what it is compared with.
        settings: of the intervals.
    """
    best_psnrs = collect_sample_psnrs(best)
    standings = []
    for candidate in others:
        psnrs = collect_sample_psnrs(candidate)
        shared = [key for key in best_psnrs if key in psnrs]
        difference = compare_pairs(
            [best_psnrs[key] for key in shared], [psnrs[key] for key in shared], settings
        )
        standings.append(Standing(candidate, difference))
    return standings


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
