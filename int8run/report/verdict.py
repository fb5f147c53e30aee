"""The recommendation at the top of a report: which setting to use, why, and what limits the advice.

`recommend` compares the runs once (`comparison`), decides between the fastest and the closest to float, and
chooses the words. What the sentence rests on is written by `verdict_facts`, what limits it by
`verdict_warnings`. It ranks nothing, and knows nothing of HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import DENOISER_RATIO, PSNR_DB, SPEED_RATIO
from int8run.report.comparison import SweepComparison, compare_runs, explain_incomparable_quality
from int8run.report.ranking import Candidate, format_names
from int8run.report.runs import Run
from int8run.report.verdict_facts import list_facts, list_fronts_by_images, list_single_facts
from int8run.report.verdict_warnings import list_warnings

# Smaller differences than these would not show again in a second measurement.
SPEED_NOISE = 0.03
QUALITY_NOISE_DB = 0.5


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
