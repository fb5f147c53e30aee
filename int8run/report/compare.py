"""What the runs of a folder say when they stand side by side: what differs, who is ahead, and the answer in words."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.record import FINISHED, Record

STEP, RATIO, PSNR = "speed/step_ms_p50", "speed/ratio_vs_float", "quality/psnr_db"
BYTES, SMALLER = "memory/denoiser_bytes", "memory/denoiser_ratio"
# settings that change neither what is drawn nor how fast
NO_MATTER = re.compile(r"(resume|progress|tracker|cache|save)([.]|$)")
STRENGTH = re.compile(r"lora[.](adapters[.]\d+[.])?strength")
# settings that one chooses for the picture; runs that differ in them have different float pictures, too
CONTENT = re.compile(r"lora[.](adapters[.]\d+[.])?strength|seed|prompts([.].*)?")
DRAWING = re.compile(r"(model|sampler|prompts|seed)\b")  # settings that decide what the float model draws, LoRAs aside
CHOSEN = "which one chooses for the picture: at each INT8 is compared with float"
# differences that a second measurement would not repeat
SPEED_NOISE, QUALITY_NOISE_DB = 0.03, 0.5
MOST_BETWEEN = 3  # further members of the front that the answer names
MISSING = "–"


@dataclass(frozen=True)
class Run:
    """A record as the page names it.

    Args:
        tag: `#3`.
        varied: its value of every setting that differs between the runs, by the setting's name on the command line.
        label: these values in a few words.
    """

    record: Record
    tag: str
    varied: Mapping[str, str]
    label: str

    @property
    def name(self) -> str:
        """`#3 outlier=convrot`."""
        return f"{self.tag} {self.label}".strip()

    def metric(self, name: str) -> float | None:
        """A number that was measured by a run that finished; NaN is none."""
        value = self.record.metrics.get(name) if self.record.state == FINISHED else None
        return None if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Column:
    """How a metric is shown.

    Args:
        better: 1 where more is better, -1 where less is, 0 where neither.
        decimals: None gives the smallest value of the column three digits.
        ceiling: a value below it is never rounded up to it.
    """

    metric: str
    heading: str
    about: str
    better: int
    decimals: int | None = None
    scale: float = 1.0
    suffix: str = ""
    ceiling: float = math.inf

    def digits(self, values: Sequence[float]) -> int:
        """Decimals for a column of these values."""
        if self.decimals is not None:
            return self.decimals
        least = min((abs(v * self.scale) for v in values if v and math.isfinite(v)), default=1.0)
        return min(6, max(0, 2 - math.floor(math.log10(least))))

    def show(self, value: float | None, digits: int) -> str:
        """A number for a person."""
        if value is None:
            return MISSING
        if math.isinf(value):  # a ratio to a difference that is nothing
            return "equal" if value > 0 else "−∞"
        shown, least = value * self.scale, 10.0**-digits
        if 0 < shown < least / 2:
            return f"<{least:.{digits}f}{self.suffix}"
        if shown < self.ceiling <= round(shown, digits):
            return f">{self.ceiling - least:.{digits}f}{self.suffix}"
        return f"{shown:.{digits}f}{self.suffix}"


# a line break in a heading is one on the page
COLUMNS = (
    Column(STEP, "step\nms", "median time of a denoising step", -1),
    Column(RATIO, "speed\n× float", "the float model's step time divided by this one", 1, 2, suffix="×"),
    Column("speed/images_per_s", "images\nper s", "pictures or videos per second, everything included", 1),
    Column("speed/frames_per_s", "frames\nper s", "video frames per second, everything included", 1),
    Column(BYTES, "denoiser\nMB", "memory of the denoiser's weights, in 10⁶ bytes", -1, scale=1e-6),
    Column(SMALLER, "denoiser\nsmaller", "the float denoiser's memory divided by this one", 1, 2, suffix="×"),
    Column("memory/text_encoder_ratio", "encoders\nsmaller", "the float text encoders' memory divided by these", 1, 2, suffix="×"),
    Column(PSNR, "PSNR\ndB", "closeness to the float model's pictures; equal pictures have no noise", 1, 1),
    Column("quality/ssim", "SSIM", "structural similarity to the float model's pictures, 1 at most", 1, 4, ceiling=1.0),
    Column("quality/ms_ssim", "MS-SSIM", "structural similarity at several scales, 1 at most", 1, 4, ceiling=1.0),
    Column("quality/lpips", "LPIPS", "perceptual distance to the float model's pictures", -1, 4),
    Column("quality/effnet_distance", "EffNet\ndistance", "distance of EfficientNet features to those of the float pictures", -1, 5),
    Column("quality/clip_score", "CLIP\nscore", "how well pictures fit their prompts", 1, 2),
    Column("quality/latent_rel_err", "latent\nerror, %", "distance of the last latents from the float model's", -1, 2, 100),
    Column("clip/cosine_mean", "embedding\ncosine", "likeness of the prompts' embeddings to the float text encoders'", 1, 5, ceiling=1.0),
    Column("quant/output_sqnr_db_min", "layer SQNR\nmin, dB", "signal-to-noise ratio of the worst INT8 layer's output", 1, 1),
)
DECIBEL = Column(PSNR, "PSNR", "", 1, 1, suffix=" dB")


# -- what differs -------------------------------------------------------------------------------------------------------


def name_runs(records: Sequence[Record]) -> list[Run]:
    """Each record with a short name: its number, where numbers differ, else its place here; and what sets it apart."""
    numbers = [r.number for r in records]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(records)))
    found = [settings_of(r) for r in records]
    keys = telling_keys(records, found)
    # a task of another kind in the folder must not add `task=run` to every name
    measured = [settings for record, settings in zip(records, found, strict=True) if record.metrics]
    in_label = [key for key in keys if len({settings.get(key) for settings in measured}) > 1] or keys
    short = short_names(in_label)
    runs = []
    for place, record, settings in zip(numbers, records, found, strict=True):
        varied = {key: settings.get(key, MISSING) for key in keys}
        runs.append(Run(record, f"#{place}", varied, " ".join(f"{short[key]}={varied[key]}" for key in in_label)))
    return runs


def varying(runs: Sequence[Run]) -> list[str]:
    """Those of the settings that tell runs apart which differ between these."""
    return [key for key in (runs[0].varied if runs else ()) if len({run.varied[key] for run in runs}) > 1]


def settings_of(record: Record) -> dict[str, str]:
    """Settings by their names on the command line; a list of LoRAs stands there as it was said."""
    said = (word.lstrip("+~").partition("=") for word in record.overrides)
    return {key: value for key, _, value in said} | record.params


def differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that not all have with the same value, in the order of their first appearance."""
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in found}) > 1]


