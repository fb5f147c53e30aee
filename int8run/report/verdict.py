"""The recommendation at the top of a report: which setting to use, why, and what limits the advice.

`recommend` compares the runs once and hands the result to one function per paragraph. Knows nothing of HTML.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import (
    DENOISER_BYTES,
    DENOISER_RATIO,
    LATENT_ERROR,
    METRIC_COLUMNS,
    PSNR_DB,
    SAME_FILE_LAYERS,
    SAME_FILE_LIMITS,
    SPEED_RATIO,
    STEP_MS,
)
from int8run.report.ranking import (
    Candidate,
    choose_speed_metric,
    find_best,
    find_pareto_front,
    format_names,
    group_candidates,
    list_speed_quality,
)
from int8run.report.runs import (
    Run,
    describe_machine,
    find_varying_settings,
    format_tags,
    group_tags_by_value,
    select_measured,
)
from int8run.report.step_times import has_scattered_times
from int8run.utils.plurals import count_noun

# Settings that decide which images the float model generates, LoRAs aside.
IMAGE_SETTINGS = re.compile(r"(model|sampler|prompts|seed)\b")

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


@dataclass(frozen=True)
class SweepComparison:
    """What the recommendation is written from.

    Args:
        runs: all runs of the report.
        candidates: what one may choose between.
        content_keys: the settings over which the candidates' metrics are medians.
        speed_metric: what speeds are compared by; None where no run was timed.
        fastest, closest, smallest: the candidates that share the best speed, PSNR and denoiser memory.
        speed_problems: why speeds cannot be compared.
        scattered_tags: runs whose step times vary too much.
    """

    runs: Sequence[Run]
    candidates: list[Candidate]
    content_keys: list[str]
    speed_metric: str | None
    fastest: list[Candidate]
    closest: list[Candidate]
    smallest: list[Candidate]
    speed_problems: list[str]
    scattered_tags: list[str]

    @property
    def has_comparable_speeds(self) -> bool:
        """Whether one may say which candidate is the fastest: not where half of the timed runs scatter."""
        num_timed = len(find_timed(self.runs))
        mostly_scattered = num_timed > 0 and 2 * len(self.scattered_tags) >= num_timed
        return not self.speed_problems and not mostly_scattered


def recommend(runs: Sequence[Run]) -> Recommendation:
    """The recommendation that these runs support, as far as they support one."""
    comparison = compare_runs(runs)
    if not comparison.candidates:
        return Recommendation("No run finished with a measurement, so there is nothing to compare.", [], [])

    warnings = list_warnings(comparison)
    # Where metrics are medians over contents, every candidate generated the same images.
    different_images = None if comparison.content_keys else explain_incomparable_quality(runs)
    if different_images:
        return Recommendation(
            "These runs generated different images, so they do not show which setting to use.",
            [],
            [different_images, *warnings],
        )
    if len(comparison.candidates) == 1:
        return Recommendation(write_single_verdict(comparison), list_single_facts(comparison), warnings)
    return Recommendation(write_verdict(comparison), list_facts(comparison), warnings)


def compare_runs(runs: Sequence[Run]) -> SweepComparison:
    """Group the runs into candidates and find the best of them."""
    groups = group_candidates(runs)
    candidates = groups.candidates
    speed_metric = choose_speed_metric([run for candidate in candidates for run in candidate.runs])
    fastest = []
    if speed_metric is not None:
        fastest = find_best(candidates, speed_metric, direction=-1 if speed_metric == STEP_MS else 1)
    return SweepComparison(
        runs=runs,
        candidates=candidates,
        content_keys=groups.content_keys,
        speed_metric=speed_metric,
        fastest=fastest,
        closest=find_best(candidates, PSNR_DB, direction=1),
        smallest=find_best(candidates, DENOISER_BYTES, direction=-1),
        speed_problems=explain_incomparable_speeds(runs),
        scattered_tags=[run.tag for run in find_timed(runs) if has_scattered_times(run.record.metrics)],
    )


# -- warnings ------------------------------------------------------------------------------------------------


def list_warnings(comparison: SweepComparison) -> list[str]:
    """What limits the recommendation."""
    warnings = list(comparison.speed_problems)
    if comparison.scattered_tags:
        tags = format_tags(comparison.scattered_tags)
        warnings.append(
            f"Step times of {tags} scatter by more than twice: other work ran on the machine, so these "
            "speeds say little."
        )
    measured = select_measured(comparison.runs)
    if not comparison.fastest:
        warnings.append("No run measured its speed.")
    elif untimed := [run.tag for run in measured if run.get_metric(STEP_MS) is None]:
        warnings.append(f"The speed of {format_tags(untimed)} was not measured.")
    same_file = [run.tag for run in comparison.runs if run.get_metric(SAME_FILE_LAYERS)]
    if same_file:
        warnings.append(
            f"The float model of {format_tags(same_file)} was read from the same quantized file: PSNR to "
            f"float {SAME_FILE_LIMITS}."
        )
    if not comparison.closest:
        warnings.append(
            "No run generated the float model's images (metrics.baseline=none), so nothing is known about "
            "quality."
        )
    elif unjudged := [run.tag for run in measured if run.get_metric(PSNR_DB) is None]:
        warnings.append(f"The quality of {format_tags(unjudged)} was not measured.")
    return warnings


def explain_incomparable_speeds(runs: Sequence[Run]) -> list[str]:
    """Why the speeds of these runs cannot be compared; empty when they can."""
    timed = find_timed(runs)
    reasons = []
    jobs_at_once = max((run.record.jobs_at_once for run in timed), default=1)
    if jobs_at_once > 1:
        reasons.append(
            f"Speeds are not comparable: up to {jobs_at_once} jobs shared a machine while they were measured."
        )
    tags_by_machine = group_tags_by_value(timed, [describe_machine(run.record) for run in timed])
    if len(tags_by_machine) > 1:
        machines = "; ".join(
            f"{machine or 'unknown'}: {format_tags(tags)}" for machine, tags in tags_by_machine.items()
        )
        reasons.append(f"Speeds are not comparable: the runs come from different machines ({machines}).")
    return reasons


def find_timed(runs: Sequence[Run]) -> list[Run]:
    """The runs that measured their speed."""
    return [run for run in runs if run.get_metric(STEP_MS) is not None]


def explain_incomparable_quality(runs: Sequence[Run]) -> str | None:
    """Why the quality of these runs cannot be compared; None when it can."""
    measured = select_measured(runs)
    keys = [key for key in find_varying_settings(measured) if IMAGE_SETTINGS.match(key)]
    if not keys:
        return None
    if all(run.get_metric(PSNR_DB) is None for run in measured):
        return f"The runs differ in {', '.join(keys)}, so each generated other images."
    return (
        f"Quality is not comparable: the runs differ in {', '.join(keys)}, so each was compared with "
        "different images of the float model."
    )


# -- one candidate -------------------------------------------------------------------------------------------


def write_single_verdict(comparison: SweepComparison) -> str:
    """What the only candidate measured."""
    only = comparison.candidates[0]
    parts = []

    speed_ratio = only.get_metric(SPEED_RATIO)
    if speed_ratio is not None:
        parts.append(f"{'' if speed_ratio >= 1 else 'only '}{speed_ratio:.2f} times the float model's speed")

    memory_ratio = only.get_metric(DENOISER_RATIO)
    if memory_ratio is not None:
        parts.append(f"a denoiser {memory_ratio:.2f} times smaller")

    psnr = only.get_metric(PSNR_DB)
    if psnr is not None and math.isinf(psnr):
        parts.append("images identical to the float model's")
    elif psnr is not None:
        parts.append(f"images at {psnr:.1f} dB PSNR to the float model's")

    text = ", ".join(parts) or "no comparison with float"
    is_one_of_several = len(comparison.runs) > 1 and not comparison.content_keys
    if is_one_of_several:
        return f"Only {only.name} was measured: {text}."
    return f"{text[0].upper()}{text[1:]}."


def list_single_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """Speed, quality and memory of the only candidate, each where it was measured."""
    only = comparison.candidates[0]
    facts = []
    if comparison.fastest:
        facts.append(("Speed", describe_metrics(only, SPEED_METRICS)))
    if comparison.closest:
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
    closest_names = {candidate.name for candidate in closest}
    both = [candidate for candidate in fastest if candidate.name in closest_names]
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
    fastest, closest = (best[0].get_metric(metric) for best in (comparison.fastest, comparison.closest))
    if not fastest or not closest:
        return None
    # The same for step times and for ratios to float.
    return 1 - min(fastest, closest) / max(fastest, closest)


def compute_psnr_gain(comparison: SweepComparison) -> float | None:
    """How many dB the closest candidate is ahead of the fastest; None where the fastest has no PSNR."""
    psnr_of_fastest = comparison.fastest[0].get_metric(PSNR_DB)
    psnr_of_closest = comparison.closest[0].get_metric(PSNR_DB) or 0.0
    if psnr_of_fastest is None:
        return None
    if psnr_of_closest == psnr_of_fastest:
        return 0.0  # where both are infinite, too
    return psnr_of_closest - psnr_of_fastest


def list_facts(comparison: SweepComparison) -> list[tuple[str, str]]:
    """The best candidates with their numbers, those between them, and the Pareto front of the runs."""
    facts = []
    if comparison.fastest:
        term = "Fastest" if comparison.has_comparable_speeds else "Fastest as measured"
        facts.append((term, describe_best(comparison.fastest, comparison, SPEED_METRICS)))
    if comparison.closest:
        facts.append(("Closest to float", describe_best(comparison.closest, comparison, QUALITY_METRICS)))

    between = list_between(comparison)
    if between and comparison.has_comparable_speeds:
        metrics = (*SPEED_METRICS, PSNR_DB)
        texts = [describe_best([candidate], comparison, metrics) for candidate in between[:MAX_BETWEEN]]
        facts.append(("Between them", "; ".join(texts)))

    if comparison.smallest:
        facts.append(("Smallest", describe_best(comparison.smallest, comparison, MEMORY_METRICS)))
    if comparison.content_keys:
        num_runs = count_noun(len(comparison.candidates[0].runs), "run")
        facts.append(("Medians over", describe_medians(comparison, f"{num_runs} each")))

    front = find_pareto_front(list_speed_quality(comparison.runs))
    if front:
        tags = format_tags([comparison.runs[index].tag for index in front])
        facts.append(("Pareto front", f"{tags}: no other run is faster without being further from float"))
    return facts


def list_between(comparison: SweepComparison) -> list[Candidate]:
    """The candidates of the Pareto front that are neither the fastest nor the closest."""
    front = find_pareto_front(list_speed_quality(comparison.candidates))
    extremes = {candidate.name for candidate in (*comparison.fastest, *comparison.closest)}
    candidates = [comparison.candidates[index] for index in front]
    return [candidate for candidate in candidates if candidate.name not in extremes]


# -- phrases -------------------------------------------------------------------------------------------------


def describe_best(best: Sequence[Candidate], comparison: SweepComparison, metrics: Sequence[str]) -> str:
    """Names and metrics: `outlier=none: 5.2 ms per step, 2.54× the float model's speed`."""
    name = "all" if len(best) == len(comparison.candidates) else format_names(best)
    return f"{name}: {describe_metrics(best[0], metrics)}"


def describe_metrics(candidate: Candidate, metrics: Sequence[str]) -> str:
    """Metrics of a candidate in words; those that are missing are left out."""
    columns = {column.metric: column for column in METRIC_COLUMNS}
    phrases = []
    for metric in metrics:
        value = candidate.get_metric(metric)
        if value is None:
            continue
        column = columns[metric]
        number = column.format(value, column.choose_decimals([value]))
        unit = UNITS.get(metric, "") if math.isfinite(value) else ""
        phrases.append(PHRASES[metric].format(number + unit))
    return ", ".join(phrases)


def describe_medians(comparison: SweepComparison, num_runs: str) -> str:
    """Over what the candidates' metrics are medians, and why."""
    keys = ", ".join(comparison.content_keys)
    compared = "INT8 is compared with float" if comparison.closest else "speeds are compared"
    return f"{keys} ({num_runs}): chosen for the image, so {compared} at each value"
