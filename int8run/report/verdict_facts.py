"""What a recommendation rests on: the best candidates with their numbers, in words.

`verdict.recommend` puts these paragraphs below its sentence. It takes the comparison as it is and ranks
nothing.
"""

import math
from collections.abc import Sequence

from int8run.metrics.names import HIGH, LOW
from int8run.report.columns import (
    DENOISER_BYTES,
    DENOISER_RATIO,
    LATENT_ERROR,
    PSNR_DB,
    SPEED_RATIO,
    STEP_MS,
    MetricColumn,
    find_column,
)
from int8run.report.comparison import SweepComparison
from int8run.report.noise_floor_text import describe_noise_floors
from int8run.report.ranking import Candidate, find_fronts, find_pareto_front, format_names, list_speed_quality
from int8run.report.runs import Run, format_tags
from int8run.utils.plurals import count_noun

MAX_BETWEEN = 3  # further candidates of the Pareto front that the recommendation names
SSIM = "quality/ssim"
SPEED_METRICS = (STEP_MS, SPEED_RATIO)
QUALITY_METRICS = (PSNR_DB, SSIM, LATENT_ERROR)
MEMORY_METRICS = (DENOISER_BYTES, DENOISER_RATIO)
PHRASES = {
    STEP_MS: "{} per step",
    SPEED_RATIO: "{} the float model's speed",
    PSNR_DB: "PSNR {}",
    SSIM: "SSIM {}",
    LATENT_ERROR: "latent error {}",
    DENOISER_BYTES: "{}",
    DENOISER_RATIO: "{} smaller than float",
}
UNITS = {STEP_MS: " ms", DENOISER_BYTES: " MB", LATENT_ERROR: " %", PSNR_DB: " dB"}


def list_single_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """Speed, quality and memory of the only candidate, each where it was measured."""
    only = comparison.candidates[0]
    facts = []
    if comparison.fastest:
        facts.append(("Speed", describe_metrics(only, SPEED_METRICS)))
    if only.get_metric(PSNR_DB) is not None:
        facts.append(("Quality", describe_metrics(only, QUALITY_METRICS)))
    facts += list_noise_facts([only])
    if comparison.smallest:
        facts.append(("Denoiser", describe_metrics(only, MEMORY_METRICS)))
    if comparison.content_keys:
        facts.append(("Medians over", describe_medians(comparison, count_noun(len(only.runs), "run"))))
    return facts


def list_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The best candidates with their numbers, those between them, and the Pareto front."""
    return [
        *list_extreme_facts(comparison),
        *list_noise_facts(comparison.closest),
        *list_between_facts(comparison),
        *list_memory_facts(comparison),
        *list_median_facts(comparison),
        *list_front_facts(comparison),
    ]


def list_extreme_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The fastest candidates and those that are the closest to float."""
    facts = []
    if comparison.fastest:
        is_sure = comparison.is_fastest_sure and comparison.has_comparable_speeds
        term = "Fastest" if is_sure else "Fastest as measured"
        facts.append((term, describe_best(comparison.fastest, comparison, SPEED_METRICS)))
    if comparison.closest:
        term = "Closest to float" if comparison.is_closest_sure else "Closest as measured"
        facts.append((term, describe_best(comparison.closest, comparison, QUALITY_METRICS)))
    return facts


def list_noise_facts(closest: Sequence[Candidate]) -> list[tuple[str, str]]:
    """What the float model differs from itself by, beside the closest setting; empty where nobody asked."""
    facts = []
    for candidate in closest[:1]:
        record = candidate.runs[0].record
        for line in describe_noise_floors(record.noise_floor, record.metrics, record.statistics):
            facts.append(("Noise floor", line))
    return facts


def list_between_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The candidates of the Pareto front that are neither the fastest nor the closest."""
    if not comparison.has_comparable_speeds:
        return []
    extremes = [*comparison.fastest, *comparison.closest]
    texts = []
    for candidate in list_front_candidates(comparison):
        if candidate not in extremes:
            texts.append(describe_best([candidate], comparison, (*SPEED_METRICS, PSNR_DB)))
    if not texts:
        return []
    return [("Between them", "; ".join(texts[:MAX_BETWEEN]))]


def list_memory_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The candidates with the smallest denoiser."""
    if not comparison.smallest:
        return []
    return [("Smallest", describe_best(comparison.smallest, comparison, MEMORY_METRICS))]


