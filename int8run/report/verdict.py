"""The recommendation at the top of a report: which setting to use, why, and what limits the advice.

`recommend` compares the runs once (`comparison`), decides between the fastest and the closest to float, and
chooses the words. What the sentence rests on is written by `verdict_facts`, what limits it by
`verdict_warnings`. It ranks nothing, and knows nothing of HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from int8run.metrics.clusters import SAMPLE
from int8run.report.columns import DENOISER_RATIO, PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.comparison import SweepComparison, compare_runs, explain_incomparable_quality
from int8run.report.difference_table import DifferenceTable, build_difference_tables
from int8run.report.difference_text import TIMING, explain_ties
from int8run.report.differences import find_closest
from int8run.report.ranking import Candidate, find_best, format_names
from int8run.report.runs import Run
from int8run.report.verdict_facts import list_facts, list_fronts_by_images, list_single_facts
from int8run.report.verdict_warnings import list_warnings

# Differences that are told apart, and smaller than these, are not worth a loss elsewhere.
SPEED_NOISE = 0.03
QUALITY_NOISE_DB = 0.5


@dataclass(frozen=True)
class Recommendation:
    """Which setting to use.

    Args:
        verdict: the recommendation, in one or two sentences.
        facts: what it rests on, as term and text.
        warnings: why it may be wrong.
        differences: what each setting differs from the best ones by.
    """

    verdict: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    differences: list[DifferenceTable] = field(default_factory=list)


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
    return Recommendation(
        verdict=write_verdict(comparison),
        facts=list_facts(comparison),
        warnings=warnings,
        differences=build_difference_tables(comparison),
    )


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


def write_verdict(comparison: SweepComparison) -> str:
    """Which of several candidates to use, in one or two sentences."""
    fastest, closest = comparison.tied_fastest, comparison.tied_closest
    can_compare_speeds = bool(fastest) and comparison.has_comparable_speeds
    if not closest:
        if not can_compare_speeds:
            return "These runs do not show which setting to use."
        return f"{describe_fastest(comparison)}."
    if not can_compare_speeds:
        return f"{describe_closest(comparison)}. These runs cannot tell which is the fastest."

    text = weigh_speed_and_quality(comparison)
    speed_ratio = comparison.fastest[0].get_metric(SPEED_RATIO)
    if speed_ratio is not None and speed_ratio < 1:
        text += " INT8 is slower than float here."
    return text


def describe_fastest(comparison: SweepComparison) -> str:
    """`X is the fastest`, or which ones are not told apart, and what would tell."""
    fastest = comparison.tied_fastest
    if comparison.is_fastest_sure:
        return f"{format_names(fastest)} is the fastest"
    return f"{name_tied(fastest, comparison)} cannot be told apart in speed: {explain_speed_ties(comparison)}"


def describe_closest(comparison: SweepComparison) -> str:
    """`X is the closest to float`, or which ones are not told apart, and what would tell."""
    closest = comparison.tied_closest
    if comparison.is_closest_sure:
        return f"{format_names(closest)} is the closest to float"
    reason = explain_quality_ties(comparison)
    return f"{name_tied(closest, comparison)} cannot be told apart in quality: {reason}"


def name_tied(tied: Sequence[Candidate], comparison: SweepComparison) -> str:
    """Several candidates by name, or `these settings` where they are all there are."""
    if len(tied) == len(comparison.candidates) and len(tied) > 2:
        return "These settings"
    return format_names(tied)


def explain_speed_ties(comparison: SweepComparison) -> str:
    """Why the fastest candidates are not told apart."""
    return explain_ties([one for one in comparison.speed_standings if one.is_tied], TIMING)


def explain_quality_ties(comparison: SweepComparison) -> str:
    """Why the candidates that are the closest to float are not told apart."""
    return explain_ties([one for one in comparison.quality_standings if one.is_tied], SAMPLE)


def weigh_speed_and_quality(comparison: SweepComparison) -> str:
    """The sentence that chooses between the fastest and the closest, or leaves the choice to the reader."""
    fastest, closest = comparison.tied_fastest, comparison.tied_closest
    both = [candidate for candidate in fastest if candidate in closest]
    if both:
        return recommend_both(both, comparison)

    speed_loss = compute_speed_loss(comparison)
    if speed_loss is None:
        return (
            f"Choose: {format_names(fastest)} is the fastest that was timed; {format_names(closest)} is the "
            "closest to float, and its speed was not measured."
        )
    if speed_loss <= SPEED_NOISE:
        within = f"{100 * SPEED_NOISE:.0f} %"
        best = pick_fastest(closest, comparison.speed_metric)
        return f"Use {best.name}: the closest to float, and within {within} of the fastest."

    psnr_gain = compute_psnr_gain(comparison)
    if psnr_gain is not None and psnr_gain <= QUALITY_NOISE_DB:
        within = f"{QUALITY_NOISE_DB} dB"
        best = pick_closest(fastest)
        return f"Use {best.name}: the fastest, and within {within} of the closest to float."

    if psnr_gain is None:
        advantage = "the closest to float"
    elif math.isinf(psnr_gain):
        advantage = "equal to float"
    else:
        advantage = f"{psnr_gain:.1f} dB closer to float"
    return (
        f"Choose: {describe_one_or_more(fastest, 'the fastest')}; "
        f"{describe_one_or_more(closest, advantage)} at {100 * speed_loss:.0f} % less speed."
    )


def describe_one_or_more(candidates: Sequence[Candidate], advantage: str) -> str:
    """`X is the fastest`, `X and Y are the fastest`."""
    verb = "is" if len(candidates) == 1 else "are"
    return f"{format_names(candidates)} {verb} {advantage}"


def recommend_both(both: Sequence[Candidate], comparison: SweepComparison) -> str:
    """The sentence where nothing is surely faster than some candidates, and nothing surely closer to float.

    Args:
        both: these candidates.
        comparison: of all.
    """
    is_fastest, is_closest = comparison.is_fastest_sure, comparison.is_closest_sure
    if is_fastest and is_closest:
        return f"Use {format_names(both)}: both the fastest and the closest to float."
    if is_closest:
        return (
            f"Use {format_names(both)}: the closest to float, and none is surely faster "
            f"({explain_speed_ties(comparison)})."
        )
    if is_fastest:
        return (
            f"Use {format_names(both)}: the fastest, and none is surely closer to float "
            f"({explain_quality_ties(comparison)})."
        )
    speed, quality = explain_speed_ties(comparison), explain_quality_ties(comparison)
    if len(both) == len(comparison.candidates):
        return f"These settings cannot be told apart, in speed ({speed}) or in quality ({quality})."
    if len(both) == 1:
        return (
            f"Use {format_names(both)}: none is surely faster ({speed}), and none surely closer to float "
            f"({quality})."
        )
    return (
        f"{format_names(both)} cannot be told apart, in speed ({speed}) or in quality ({quality}); the "
        "others are surely slower or further from float."
    )


def pick_fastest(candidates: Sequence[Candidate], metric: str | None) -> Candidate:
    """The fastest of candidates that are equally close to float; the first one without times."""
    timed = []
    if metric is not None:
        direction = -1 if metric == STEP_MS else 1
        timed = find_best(candidates, metric, direction)
    return timed[0] if timed else candidates[0]


def pick_closest(candidates: Sequence[Candidate]) -> Candidate:
    """The closest to float of candidates that are equally fast; the first one without PSNRs."""
    measured = find_closest(candidates)
    return measured[0] if measured else candidates[0]


def compute_speed_loss(comparison: SweepComparison) -> float | None:
    """How much slower the closest candidate is than the fastest, as a share of the fastest one's speed.

    Returns:
        None where the closest one was not timed.
    """
    metric = comparison.speed_metric
    if metric is None:
        return None
    value_of_fastest = comparison.fastest[0].get_metric(metric)
    value_of_closest = pick_fastest(comparison.tied_closest, metric).get_metric(metric)
    if not value_of_fastest or not value_of_closest:
        return None
    # a step time is fastest / closest, a ratio to float closest / fastest: the lower by the higher alike
    lower, higher = sorted((value_of_fastest, value_of_closest))
    return 1 - lower / higher


def compute_psnr_gain(comparison: SweepComparison) -> float | None:
    """How many dB the closest candidate is ahead of the fastest, over the samples that both have.

    Returns:
        Infinite where all images of the closest equal float's. None where the fastest has no PSNR, or one
        that may not be compared.
    """
    fastest, closest = pick_closest(comparison.tied_fastest), comparison.closest[0]
    psnr_of_fastest = fastest.get_metric(PSNR_DB)
    psnr_of_closest = closest.get_metric(PSNR_DB)
    assert psnr_of_closest is not None  # it is the closest by its PSNR
    if psnr_of_fastest is None or fastest not in comparison.ranked_by_quality:
        return None
    if psnr_of_closest == psnr_of_fastest or fastest is closest:
        return 0.0  # where both are infinite, too
    if math.isfinite(psnr_of_closest):
        for standing in comparison.quality_standings:
            if standing.candidate is fastest and not math.isnan(standing.difference.mean):
                return standing.difference.mean
    return psnr_of_closest - psnr_of_fastest
