"""Which runs are ahead: the candidates, the Pareto front of speed and quality, the best of a metric.

Used by the recommendation, the table of runs and the plots. Knows nothing of how they are shown.
"""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from int8run.report.columns import PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.runs import Run, find_varying_settings, format_setting, format_tags, select_measured
from int8run.tracking.run_record import shorten_keys

# Settings that are chosen for the image that one wants. Runs that differ in them have different float images,
# too.
CONTENT_SETTINGS = re.compile(r"lora[.](adapters[.]\d+[.])?strength|seed|prompts([.].*)?")


def varies_content_only(keys: Iterable[str]) -> bool:
    """Whether jobs that differ in these settings are chosen by their images: no metric makes one the best."""
    keys = list(keys)
    return bool(keys) and all(CONTENT_SETTINGS.fullmatch(key) for key in keys)


@dataclass(frozen=True)
class Candidate:
    """What one may choose: one run, or several that differ only in the content of their images.

    Args:
        name: of the run, or the settings that the runs share.
        runs: one or more.
    """

    name: str
    runs: tuple[Run, ...]

    def get_metric(self, name: str) -> float | None:
        """The median over the runs; None where one of them lacks the metric."""
        values = [value for run in self.runs if (value := run.get_metric(name)) is not None]
        if not values or len(values) < len(self.runs):
            return None
        if any(map(math.isinf, values)):
            # The mean of the two middle values would be infinite where one is: take the lower one.
            return statistics.median_low(values)
        return statistics.median(values)


@dataclass(frozen=True)
class CandidateSet:
    """What the runs of a report let one choose between.

    Args:
        candidates: in the order of the runs.
        content_keys: the content settings over which each candidate's metrics are medians; empty where each
            candidate is one run.
    """

    candidates: list[Candidate]
    content_keys: list[str]


def group_candidates(runs: Sequence[Run]) -> CandidateSet:
    """Group the measured runs into candidates.

    A LoRA's strength, a seed and a prompt are chosen for the image, not for speed or quality. Where nothing
    else differs, all runs are one candidate. Where other settings differ too, the runs are grouped by those,
    and only contents that every group has count.
    """
    measured = select_measured(runs)
    keys = find_varying_settings(measured)
    content_keys = [key for key in keys if CONTENT_SETTINGS.fullmatch(key)]
    choice_keys = [key for key in keys if key not in content_keys]
    if content_keys and not choice_keys:
        return CandidateSet([Candidate("INT8", tuple(measured))], content_keys)

    # The run of each choice, by its content.
    groups: dict[tuple[str, ...], dict[tuple[str, ...], Run]] = {}
    for run in measured:
        choice = tuple(run.varied_settings[key] for key in choice_keys)
        content = tuple(run.varied_settings[key] for key in content_keys)
        groups.setdefault(choice, {})[content] = run

    common = set.intersection(*map(set, groups.values())) if groups else set()
    if not content_keys or len(groups) < 2 or len(common) < 2:
        return CandidateSet([Candidate(run.name, (run,)) for run in measured], [])

    short_keys = shorten_keys(keys)
    candidates = []
    for choice, run_by_content in groups.items():
        name = " ".join(
            format_setting(short_keys[key], value) for key, value in zip(choice_keys, choice, strict=True)
        )
        members = tuple(run for content, run in run_by_content.items() if content in common)
        candidates.append(Candidate(name, members))
    return CandidateSet(candidates, content_keys)


def choose_speed_metric(runs: Sequence[Run] | Sequence[Candidate]) -> str | None:
    """The metric to compare speeds by: the ratio to float if every timed run has one, else the step time.

    Returns:
        None where no run was timed.
    """
    timed = [run for run in runs if run.get_metric(STEP_MS) is not None]
    if not timed:
        return None
    have_ratio = all(run.get_metric(SPEED_RATIO) is not None for run in timed)
    return SPEED_RATIO if have_ratio else STEP_MS


def orient_speed(metric: str, value: float) -> float:
    """A speed as a number of which more is better: a step time becomes negative."""
    return -value if metric == STEP_MS else value


def list_speed_quality(runs: Sequence[Run] | Sequence[Candidate]) -> list[tuple[float, float] | None]:
    """Speed, where more is better, and PSNR of each run.

    None where one of them is missing or is no measurement: an infinite speed, a PSNR below every number.
    """
    metric = choose_speed_metric(runs)
    if metric is None:
        return [None for _ in runs]

    points: list[tuple[float, float] | None] = []
    for run in runs:
        speed, psnr = run.get_metric(metric), run.get_metric(PSNR_DB)
        if speed is None or psnr is None or not math.isfinite(speed) or psnr == -math.inf:
            points.append(None)
        else:
            points.append((orient_speed(metric, speed), psnr))
    return points


def find_pareto_front(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """The points that no other beats in one number without being worse in the other.

    Args:
        points: two numbers each, of which more is better; None is never on the front.

    Returns:
        indices into `points`.
    """
    known = [(point, index) for index, point in enumerate(points) if point is not None]
    front = []
    # The largest first number first, and of equal ones the largest second: a point is on the front if its
    # second number is larger than that of all before it, or if it is the same point again.
    known.sort(key=lambda pair: pair[0], reverse=True)
    last: tuple[float, float] | None = None
    for point, index in known:
        if last is None or point[1] > last[1] or point == last:
            front.append(index)
            last = point
    return sorted(front)


def find_best(candidates: Sequence[Candidate], metric: str, direction: int) -> list[Candidate]:
    """All candidates that share the best value of a metric; empty where nobody measured it.

    Args:
        candidates: what to choose from.
        metric: name of the metric.
        direction: 1 where more is better, -1 where less is.
    """
    known = [
        (direction * value, candidate)
        for candidate in candidates
        if (value := candidate.get_metric(metric)) is not None
    ]
    best = max((value for value, _ in known), default=math.nan)
    return [candidate for value, candidate in known if value == best]


def format_names(candidates: Sequence[Candidate]) -> str:
    """One or two candidates by name; of more, their tags, or two names and a number where they are groups."""
    if len(candidates) > 2 and all(len(candidate.runs) == 1 for candidate in candidates):
        return format_tags([candidate.runs[0].tag for candidate in candidates])
    text = " and ".join(candidate.name for candidate in candidates[:2])
    if len(candidates) > 2:
        text += f" and {len(candidates) - 2} more"
    return text
