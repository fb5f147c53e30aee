"""What the recommendation is written from: the best of each metric, and which comparisons are not fair.

`compare_runs` is the entry; `verdict` puts its result into words. Of the page's sentences it knows only the
reasons why a comparison is not made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.report.columns import DENOISER_BYTES, PSNR_DB, STEP_MS
from int8run.report.differences import (
    Standing,
    compare_quality,
    compare_speed,
    find_closest,
    read_interval_settings,
)
from int8run.report.ranking import (
    IMAGE_SETTINGS,
    Candidate,
    choose_speed_metric,
    find_best,
    group_candidates,
    is_own_baseline,
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


@dataclass(frozen=True)
class SweepComparison:
    """What the recommendation is written from.

    Args:
        runs: all runs of the report.
        candidates: what one may choose between.
        ranked_by_quality: those of them that are not their own baseline.
        content_keys: the settings over which the candidates' metrics are medians.
        speed_metric: what speeds are compared by; None where no run was timed.
        fastest, closest, smallest: the candidates that share the best speed, PSNR and denoiser memory; PSNR
            over the samples that all have, identical images as almost identical ones.
        speed_problems: why speeds cannot be compared.
        scattered_tags: runs whose step times vary too much.
        quality_standings: each other candidate with a PSNR, beside the first of `closest`.
        speed_standings: each other candidate that was timed, beside the first of `fastest`.
    """

    runs: Sequence[Run]
    candidates: list[Candidate]
    ranked_by_quality: list[Candidate]
    content_keys: list[str]
    speed_metric: str | None
    fastest: list[Candidate]
    closest: list[Candidate]
    smallest: list[Candidate]
    speed_problems: list[str]
    scattered_tags: list[str]
    quality_standings: list[Standing]
    speed_standings: list[Standing]

    @property
    def tied_closest(self) -> list[Candidate]:
        """The candidates that may be the closest to float, as far as the samples tell."""
        return list_tied(self.candidates, self.closest, self.quality_standings)

    @property
    def tied_fastest(self) -> list[Candidate]:
        """The candidates that may be the fastest, as far as the timed stretches tell."""
        return list_tied(self.candidates, self.fastest, self.speed_standings)

    @property
    def is_fastest_sure(self) -> bool:
        """Whether the fastest are surely faster than all others, but for those with the very same speed."""
        return all(candidate in self.fastest for candidate in self.tied_fastest)

    @property
    def is_closest_sure(self) -> bool:
        """Whether the closest are surely closer to float than others, but for those of equal PSNR."""
        return all(candidate in self.closest for candidate in self.tied_closest)

    @property
    def has_comparable_speeds(self) -> bool:
        """Whether one may say which candidate is the fastest: not where half of the timed runs scatter."""
        num_timed = len(select_timed(self.runs))
        mostly_scattered = num_timed > 0 and 2 * len(self.scattered_tags) >= num_timed
        return not self.speed_problems and not mostly_scattered

    @property
    def differs_in_content_alone(self) -> bool:
        """Whether the runs show several images of one setting, so that there is nothing to choose."""
        return len(self.candidates) == 1 and bool(self.content_keys)


def compare_runs(runs: Sequence[Run]) -> SweepComparison:
    """Group the runs into candidates and find the best of them."""
    groups = group_candidates(runs)
    candidates = groups.candidates
    speed_metric = choose_speed_metric([run for candidate in candidates for run in candidate.runs])
    fastest = []
    if speed_metric is not None:
        # less of a step time is better, more of a ratio
        direction = -1 if speed_metric == STEP_MS else 1
        fastest = find_best(candidates, speed_metric, direction)
    ranked_by_quality = [
        candidate for candidate in candidates if not any(is_own_baseline(run) for run in candidate.runs)
    ]
    closest = find_closest(ranked_by_quality)
    intervals = read_interval_settings(runs)
    quality_standings, speed_standings = [], []
    if closest:
        others = select_others(ranked_by_quality, closest[0], PSNR_DB)
        quality_standings = compare_quality(closest[0], others, intervals)
    if fastest and speed_metric is not None:
        others = select_others(candidates, fastest[0], speed_metric)
        speed_standings = compare_speed(fastest[0], others, speed_metric, intervals)
    timed = select_timed(runs)
    return SweepComparison(
        runs=runs,
        candidates=candidates,
        ranked_by_quality=ranked_by_quality,
        content_keys=groups.content_keys,
        speed_metric=speed_metric,
        fastest=fastest,
        closest=closest,
        smallest=find_best(candidates, DENOISER_BYTES, direction=-1),
        speed_problems=explain_incomparable_speeds(runs),
        scattered_tags=[run.tag for run in timed if has_scattered_times(run.record.metrics)],
        quality_standings=quality_standings,
        speed_standings=speed_standings,
    )


def select_others(candidates: Sequence[Candidate], best: Candidate, metric: str) -> list[Candidate]:
    """The candidates besides the best one that have a metric."""
    others = []
    for candidate in candidates:
        if candidate is not best and candidate.get_metric(metric) is not None:
            others.append(candidate)
    return others


def list_tied(
    candidates: Sequence[Candidate], best: Sequence[Candidate], standings: Sequence[Standing]
) -> list[Candidate]:
    """The best candidate and those that are not told from it, in the order of all; empty without a best one.

    Args:
        candidates: all of them.
        best: of a metric, the first one is what others are compared with.
        standings: of the others.
    """
    if not best:
        return []
    tied = [best[0], *(standing.candidate for standing in standings if standing.is_tied)]
    return [candidate for candidate in candidates if candidate in tied]


def select_timed(runs: Sequence[Run]) -> list[Run]:
    """The runs that measured their speed."""
    return [run for run in runs if run.get_metric(STEP_MS) is not None]


def explain_incomparable_speeds(runs: Sequence[Run]) -> list[str]:
    """Why the speeds of these runs cannot be compared; empty when they can."""
    timed = select_timed(runs)
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


def explain_incomparable_quality(comparison: SweepComparison) -> str | None:
    """Why the quality of the candidates cannot be compared; None when it can.

    Where metrics are medians over contents, every candidate generated the same contents.
    """
    measured = select_measured(comparison.runs)
    keys = []
    for key in find_varying_settings(measured):
        if IMAGE_SETTINGS.fullmatch(key) and key not in comparison.content_keys:
            keys.append(key)
    if not keys:
        return None
    names = ", ".join(keys)
    if all(run.get_metric(PSNR_DB) is None for run in measured):
        return f"The runs differ in {names}, so each generated other images."
    return (
        f"Quality is not comparable: the runs differ in {names}, so each was compared with different images "
        "of the float model."
    )
