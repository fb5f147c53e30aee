"""Which samples are independent of each other: seeds of one prompt resemble each other, prompts do not.

Pure functions. A run's statistics, the noise floor's test and the report ask before they compute an interval.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

PROMPT, INPUT, SAMPLE = "prompt", "input", "sample"


@dataclass(frozen=True)
class Clusters:
    """What each sample belongs to; samples with different labels are independent.

    Args:
        labels: one for each sample, in order.
        unit: what a label stands for: PROMPT, INPUT, or SAMPLE where each sample has its own.
    """

    labels: Sequence[Hashable]
    unit: str = SAMPLE

    @property
    def count(self) -> int:
        """How many there are."""
        return len(set(self.labels))


def choose_clusters(prompts: Sequence[str], inputs: Sequence[Hashable]) -> Clusters:
    """The clusters of some samples: their prompts; of a single prompt its inputs, else the samples.

    What is said of the samples of a single prompt is about that prompt alone.

    Args:
        prompts: of each sample.
        inputs: what identifies the files that each sample began with; all the same where there are none.
    """
    for labels, unit in ((prompts, PROMPT), (inputs, INPUT)):
        num_labels = len(set(labels))
        if num_labels == len(labels):
            break
        if num_labels > 1:
            return Clusters(list(labels), unit)
    return Clusters(range(len(prompts)))


def gather_clusters(values: Sequence[float], labels: Sequence[Hashable]) -> list[float]:
    """One number for each cluster, so that the mean of these is the mean of all finite values.

    Of clusters of equal size it is their mean. Otherwise it is m + n_c / mean(n) · (m_c - m), with the mean m
    of all, m_c and n_c of the cluster: the linearized ratio of sum and number, whose variance is that of the
    mean over clusters (Cochran 1977, "Sampling Techniques", section 9A).

    Args:
        values: those that are not finite are left out.
        labels: the cluster of each.
    """
    groups: dict[Hashable, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        if math.isfinite(value):
            groups.setdefault(label, []).append(value)
    if not groups:
        return []
    num_values = sum(len(group) for group in groups.values())
    mean = sum(sum(group) for group in groups.values()) / num_values
    mean_size = num_values / len(groups)
    gathered = []
    for group in groups.values():
        if len(group) == mean_size:
            gathered.append(sum(group) / len(group))
        else:
            gathered.append(mean + (sum(group) - len(group) * mean) / mean_size)
    return gathered