def telling_keys(records: Sequence[Record], found: Sequence[Mapping[str, str]]) -> list[str]:
    """Settings that tell the runs apart: those that the user named and that differ; if none do, all that differ.

    `outlier=none,convrot` changes the settings of the method, too, which would only repeat it.
    """
    differ = [key for key in differing(found) if not NO_MATTER.match(key)]
    said = dict.fromkeys(word.lstrip("+~").partition("=")[0] for record in records for word in record.overrides)
    return [key for key in said if key in differ] or differ


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key ends with."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)), key)
    return short


# -- who is ahead -------------------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """The Pareto front: places of the points that no other beats in one number without being worse in the other. More is better."""
    known = [(i, point) for i, point in enumerate(points) if point is not None]
    beats = lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b  # noqa: E731
    return [i for i, point in known if not any(beats(other, point) for _, other in known)]


def measured(runs: Sequence[Run]) -> list[Run]:
    """Runs that finished with a speed or a quality."""
    return [run for run in runs if run.metric(STEP) is not None or run.metric(PSNR) is not None]


def speed_metric(runs: "Sequence[Run] | Sequence[Candidate]") -> str | None:
    """What speeds are compared by: the ratio to float where every run that has a speed has one, else step times."""
    timed = [run for run in runs if run.metric(STEP) is not None]
    if not timed:
        return None
    return RATIO if all(run.metric(RATIO) is not None for run in timed) else STEP


