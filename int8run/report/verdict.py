"""The recommendation at the top of a report: which setting to use, why, and what limits the advice.

`recommend` compares the runs once (`comparison`) and hands the result to one function per paragraph. Decides
between the fastest and the closest to float, and chooses the words; it ranks nothing, and knows nothing of
HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import (
    DENOISER_BYTES,
    DENOISER_RATIO,
    LATENT_ERROR,
    PSNR_DB,
    SAME_FILE_LAYERS,
    SAME_FILE_LIMITS,
    SPEED_RATIO,
    STEP_MS,
    find_column,
)
from int8run.report.comparison import SweepComparison, compare_runs, explain_incomparable_quality
from int8run.report.ranking import (
    Candidate,
    find_fronts,
    find_pareto_front,
    format_names,
    is_own_baseline,
    list_speed_quality,
)
from int8run.report.runs import Run, format_tags, select_measured
from int8run.utils.plurals import count_noun

# Smaller differences than these would not show again in a second measurement.
SPEED_NOISE = 0.03
QUALITY_NOISE_DB = 0.5

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


@dataclass(frozen=True)
class Recommendation:
    """Which setting to use.

    Args:
        verdict: the recommendation, in one or two sentences.
        facts: what it rests on, as term and text.
        warnings: why it may be wrong.
    """

    verdict: str
    facts: list[tuple[str, str]]
    warnings: list[str]


def recommend(runs: Sequence[Run]) -> Recommendation:
    """The recommendation that these runs support, as far as they support one."""
    comparison = compare_runs(runs)
    if not comparison.candidates:
        return Recommendation("No run finished with a measurement, so there is nothing to compare.", [], [])

    warnings = list_warnings(comparison)
    different_images = explain_incomparable_quality(comparison)
    if different_images:
        return Recommendation(
            verdict="These runs generated different images, so they do not show which setting to use.",
            facts=list_fronts_by_images(runs),
            warnings=[different_images, *warnings],
        )
    if len(comparison.candidates) == 1:
        return Recommendation(write_single_verdict(comparison), list_single_facts(comparison), warnings)
    return Recommendation(write_verdict(comparison), list_facts(comparison), warnings)


# -- warnings ------------------------------------------------------------------------------------------------


def list_warnings(comparison: SweepComparison) -> list[str]:
    """What limits the recommendation."""
    return [
        *comparison.speed_problems,
        *warn_of_speeds(comparison),
        *warn_of_same_files(comparison),
        *warn_of_missing_quality(comparison),
    ]


def warn_of_speeds(comparison: SweepComparison) -> list[str]:
    """Which speeds say little, and which are missing."""
    warnings = []
    if comparison.scattered_tags:
        tags = format_tags(comparison.scattered_tags)
        warnings.append(
            f"Step times of {tags} scatter by more than twice: other work ran on the machine, so these "
            "speeds say little."
        )
    if not comparison.fastest:
        warnings.append("No run measured its speed.")
        return warnings

    untimed = [run.tag for run in select_measured(comparison.runs) if run.get_metric(STEP_MS) is None]
    if untimed:
        warnings.append(f"The speed of {format_tags(untimed)} was not measured.")
    return warnings


def warn_of_same_files(comparison: SweepComparison) -> list[str]:
    """Which runs had a float model whose numbers come from the file that was tested."""
    same_file = [run.tag for run in comparison.runs if run.get_metric(SAME_FILE_LAYERS)]
    if not same_file:
        return []
    warning = (
        f"The float model of {format_tags(same_file)} was read from the same quantized file: PSNR to float "
        f"{SAME_FILE_LIMITS}."
    )
    unranked = [run.tag for run in comparison.runs if is_own_baseline(run)]
    if unranked and len(comparison.runs) > 1:
        warning += (
            f" INT8 and float have the same numbers in {format_tags(unranked)}, so quality is not compared "
            "with that of other runs."
        )
    return [warning]


def warn_of_missing_quality(comparison: SweepComparison) -> list[str]:
    """Which runs have no PSNR."""
    measured = select_measured(comparison.runs)
    unjudged = [run.tag for run in measured if run.get_metric(PSNR_DB) is None]
    if len(unjudged) == len(measured):
        return [
            "No run generated the float model's images (metrics.baseline=none), so nothing is known about "
            "quality."
        ]
    if unjudged:
        return [f"The quality of {format_tags(unjudged)} was not measured."]
    return []


# -- one candidate -------------------------------------------------------------------------------------------


def write_single_verdict(comparison: SweepComparison) -> str:
    """What the only candidate measured, and why there is no other."""
    only = comparison.candidates[0]
    text = summarize(only)
    if comparison.differs_in_content_alone:
        keys = " and ".join(comparison.content_keys)
        return (
            f"There is no setting to choose: these runs differ in {keys} alone, which changes what is "
            f"generated and not how well it is quantized. Their medians: {text}."
        )
    if len(comparison.runs) > 1:
        return f"Only {only.name} was measured: {text}."
    return f"{text[0].upper()}{text[1:]}."


def summarize(candidate: Candidate) -> str:
    """Speed, memory and quality of a candidate beside float, in one phrase."""
    parts = []

    speed_ratio = candidate.get_metric(SPEED_RATIO)
    if speed_ratio is not None:
        only = "" if speed_ratio >= 1 else "only "
        parts.append(f"{only}{speed_ratio:.2f} times the float model's speed")

    memory_ratio = candidate.get_metric(DENOISER_RATIO)
    if memory_ratio is not None:
        parts.append(f"a denoiser {memory_ratio:.2f} times smaller")

    psnr = candidate.get_metric(PSNR_DB)
    if psnr is not None and math.isinf(psnr):
        parts.append("images identical to the float model's")
    elif psnr is not None:
        parts.append(f"images at {psnr:.1f} dB PSNR to the float model's")
    return ", ".join(parts) or "no comparison with float"


def list_single_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """Speed, quality and memory of the only candidate, each where it was measured."""
    only = comparison.candidates[0]
    facts = []
    if comparison.fastest:
        facts.append(("Speed", describe_metrics(only, SPEED_METRICS)))
    if only.get_metric(PSNR_DB) is not None:
        facts.append(("Quality", describe_metrics(only, QUALITY_METRICS)))
    if comparison.smallest:
        facts.append(("Denoiser", describe_metrics(only, MEMORY_METRICS)))
    if comparison.content_keys:
        facts.append(("Medians over", describe_medians(comparison, count_noun(len(only.runs), "run"))))
    return facts


# -- several candidates --------------------------------------------------------------------------------------


def write_verdict(comparison: SweepComparison) -> str:
    """Which of several candidates to use, in one or two sentences."""
    fastest, closest = comparison.fastest, comparison.closest
    can_compare_speeds = bool(fastest) and comparison.has_comparable_speeds
    if not closest:
        if not can_compare_speeds:
            return "These runs do not show which setting to use."
        return f"{format_names(fastest)} is the fastest."
    if not can_compare_speeds:
        return (
            f"{format_names(closest)} is the closest to float. These runs cannot tell which is the fastest."
        )

    text = weigh_speed_and_quality(comparison)
    speed_ratio = fastest[0].get_metric(SPEED_RATIO)
    if speed_ratio is not None and speed_ratio < 1:
        text += " INT8 is slower than float here."
    return text


def weigh_speed_and_quality(comparison: SweepComparison) -> str:
    """The sentence that chooses between the fastest and the closest, or leaves the choice to the reader."""
    fastest, closest = comparison.fastest, comparison.closest
    both = [candidate for candidate in fastest if candidate in closest]
    if both:
        return f"Use {format_names(both)}: both the fastest and the closest to float."

    speed_loss = compute_speed_loss(comparison)
    if speed_loss is None:
        return (
            f"Choose: {format_names(fastest)} is the fastest that was timed; {format_names(closest)} is the "
            "closest to float, and its speed was not measured."
        )
    if speed_loss <= SPEED_NOISE:
        within = f"{100 * SPEED_NOISE:.0f} %"
        return f"Use {format_names(closest)}: the closest to float, and within {within} of the fastest."

    psnr_gain = compute_psnr_gain(comparison)
    if psnr_gain is not None and psnr_gain <= QUALITY_NOISE_DB:
        within = f"{QUALITY_NOISE_DB} dB"
        return f"Use {format_names(fastest)}: the fastest, and within {within} of the closest to float."

    if psnr_gain is None:
        advantage = "the closest to float"
    elif math.isinf(psnr_gain):
        advantage = "equal to float"
    else:
        advantage = f"{psnr_gain:.1f} dB closer to float"
    return (
        f"Choose: {format_names(fastest)} is the fastest; {format_names(closest)} is {advantage} "
        f"at {100 * speed_loss:.0f} % less speed."
    )


def compute_speed_loss(comparison: SweepComparison) -> float | None:
    """How much slower the closest candidate is than the fastest, as a share of the fastest one's speed.

    Returns:
        None where the closest one was not timed.
    """
    metric = comparison.speed_metric
    if metric is None:
        return None
    value_of_fastest = comparison.fastest[0].get_metric(metric)
    value_of_closest = comparison.closest[0].get_metric(metric)
    if not value_of_fastest or not value_of_closest:
        return None
    # a step time is fastest / closest, a ratio to float closest / fastest: the lower by the higher alike
    lower, higher = sorted((value_of_fastest, value_of_closest))
    return 1 - lower / higher


def compute_psnr_gain(comparison: SweepComparison) -> float | None:
    """How many dB the closest candidate is ahead of the fastest.

    Returns:
        None where the fastest has no PSNR, or one that may not be compared.
    """
    fastest, closest = comparison.fastest[0], comparison.closest[0]
    psnr_of_fastest = fastest.get_metric(PSNR_DB)
    psnr_of_closest = closest.get_metric(PSNR_DB)
    assert psnr_of_closest is not None  # it is the closest by its PSNR
    if psnr_of_fastest is None or fastest not in comparison.ranked_by_quality:
        return None
    if psnr_of_closest == psnr_of_fastest:
        return 0.0  # where both are infinite, too
    return psnr_of_closest - psnr_of_fastest


def list_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The best candidates with their numbers, those between them, and the Pareto front."""
    return [
        *list_extreme_facts(comparison),
        *list_between_facts(comparison),
        *list_memory_facts(comparison),
        *list_median_facts(comparison),
        *list_front_facts(comparison),
    ]


def list_extreme_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The fastest candidates and those that are the closest to float."""
    facts = []
    if comparison.fastest:
        term = "Fastest" if comparison.has_comparable_speeds else "Fastest as measured"
        facts.append((term, describe_best(comparison.fastest, comparison, SPEED_METRICS)))
    if comparison.closest:
        facts.append(("Closest to float", describe_best(comparison.closest, comparison, QUALITY_METRICS)))
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
    return [("Pareto front", text)]


# -- phrases -------------------------------------------------------------------------------------------------


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
    number = column.format(value, column.choose_decimals([value]))
    unit = UNITS.get(metric, "") if math.isfinite(value) else ""
    return PHRASES[metric].format(number + unit)


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
