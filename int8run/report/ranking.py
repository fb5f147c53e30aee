"""Which runs are ahead: the candidates, the Pareto front of speed and quality, the best of a metric.

Runs are ranked among those with the same float images: a prompt, a seed or the strength of a LoRA changes
what is generated, and with it every metric of quality, whatever the quantization.

Used by the recommendation, the table of runs and the plots. Knows nothing of how they are shown.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from int8run.report.columns import PSNR_DB, SAME_FILE_LAYERS, SPEED_RATIO, STEP_MS
from int8run.report.runs import Run, find_varying_settings, format_setting, format_tags, select_measured
from int8run.tracking.setting_names import shorten_keys

# Settings that are chosen for the image that one wants. Runs that differ in them have different float images,
# too.
CONTENT_SETTINGS = re.compile(r"lora|lora[.](adapters([.].*)?|strength|insert_triggers)|seed|prompts([.].*)?")
# All settings that decide which images the float model generates.
IMAGE_SETTINGS = re.compile(rf"(model|sampler)([.].*)?|{CONTENT_SETTINGS.pattern}")

WEIGHT_SQNR_DB = "quant/weight_sqnr_db_min"

# The values of some settings, in the order of their keys.
SettingValues = tuple[str, ...]


def varies_content(keys: Iterable[str]) -> bool:
    """Whether jobs that differ in these settings differ in what their images show.

    No metric makes one of them the best: of two strengths of a LoRA the weaker one is closer to float, and
    not better for that.
    """
    return any(CONTENT_SETTINGS.fullmatch(key) for key in keys)


# -- candidates ----------------------------------------------------------------------------------------------


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
        values = []
        for run in self.runs:
            value = run.get_metric(name)
            if value is None:
                return None
            values.append(value)
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

    groups = group_by_choice(measured, choice_keys, content_keys)
    contents_of_all = find_shared_contents(list(groups.values()))
    is_grid = len(groups) >= 2 and len(contents_of_all) >= 2
    if not content_keys or not is_grid:
        return CandidateSet([Candidate(run.name, (run,)) for run in measured], [])

    short_keys = shorten_keys(keys)
    candidates = []
    for choice, run_by_content in groups.items():
        settings = zip(choice_keys, choice, strict=True)
        name = " ".join(format_setting(short_keys[key], value) for key, value in settings)
        members = [run for content, run in run_by_content.items() if content in contents_of_all]
        candidates.append(Candidate(name, tuple(members)))
    return CandidateSet(candidates, content_keys)


def group_by_choice(
    runs: Sequence[Run], choice_keys: Sequence[str], content_keys: Sequence[str]
) -> dict[SettingValues, dict[SettingValues, Run]]:
    """The runs by what one chooses, and within each choice by their content; of equal ones the last."""
    groups: dict[SettingValues, dict[SettingValues, Run]] = {}
    for run in runs:
        choice = get_settings(run, choice_keys)
        content = get_settings(run, content_keys)
        groups.setdefault(choice, {})[content] = run
    return groups


def find_shared_contents(groups: Sequence[Mapping[SettingValues, Run]]) -> set[SettingValues]:
    """The contents that every group has a run for."""
    if not groups:
        return set()
    return set.intersection(*(set(group) for group in groups))


def get_settings(run: Run, keys: Sequence[str]) -> SettingValues:
    """The values of some settings that vary."""
    return tuple(run.varied_settings[key] for key in keys)


# -- speed and quality ---------------------------------------------------------------------------------------


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


def is_own_baseline(run: Run) -> bool:
    """Whether INT8 and the float model have the same numbers, those of one INT8 file.

    The PSNR of such a run says nothing about the file, so it is not ranked by it. A file in another format,
    such as fp8, is quantized again: that costs quality, and can be ranked.
    """
    if not run.get_metric(SAME_FILE_LAYERS):
        return False
    weight_sqnr = run.get_metric(WEIGHT_SQNR_DB)  # missing where no weight was quantized
    return weight_sqnr is None or math.isinf(weight_sqnr)


def group_comparable(runs: Sequence[Run]) -> list[list[int]]:
    """The runs with a PSNR that may be ranked by it, in groups with the same float images.

    Returns:
        indices into `runs`.
    """
    image_keys = [key for key in find_varying_settings(runs) if IMAGE_SETTINGS.fullmatch(key)]
    groups: dict[SettingValues, list[int]] = {}
    for index, run in enumerate(runs):
        if run.get_metric(PSNR_DB) is not None and not is_own_baseline(run):
            groups.setdefault(get_settings(run, image_keys), []).append(index)
    return list(groups.values())


@dataclass(frozen=True)
class ParetoFronts:
    """The Pareto fronts of speed and quality, each among the runs with the same float images.

    Args:
        members: the runs on a front, as indices.
        count: how many fronts there are.
        num_groups: how many groups of runs with the same float images there are; a single run has no front.
    """

    members: set[int]
    count: int
    num_groups: int


def find_fronts(runs: Sequence[Run]) -> ParetoFronts:
    """Find the runs that no run with the same float images beats; one that has no such run is on no front."""
    points = list_speed_quality(runs)
    members: set[int] = set()
    count = 0
    groups = group_comparable(runs)
    for group in groups:
        ranked = [index for index in group if points[index] is not None]
        if len(ranked) < 2:
            continue
        count += 1
        front = find_pareto_front([points[index] for index in ranked])
        members |= {ranked[position] for position in front}
    return ParetoFronts(members=members, count=count, num_groups=len(groups))


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
    known = []
    for candidate in candidates:
        value = candidate.get_metric(metric)
        if value is not None:
            known.append((direction * value, candidate))
    best = max((value for value, _ in known), default=math.nan)
    return [candidate for value, candidate in known if value == best]


def format_names(candidates: Sequence[Candidate]) -> str:
    """One or two candidates by name; of more, their tags, or two names and a number where they are groups."""
    num_more = len(candidates) - 2
    are_single_runs = all(len(candidate.runs) == 1 for candidate in candidates)
    if num_more > 0 and are_single_runs:
        return format_tags([candidate.runs[0].tag for candidate in candidates])
    text = " and ".join(candidate.name for candidate in candidates[:2])
    if num_more > 0:
        text += f" and {num_more} more"
    return text