def quickness(metric: str, value: float) -> float:
    """A speed as a number of which more is better."""
    return -value if metric == STEP else value


def speed_quality(runs: "Sequence[Run] | Sequence[Candidate]") -> list[tuple[float, float] | None]:
    """Quickness and PSNR of each run; None where one is missing."""
    metric = speed_metric(runs)
    points: list[tuple[float, float] | None] = []
    for run in runs:
        speed, psnr = run.metric(metric) if metric else None, run.metric(PSNR)
        points.append(None if metric is None or speed is None or psnr is None else (quickness(metric, speed), psnr))
    return points


@dataclass(frozen=True)
class Candidate:
    """What one may choose: a run, or the runs that differ only in what is drawn, with the median of each metric."""

    name: str
    runs: tuple[Run, ...]

    def metric(self, name: str) -> float | None:
        """The median over the runs; None where one lacks it."""
        known = [value for run in self.runs if (value := run.metric(name)) is not None]
        if not known or len(known) < len(self.runs):
            return None
        # the mean of `equal` and a number would be `equal`
        return statistics.median_low(known) if any(map(math.isinf, known)) else statistics.median(known)


def candidates(runs: Sequence[Run]) -> tuple[list[Candidate], list[str]]:
    """What the runs let one choose between, and the settings that medians are taken over.

    A LoRA's strength, a seed and a prompt are chosen for the picture. Where nothing else differs all runs are one choice; where others
    differ too, runs are put together by those, as far as they drew the same.
    """
    done = measured(runs)
    single = [Candidate(run.name, (run,)) for run in done]
    keys = varying(done)
    content = [key for key in keys if CONTENT.fullmatch(key)]
    choice = [key for key in keys if key not in content]
    if content and not choice:
        return [Candidate("INT8", tuple(done))], content
    groups: dict[tuple[str, ...], dict[tuple[str, ...], Run]] = {}
    for run in done:
        groups.setdefault(tuple(run.varied[k] for k in choice), {})[tuple(run.varied[k] for k in content)] = run
    drawn = set.intersection(*(set(group) for group in groups.values())) if groups else set()
    if not content or len(groups) < 2 or len(drawn) < 2:
        return single, []
    names = short_names(keys)
    together = []
    for values, group in groups.items():
        members = tuple(run for what, run in group.items() if what in drawn)
        together.append(Candidate(" ".join(f"{names[k]}={v}" for k, v in zip(choice, values, strict=True)), members))
    return together, content


# -- machines -----------------------------------------------------------------------------------------------------------


def machine_of(record: Record) -> str:
    """The hardware in words; empty when the run did not get so far."""
    facts = record.environment
    if not facts or facts.get("gpu"):
        return str(facts.get("gpu", ""))
    return f"{facts.get('cpu', 'CPU')}, {count(facts.get('threads', 1), 'thread')}"


def by_value(runs: Sequence[Run], values: Sequence[str]) -> dict[str, list[str]]:
    """Tags of the runs by a value of theirs."""
    found: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(value, []).append(run.tag)
    return found


def unfair_speeds(runs: Sequence[Run]) -> list[str]:
    """Why the speeds of these runs cannot be compared; empty when they can."""
    timed = [run for run in runs if run.metric(STEP) is not None]
    reasons = []
    shared = max((run.record.jobs_at_once for run in timed), default=1)
    if shared > 1:
        reasons.append(f"Speeds are not comparable: up to {shared} jobs shared a machine while they were measured.")
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