def list_median_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """Over what every candidate's metrics are medians; empty where each candidate is one run."""
    if not comparison.content_keys:
        return []
    count = count_noun(len(comparison.candidates[0].runs), "run")
    return [("Medians over", describe_medians(comparison, f"{count} each"))]


def list_front_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The Pareto front of the candidates; empty where nothing can be compared."""
    front = list_front_candidates(comparison)
    if not front:
        return []
    # grouped candidates have names, single runs have tags
    if comparison.content_keys:
        names, others = format_names(front), "no other setting"
    else:
        names, others = format_tags([candidate.runs[0].tag for candidate in front]), "no other run"
    return [("Pareto front", f"{names}: {others} is faster without being further from float")]


def list_front_candidates(comparison: SweepComparison) -> list[Candidate]:
    """The candidates that no other beats in speed without being further from float."""
    ranked = comparison.ranked_by_quality
    return [ranked[index] for index in find_pareto_front(list_speed_quality(ranked))]


def list_fronts_by_images(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The Pareto fronts of runs that generated different images, each among the runs with the same ones."""
    front = sorted(find_fronts(runs).members)
    if not front:
        return []
    tags = format_tags([runs[index].tag for index in front])
    text = f"{tags}: no run with the same float images is faster without being further from float"
    return [("Among equal images", text)]


def describe_best(best: Sequence[Candidate], comparison: SweepComparison, metrics: Sequence[str]) -> str:
    """Names and metrics: `outlier=none: 5.2 ms per step, 2.54× the float model's speed`.

    Candidates that share the best value of one metric may differ in another, which is left out then.
    """
    name = "all" if len(best) == len(comparison.candidates) else format_names(best)
    shared_metrics = []
    for metric in metrics:
        phrases = {describe_metric(candidate, metric) for candidate in best}
        if len(phrases) == 1:
            shared_metrics.append(metric)
    return f"{name}: {describe_metrics(best[0], shared_metrics)}"


def describe_metrics(candidate: Candidate, metrics: Sequence[str]) -> str:
    """Metrics of a candidate in words; those that are missing are left out."""
    phrases = [describe_metric(candidate, metric) for metric in metrics]
    return ", ".join(phrase for phrase in phrases if phrase)


def describe_metric(candidate: Candidate, metric: str) -> str:
    """One metric of a candidate in words; empty where it is missing."""
    value = candidate.get_metric(metric)
    if value is None:
        return ""
    column = find_column(metric)
    decimals = column.choose_decimals([value])
    number = column.format(value, decimals)
    unit = UNITS.get(metric, "") if math.isfinite(value) else ""
    return PHRASES[metric].format(number + unit) + describe_interval(candidate, column, decimals)


def describe_interval(candidate: Candidate, column: MetricColumn, decimals: int) -> str:
    """The interval of a metric of a single run: ` [49.1, 50.8]`; empty of several runs, and without one.

    Args:
        candidate: of one run or several.
        column: of the metric.
        decimals: of its numbers.
    """
    low = candidate.get_metric(f"{column.metric}{LOW}")
    high = candidate.get_metric(f"{column.metric}{HIGH}")
    if len(candidate.runs) > 1 or low is None or high is None:
        return ""
    return f" [{column.format(low, decimals)}, {column.format(high, decimals)}]"


def describe_medians(comparison: SweepComparison, count: str) -> str:
    """Over what the candidates' metrics are medians, and why.

    Args:
        comparison: of candidates that are several runs each.
        count: how many runs, in words.
    """
    keys = ", ".join(comparison.content_keys)
    has_quality = any(candidate.get_metric(PSNR_DB) is not None for candidate in comparison.candidates)
    compared = "INT8 is compared with float" if has_quality else "speeds are compared"
    return f"{keys} ({count}): chosen for the image, so {compared} at each value"
