"""What the samples of a run say of each metric: mean, median, how sure the mean is, and the worst samples.

`tasks.run` calls it once the samples are compared. The means are those of `quality.average_quality`; how an
interval is computed is known to `intervals`.
"""

import logging
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from int8run.metrics.base import NEITHER
from int8run.metrics.clusters import Clusters, gather_clusters
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import Interval, compute_interval, name_interval_method
from int8run.metrics.names import HIGH, INDEPENDENT, LOW, MEDIAN, METRICS, SAMPLES, UNKNOWN
from int8run.metrics.quality import SampleQuality, average_quality, list_metrics, make_public

log = logging.getLogger(__name__)
MAX_WORST = 5  # samples that are named for each metric
MAX_NAMED = 3  # samples that a line of the log names


@dataclass(frozen=True)
class MetricStatistics:
    """One metric over the samples of a run.

    Args:
        mean: without infinite values where there are others, as in `metrics`.
        median: of all values, infinite ones included.
        interval: of the mean; None for fewer than two finite values.
        method: how the interval was computed; empty without one.
        num_samples: samples with a finite value.
        num_units: how many of them are independent, which the interval rests on; see `clusters`.
        num_infinite: samples whose value is infinite: the PSNR of identical images.
        num_undefined: samples whose value is not a number; they are left out of everything.
        worst: keys of the worst samples, the worst first; empty where neither more nor less is better.
    """

    mean: float
    median: float
    interval: Interval | None
    method: str
    num_samples: int
    num_units: int
    num_infinite: int
    num_undefined: int
    worst: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json; without an interval it has no limits."""
        entry: dict[str, Any] = {
            "mean": self.mean,
            "median": self.median,
            "samples": self.num_samples,
            "independent": self.num_units,
            "infinite": self.num_infinite,
            "undefined": self.num_undefined,
            "worst": list(self.worst),
        }
        if self.interval is not None:
            entry |= {"low": self.interval.low, "high": self.interval.high, "method": self.method}
        return entry


@dataclass(frozen=True)
class SampleStatistics:
    """Every metric of a run that has a value for each sample, by its public name.

    Args:
        by_metric: the statistics.
        num_samples: images or videos that were compared.
        num_units: how many of them are independent.
        level: of the intervals.
    """

    by_metric: Mapping[str, MetricStatistics] = field(default_factory=dict)
    num_samples: int = 0
    num_units: int = 0
    level: float = 0.95

    def flatten(self) -> dict[str, float]:
        """The metrics: means under their own names, limits and medians under those with an ending."""
        metrics: dict[str, float] = {}
        for name, found in self.by_metric.items():
            metrics[name] = found.mean
            if found.interval is not None:
                metrics[f"{name}{LOW}"] = found.interval.low
                metrics[f"{name}{HIGH}"] = found.interval.high
            metrics[f"{name}{MEDIAN}"] = found.median
        if self.by_metric:
            metrics[SAMPLES] = self.num_samples
        if self.by_metric and self.num_units < self.num_samples:
            metrics[INDEPENDENT] = self.num_units
        return metrics

    def to_json(self) -> dict[str, Any]:
        """Return the part `statistics` of metrics.json."""
        entries = {name: found.to_json() for name, found in self.by_metric.items()}
        return {"level": self.level, "metrics": entries}


def summarize_samples(
    samples: Sequence[SampleQuality],
    keys: Sequence[str],
    settings: IntervalSettings,
    clusters: Clusters | None = None,
) -> SampleStatistics:
    """Summarize each metric over the samples that have it, and log what an interval lacks.

    Args:
        samples: of a run.
        keys: what each sample is called.
        settings: of the intervals.
        clusters: which samples are independent; None: all.
    """
    if clusters is None:
        clusters = Clusters(keys)
    label_by_key = dict(zip(keys, clusters.labels, strict=True))
    means = average_quality(samples)
    by_metric: dict[str, MetricStatistics] = {}
    for name in list_metrics([sample.values for sample in samples]):
        values = {}
        for key, sample in zip(keys, samples, strict=True):
            if name in sample.values:
                values[key] = sample.values[name]
        public_name = make_public(name)
        mean = means[public_name]
        by_metric[public_name] = summarize_metric(
            public_name, values, mean=mean, settings=settings, labels=[label_by_key[key] for key in values]
        )
    if len(samples) == 1:
        log.info("one sample has no interval; more prompts, or prompts.seeds_per_prompt, give one")
    return SampleStatistics(
        by_metric=by_metric, num_samples=len(samples), num_units=clusters.count, level=settings.level
    )


def summarize_metric(
    name: str,
    values: Mapping[str, float],
    *,
    mean: float,
    settings: IntervalSettings,
    labels: Sequence[Hashable],
) -> MetricStatistics:
    """One metric over the samples that have it.

    Args:
        name: of the metric, its public one.
        values: by sample.
        mean: of them.
        settings: of the interval.
        labels: the cluster of each value.
    """
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    finite = [value for value in known.values() if math.isfinite(value)]
    gathered = gather_clusters(list(values.values()), labels)
    warn_of_undefined(name, [key for key in values if key not in known], num_samples=len(values))
    interval = limit_interval(compute_interval(gathered, settings), name, mean)
    return MetricStatistics(
        mean=mean,
        median=compute_median(list(known.values())),
        interval=interval,
        method=name_interval_method(len(gathered), settings) if interval is not None else "",
        num_samples=len(finite),
        num_units=len(gathered),
        num_infinite=len(known) - len(finite),
        num_undefined=len(values) - len(known),
        worst=find_worst(name, known),
    )


def limit_interval(interval: Interval | None, name: str, mean: float) -> Interval | None:
    """An interval that ends where its metric does: no error is below zero.

    It holds a mean that is there as often as before, because no mean is beyond.

    Args:
        interval: None for fewer than two samples.
        name: of the metric, its public one.
        mean: that stays inside, where rounding puts it beyond the end, as a cosine of 1.0000001.
    """
    if interval is None:
        return None
    metric = METRICS.get(name, UNKNOWN)
    low, high = max(interval.low, metric.lowest), min(interval.high, metric.highest)
    return Interval(low=min(low, mean), high=max(high, mean))


def compute_median(values: Sequence[float]) -> float:
    """The median; of two middle values of which one is infinite, the lower one; NaN without values."""
    if not values:
        return math.nan
    if any(map(math.isinf, values)):
        return statistics.median_low(values)
    return statistics.median(values)


def find_worst(name: str, values: Mapping[str, float]) -> list[str]:
    """The samples with the worst values, the worst first.

    Args:
        name: of the metric.
        values: by sample, numbers all of them.
    """
    direction = METRICS.get(name, UNKNOWN).direction
    if direction == NEITHER:
        return []
    in_order = sorted(values, key=lambda key: direction * values[key])
    return in_order[:MAX_WORST]


def warn_of_undefined(name: str, keys: Sequence[str], num_samples: int) -> None:
    """Log which samples have no number of a metric, which would make every mean of it none.

    Args:
        name: of the metric.
        keys: of the samples whose value is NaN.
        num_samples: that were measured.
    """
    if not keys:
        return
    named = ", ".join(keys[:MAX_NAMED])
    if len(keys) > MAX_NAMED:
        named += ", …"
    log.warning(
        "%s is not a number (NaN) in %d of %d samples (%s); they are left out of its mean",
        name,
        len(keys),
        num_samples,
        named,
    )