def listed(tags: Sequence[str]) -> str:
    """`#0–#3, #7`."""
    parts: list[list[str]] = []
    for tag in tags:
        if parts and int(tag[1:]) == int(parts[-1][-1][1:]) + 1:
            parts[-1].append(tag)
        else:
            parts.append([tag])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(p) for p in parts)


# -- the answer ---------------------------------------------------------------------------------------------------------


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
        warnings.append(f"Step times of {listed(unsure)} scatter by more than twice: other work ran there, and their speeds say little.")
    metric = speed_metric([run for c in choices for run in c.runs])
    fastest = best(choices, metric, -1 if metric == STEP else 1) if metric else []
    closest, smallest = best(choices, PSNR, 1), best(choices, BYTES, -1)
    if not fastest:
        warnings.append("No run measured its speed.")
    if not closest:
        warnings.append("No run was compared with the float model's pictures (metrics.baseline=none), so nothing is said about quality.")
    speed_words = (STEP, "{} a step"), (RATIO, "{} the float model's speed")
    quality_words = (PSNR, "PSNR {}"), ("quality/ssim", "SSIM {}"), ("quality/latent_rel_err", "latent error {}")
    memory_words = (BYTES, "{}"), (SMALLER, "{} smaller than float")
    unlike = None if over else unlike_pictures(runs)
    if unlike:
        return Answer("These runs drew different pictures; they do not say which setting to use.", [], [unlike, *warnings])
    if len(choices) == 1:
        parts = (("Speed", fastest, speed_words), ("Quality", closest, quality_words), ("Denoiser", smallest, memory_words))
        facts = [(term, measurements(who[0], *said)) for term, who, said in parts if who]
        if over:
            facts.append(("Medians over", f"{', '.join(over)} ({count(len(choices[0].runs), 'run')}), {CHOSEN}"))
        return Answer(single_verdict(choices[0], 1 if over else len(runs)), facts, warnings)
    # noise of half of the runs or more is no speed
    unfair = bool(unfair_speeds(runs)) or 2 * len(unsure) >= sum(run.metric(STEP) is not None for run in runs) > 0
    facts = [("Fastest as measured" if unfair else "Fastest", fact(fastest, choices, *speed_words))] if fastest else []
    facts += [("Closest to float", fact(closest, choices, *quality_words))] if closest else []
    between = [choices[i] for i in front(speed_quality(choices)) if choices[i] not in [*fastest, *closest]]
    if between and not unfair:
        facts.append(("Between them", "; ".join(fact([c], choices, *speed_words, quality_words[0]) for c in between[:MOST_BETWEEN])))
    facts += [("Smallest", fact(smallest, choices, *memory_words))] if smallest else []
    if over:
        facts.append(("Medians over", f"{', '.join(over)} ({count(len(choices[0].runs), 'run')} each), {CHOSEN}"))
    ahead = front(speed_quality(runs))
    if ahead:
        facts.append(("Pareto front", f"{listed([runs[i].tag for i in ahead])}: no other run is faster without being further from float"))
    return Answer(verdict(choices, fastest, closest, metric, unfair), facts, warnings)


def verdict(
    choices: Sequence[Candidate], fastest: Sequence[Candidate], closest: Sequence[Candidate], metric: str | None, unfair: bool
) -> str:
    """What to use of several, in one or two sentences."""
    if not closest:
        return f"{names(fastest)} is the fastest." if fastest and not unfair else "These runs do not say which setting to use."
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
            "the closest to float" if of_quick is None else "equal to float" if math.isinf(gained) else f"{gained:.1f} dB closer to float"
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
        parts.append("pictures equal to float's" if math.isinf(psnr) else f"pictures at {psnr:.1f} dB PSNR from float's")
    text = ", ".join(parts) or "no comparison with float"
    return f"Only {only.name} was measured: {text}." if runs > 1 else f"{text[0].upper()}{text[1:]}."


