"""The recommendation at the top of a report."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import (
    DENOISER_BYTES,
    DENOISER_RATIO,
    METRIC_COLUMNS,
    PSNR_DB,
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
    orient_speed,
)
from int8run.report.runs import (
    Run,
    describe_machine,
    find_varying_settings,
    format_tags,
    group_tags_by_value,
    pluralize,
    select_measured,
)

IMAGE_SETTINGS = re.compile(
    r"(model|sampler|prompts|seed)\b"
)  # settings that decide what the float model draws, LoRAs aside


CHOSEN = "which one chooses for the picture: at each INT8 is compared with float"


# differences that a second measurement would not repeat
SPEED_NOISE, QUALITY_NOISE_DB = 0.03, 0.5


MAX_BETWEEN = 3  # further members of the front that the answer names


def explain_incomparable_speeds(runs: Sequence[Run]) -> list[str]:
    """Why the speeds of these runs cannot be compared; empty when they can."""
    timed = [run for run in runs if run.get_metric(STEP_MS) is not None]
    reasons = []
    shared = max((run.record.jobs_at_once for run in timed), default=1)
    if shared > 1:
        reasons.append(
            f"Speeds are not comparable: up to {shared} jobs shared a machine while they were measured."
        )
    machines = group_tags_by_value(timed, [describe_machine(run.record) for run in timed])
    if len(machines) > 1:
        said = "; ".join(f"{name or 'unknown'}: {format_tags(tags)}" for name, tags in machines.items())
        reasons.append(f"Speeds are not comparable: the runs come from different machines ({said}).")
    return reasons


def explain_incomparable_quality(runs: Sequence[Run]) -> str | None:
    """Why the quality of these runs cannot be compared; None when it can."""
    keys = [key for key in find_varying_settings(select_measured(runs)) if IMAGE_SETTINGS.match(key)]
    if not keys:
        return None
    return f"Quality is not comparable: {', '.join(keys)} differ, so that each run was compared with other pictures of the float model."


@dataclass(frozen=True)
class Recommendation:
    """Which setting to use.

    Args:
        verdict: the answer, in one or two sentences.
        facts: what it rests on, as term and text.
        warnings: why it may be wrong.
    """

    verdict: str
    facts: list[tuple[str, str]]
    warnings: list[str]


def recommend(runs: Sequence[Run]) -> Recommendation:
    """The answer that these runs give, as far as they give one."""
    choices, over = group_candidates(runs)
    warnings = explain_incomparable_speeds(runs)
    if not choices:
        return Recommendation("No run finished with a measurement, so there is nothing to compare.", [], [])
    unsure = [run.tag for run in runs if has_scattered_steps(run)]
    if unsure:
        warnings.append(
            f"Step times of {format_tags(unsure)} scatter by more than twice: other work ran there, and their speeds say little."
        )
    metric = choose_speed_metric([run for c in choices for run in c.runs])
    fastest = find_best(choices, metric, -1 if metric == STEP_MS else 1) if metric else []
    closest, smallest = find_best(choices, PSNR_DB, 1), find_best(choices, DENOISER_BYTES, -1)
    if not fastest:
        warnings.append("No run measured its speed.")
    if not closest:
        warnings.append(
            "No run was compared with the float model's pictures (metrics.baseline=none), so nothing is said about quality."
        )
    speed_words = (STEP_MS, "{} a step"), (SPEED_RATIO, "{} the float model's speed")
    quality_words = (
        (PSNR_DB, "PSNR {}"),
        ("quality/ssim", "SSIM {}"),
        ("quality/latent_rel_err", "latent error {}"),
    )
    memory_words = (DENOISER_BYTES, "{}"), (DENOISER_RATIO, "{} smaller than float")
    unlike = None if over else explain_incomparable_quality(runs)
    if unlike:
        return Recommendation(
            "These runs drew different pictures; they do not say which setting to use.",
            [],
            [unlike, *warnings],
        )
    if len(choices) == 1:
        parts = (
            ("Speed", fastest, speed_words),
            ("Quality", closest, quality_words),
            ("Denoiser", smallest, memory_words),
        )
        facts = [(term, describe_measurements(who[0], *said)) for term, who, said in parts if who]
        if over:
            facts.append(
                ("Medians over", f"{', '.join(over)} ({pluralize(len(choices[0].runs), 'run')}), {CHOSEN}")
            )
        return Recommendation(write_single_verdict(choices[0], 1 if over else len(runs)), facts, warnings)
    # noise of half of the runs or more is no speed
    unfair = (
        bool(explain_incomparable_speeds(runs))
        or 2 * len(unsure) >= sum(run.get_metric(STEP_MS) is not None for run in runs) > 0
    )
    facts = (
        [
            (
                "Fastest as measured" if unfair else "Fastest",
                describe_candidates(fastest, choices, *speed_words),
            )
        ]
        if fastest
        else []
    )
    facts += [("Closest to float", describe_candidates(closest, choices, *quality_words))] if closest else []
    between = [
        choices[i]
        for i in find_pareto_front(list_speed_quality(choices))
        if choices[i] not in [*fastest, *closest]
    ]
    if between and not unfair:
        facts.append(
            (
                "Between them",
                "; ".join(
                    describe_candidates([c], choices, *speed_words, quality_words[0])
                    for c in between[:MAX_BETWEEN]
                ),
            )
        )
    facts += [("Smallest", describe_candidates(smallest, choices, *memory_words))] if smallest else []
    if over:
        facts.append(
            ("Medians over", f"{', '.join(over)} ({pluralize(len(choices[0].runs), 'run')} each), {CHOSEN}")
        )
    ahead = find_pareto_front(list_speed_quality(runs))
    if ahead:
        facts.append(
            (
                "Pareto front",
                f"{format_tags([runs[i].tag for i in ahead])}: no other run is faster without being further from float",
            )
        )
    return Recommendation(write_verdict(choices, fastest, closest, metric, unfair), facts, warnings)


def write_verdict(
    choices: Sequence[Candidate],
    fastest: Sequence[Candidate],
    closest: Sequence[Candidate],
    metric: str | None,
    unfair: bool,
) -> str:
    """What to use of several, in one or two sentences."""
    if not closest:
        return (
            f"{format_names(fastest)} is the fastest."
            if fastest and not unfair
            else "These runs do not say which setting to use."
        )
    if not fastest or metric is None or unfair:
        return (
            f"{format_names(closest)} is the closest to float. Which is the fastest, these runs cannot say."
        )
    quick, close = fastest[0], closest[0]
    speeds = [abs(orient_speed(metric, c.get_metric(metric) or math.nan)) for c in (quick, close)]
    lost = 1 - min(speeds) / max(speeds)
    of_close, of_quick = close.get_metric(PSNR_DB) or 0.0, quick.get_metric(PSNR_DB)
    gained = math.inf if of_quick is None else 0.0 if of_close == of_quick else of_close - of_quick
    both = [c for c in fastest if c in closest]
    if both:
        text = f"Use {format_names(both)}: both the fastest and the closest to float."
    elif lost <= SPEED_NOISE:
        text = f"Use {format_names(closest)}: the closest to float, and within {100 * SPEED_NOISE:.0f} % of the fastest."
    elif gained <= QUALITY_NOISE_DB:
        text = f"Use {format_names(fastest)}: the fastest, and within {QUALITY_NOISE_DB} dB of the closest to float."
    else:
        more = (
            "the closest to float"
            if of_quick is None
            else "equal to float"
            if math.isinf(gained)
            else f"{gained:.1f} dB closer to float"
        )
        text = f"Choose: {format_names(fastest)} is the fastest; {format_names(closest)} is {more} at {100 * lost:.0f} % less speed."
    ratio = quick.get_metric(SPEED_RATIO)
    return text + (" INT8 is slower than float here." if ratio is not None and ratio < 1 else "")


def write_single_verdict(only: Candidate, runs: int) -> str:
    """What one run says, of as many as there are."""
    ratio, psnr, smaller = (
        only.get_metric(SPEED_RATIO),
        only.get_metric(PSNR_DB),
        only.get_metric(DENOISER_RATIO),
    )
    parts = []
    if ratio is not None:
        parts.append(f"{'' if ratio >= 1 else 'only '}{ratio:.2f} times the float model's speed")
    if smaller is not None:
        parts.append(f"a denoiser {smaller:.2f} times smaller")
    if psnr is not None:
        parts.append(
            "pictures equal to float's"
            if math.isinf(psnr)
            else f"pictures at {psnr:.1f} dB PSNR from float's"
        )
    text = ", ".join(parts) or "no comparison with float"
    return f"Only {only.name} was measured: {text}." if runs > 1 else f"{text[0].upper()}{text[1:]}."


def describe_candidates(
    who: Sequence[Candidate], choices: Sequence[Candidate], *metrics: tuple[str, str]
) -> str:
    """`outlier=none: 5.2 ms a step, 2.54× the float model's speed`."""
    return f"{'all' if len(who) == len(choices) else format_names(who)}: {describe_measurements(who[0], *metrics)}"


def describe_measurements(who: Candidate, *metrics: tuple[str, str]) -> str:
    """Numbers in words; those that are missing are left out."""
    units = {STEP_MS: " ms", DENOISER_BYTES: " MB", "quality/latent_rel_err": " %", PSNR_DB: " dB"}
    said = []
    for metric, words in metrics:
        value = who.get_metric(metric)
        if value is not None:
            column = next(c for c in METRIC_COLUMNS if c.metric == metric)
            said.append(
                words.format(
                    column.format(value, column.choose_decimals([value]))
                    + units.get(metric, "") * math.isfinite(value)
                )
            )
    return ", ".join(said)


def has_scattered_steps(run: Run) -> bool:
    """Whether one step in ten took more than twice the median."""
    p50, p90 = run.get_metric(STEP_MS), run.get_metric("speed/step_ms_p90")
    return p50 is not None and p90 is not None and p90 > 2 * p50
