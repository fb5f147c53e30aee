"""The recommendation at the top of a report."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import BYTES, COLUMNS, PSNR, RATIO, SMALLER, STEP
from int8run.report.ranking import (
    Candidate,
    best,
    candidates,
    front,
    names,
    quickness,
    speed_metric,
    speed_quality,
)
from int8run.report.runs import Run, by_value, count, listed, machine_of, measured, varying

DRAWING = re.compile(
    r"(model|sampler|prompts|seed)\b"
)  # settings that decide what the float model draws, LoRAs aside


CHOSEN = "which one chooses for the picture: at each INT8 is compared with float"


# differences that a second measurement would not repeat
SPEED_NOISE, QUALITY_NOISE_DB = 0.03, 0.5


MOST_BETWEEN = 3  # further members of the front that the answer names


def unfair_speeds(runs: Sequence[Run]) -> list[str]:
    """Why the speeds of these runs cannot be compared; empty when they can."""
    timed = [run for run in runs if run.metric(STEP) is not None]
    reasons = []
    shared = max((run.record.jobs_at_once for run in timed), default=1)
    if shared > 1:
        reasons.append(
            f"Speeds are not comparable: up to {shared} jobs shared a machine while they were measured."
        )
    machines = by_value(timed, [machine_of(run.record) for run in timed])
    if len(machines) > 1:
        said = "; ".join(f"{name or 'unknown'}: {listed(tags)}" for name, tags in machines.items())
        reasons.append(f"Speeds are not comparable: the runs come from different machines ({said}).")
    return reasons


def unlike_pictures(runs: Sequence[Run]) -> str | None:
    """Why the quality of these runs cannot be compared; None when it can."""
    keys = [key for key in varying(measured(runs)) if DRAWING.match(key)]
    if not keys:
        return None
    return f"Quality is not comparable: {', '.join(keys)} differ, so that each run was compared with other pictures of the float model."


@dataclass(frozen=True)
class Answer:
    """Which setting to use.

    Args:
        verdict: the answer, in one or two sentences.
        facts: what it rests on, as term and text.
        warnings: why it may be wrong.
    """

    verdict: str
    facts: list[tuple[str, str]]
    warnings: list[str]


def answer(runs: Sequence[Run]) -> Answer:
    """The answer that these runs give, as far as they give one."""
    choices, over = candidates(runs)
    warnings = unfair_speeds(runs)
    if not choices:
        return Answer("No run finished with a measurement, so there is nothing to compare.", [], [])
    unsure = [run.tag for run in runs if scattered(run)]
    if unsure:
        warnings.append(
            f"Step times of {listed(unsure)} scatter by more than twice: other work ran there, and their speeds say little."
        )
    metric = speed_metric([run for c in choices for run in c.runs])
    fastest = best(choices, metric, -1 if metric == STEP else 1) if metric else []
    closest, smallest = best(choices, PSNR, 1), best(choices, BYTES, -1)
    if not fastest:
        warnings.append("No run measured its speed.")
    if not closest:
        warnings.append(
            "No run was compared with the float model's pictures (metrics.baseline=none), so nothing is said about quality."
        )
    speed_words = (STEP, "{} a step"), (RATIO, "{} the float model's speed")
    quality_words = (
        (PSNR, "PSNR {}"),
        ("quality/ssim", "SSIM {}"),
        ("quality/latent_rel_err", "latent error {}"),
    )
    memory_words = (BYTES, "{}"), (SMALLER, "{} smaller than float")
    unlike = None if over else unlike_pictures(runs)
    if unlike:
        return Answer(
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
        facts = [(term, measurements(who[0], *said)) for term, who, said in parts if who]
        if over:
            facts.append(
                ("Medians over", f"{', '.join(over)} ({count(len(choices[0].runs), 'run')}), {CHOSEN}")
            )
        return Answer(single_verdict(choices[0], 1 if over else len(runs)), facts, warnings)
    # noise of half of the runs or more is no speed
    unfair = (
        bool(unfair_speeds(runs)) or 2 * len(unsure) >= sum(run.metric(STEP) is not None for run in runs) > 0
    )
    facts = (
        [("Fastest as measured" if unfair else "Fastest", fact(fastest, choices, *speed_words))]
        if fastest
        else []
    )
    facts += [("Closest to float", fact(closest, choices, *quality_words))] if closest else []
    between = [choices[i] for i in front(speed_quality(choices)) if choices[i] not in [*fastest, *closest]]
    if between and not unfair:
        facts.append(
            (
                "Between them",
                "; ".join(fact([c], choices, *speed_words, quality_words[0]) for c in between[:MOST_BETWEEN]),
            )
        )
    facts += [("Smallest", fact(smallest, choices, *memory_words))] if smallest else []
    if over:
        facts.append(
            ("Medians over", f"{', '.join(over)} ({count(len(choices[0].runs), 'run')} each), {CHOSEN}")
        )
    ahead = front(speed_quality(runs))
    if ahead:
        facts.append(
            (
                "Pareto front",
                f"{listed([runs[i].tag for i in ahead])}: no other run is faster without being further from float",
            )
        )
    return Answer(verdict(choices, fastest, closest, metric, unfair), facts, warnings)


def verdict(
    choices: Sequence[Candidate],
    fastest: Sequence[Candidate],
    closest: Sequence[Candidate],
    metric: str | None,
    unfair: bool,
) -> str:
    """What to use of several, in one or two sentences."""
    if not closest:
        return (
            f"{names(fastest)} is the fastest."
            if fastest and not unfair
            else "These runs do not say which setting to use."
        )
    if not fastest or metric is None or unfair:
        return f"{names(closest)} is the closest to float. Which is the fastest, these runs cannot say."
    quick, close = fastest[0], closest[0]
    speeds = [abs(quickness(metric, c.metric(metric) or math.nan)) for c in (quick, close)]
    lost = 1 - min(speeds) / max(speeds)
    of_close, of_quick = close.metric(PSNR) or 0.0, quick.metric(PSNR)
    gained = math.inf if of_quick is None else 0.0 if of_close == of_quick else of_close - of_quick
    both = [c for c in fastest if c in closest]
    if both:
        text = f"Use {names(both)}: both the fastest and the closest to float."
    elif lost <= SPEED_NOISE:
        text = f"Use {names(closest)}: the closest to float, and within {100 * SPEED_NOISE:.0f} % of the fastest."
    elif gained <= QUALITY_NOISE_DB:
        text = f"Use {names(fastest)}: the fastest, and within {QUALITY_NOISE_DB} dB of the closest to float."
    else:
        more = (
            "the closest to float"
            if of_quick is None
            else "equal to float"
            if math.isinf(gained)
            else f"{gained:.1f} dB closer to float"
        )
        text = f"Choose: {names(fastest)} is the fastest; {names(closest)} is {more} at {100 * lost:.0f} % less speed."
    ratio = quick.metric(RATIO)
    return text + (" INT8 is slower than float here." if ratio is not None and ratio < 1 else "")


def single_verdict(only: Candidate, runs: int) -> str:
    """What one run says, of as many as there are."""
    ratio, psnr, smaller = only.metric(RATIO), only.metric(PSNR), only.metric(SMALLER)
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


def fact(who: Sequence[Candidate], choices: Sequence[Candidate], *metrics: tuple[str, str]) -> str:
    """`outlier=none: 5.2 ms a step, 2.54× the float model's speed`."""
    return f"{'all' if len(who) == len(choices) else names(who)}: {measurements(who[0], *metrics)}"


def measurements(who: Candidate, *metrics: tuple[str, str]) -> str:
    """Numbers in words; those that are missing are left out."""
    units = {STEP: " ms", BYTES: " MB", "quality/latent_rel_err": " %", PSNR: " dB"}
    said = []
    for metric, words in metrics:
        value = who.metric(metric)
        if value is not None:
            column = next(c for c in COLUMNS if c.metric == metric)
            said.append(
                words.format(
                    column.show(value, column.digits([value])) + units.get(metric, "") * math.isfinite(value)
                )
            )
    return ", ".join(said)


def scattered(run: Run) -> bool:
    """Whether one step in ten took more than twice the median."""
    p50, p90 = run.metric(STEP), run.metric("speed/step_ms_p90")
    return p50 is not None and p90 is not None and p90 > 2 * p50