def best(choices: Sequence[Candidate], metric: str, better: int) -> list[Candidate]:
    """All that share the best value; empty where nobody was measured."""
    known = [(better * value, c) for c in choices if (value := c.metric(metric)) is not None]
    top = max((value for value, _ in known), default=math.nan)
    return [c for value, c in known if value == top]


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
            said.append(words.format(column.show(value, column.digits([value])) + units.get(metric, "") * math.isfinite(value)))
    return ", ".join(said)


def names(who: Sequence[Candidate]) -> str:
    """One or two by name; of more runs their numbers."""
    if len(who) > 2 and all(len(c.runs) == 1 for c in who):
        return listed([c.runs[0].tag for c in who])
    return " and ".join(c.name for c in who[:2]) + (f" and {len(who) - 2} more" if len(who) > 2 else "")


def scattered(run: Run) -> bool:
    """Whether one step in ten took more than twice the median."""
    p50, p90 = run.metric(STEP), run.metric("speed/step_ms_p90")
    return p50 is not None and p90 is not None and p90 > 2 * p50


def count(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'s' * (number != 1)}"


# -- table and curves ---------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> tuple[list[Column], list[dict[str, Any]]]:
    """The columns that any run has a value for, and a row per run: cells with text, number (None: missing) and whether it is the best."""
    known = {c.metric for c in COLUMNS}
    asked = dict.fromkeys(run.record.objective for run in runs if run.record.objective not in known)
    possible = (*COLUMNS, *(Column(metric, metric, "metrics.objective", 0) for metric in asked))
    columns = [c for c in possible if any(run.metric(c.metric) is not None for run in runs)]
    ahead = {i for i in front(speed_quality(runs)) if len(runs) > 1}
    made = {c.metric: [run.metric(c.metric) for run in runs] for c in columns}
    tops = {c.metric: max((c.better * v for v in made[c.metric] if v is not None), default=0.0) for c in columns}
    digits = {c.metric: c.digits([v for v in made[c.metric] if v is not None]) for c in columns}
    rows = []
    for i, run in enumerate(runs):
        cells = []
        for c in columns:
            value = made[c.metric][i]
            all_equal = len({v for v in made[c.metric] if v is not None}) == 1
            is_best = value is not None and c.better != 0 and not all_equal and c.better * value == tops[c.metric]
            cells.append({"text": c.show(value, digits[c.metric]), "value": value, "best": is_best})
        rows.append({"run": run, "front": i in ahead, "cells": cells, "measured": any(cell["value"] is not None for cell in cells)})
    return columns, rows


@dataclass(frozen=True)
class Curves:
    """Metrics against a strength, a line per combination of what else varies.

    Args:
        lines: by label, the points (strength, run) in the order of strength.
        left_out: tags of runs whose strength is no single number.
    """

    key: str
    lines: Mapping[str, list[tuple[float, Run]]]
    left_out: list[str]


def strength_curves(runs: Sequence[Run]) -> list[Curves]:
    """One set of curves for each LoRA strength that varies over finished runs."""
    done = measured(runs)
    keys = varying(done)
    short = short_names(keys)
    found = []
    for key in filter(STRENGTH.fullmatch, keys):
        lines: dict[str, list[tuple[float, Run]]] = {}
        left_out = []
        for run in done:
            strength = number(run.varied[key])
            if strength is None:
                left_out.append(run.tag)
                continue
            label = " ".join(f"{short[k]}={run.varied[k]}" for k in keys if k != key) or "all runs"
            lines.setdefault(label, []).append((strength, run))
        for line in lines.values():
            line.sort(key=lambda point: point[0])
        if len({strength for line in lines.values() for strength, _ in line}) > 1:
            found.append(Curves(key, lines, left_out))
    return found


def number(text: str) -> float | None:
    """A setting as a finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
