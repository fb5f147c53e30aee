"""What a search leaves: the winner, its confirmation, recipe.yaml, search.html, and the last lines."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from int8run import __version__
from int8run.config.job import Job
from int8run.errors import FileError
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import Difference, Interval, compare_pairs
from int8run.report.formatting import format_megabytes
from int8run.report.search_page import write_search_page
from int8run.report.templates import write_text_file
from int8run.search.engine import Goal, count_failed
from int8run.search.estimate import summarize_predictions
from int8run.search.front import choose_winner, find_cheapest, find_front, get_cost
from int8run.search.measurement import BYTES, COSTS, SECONDS, Measurement, measure_trial
from int8run.search.space import SearchSpace
from int8run.search.trials import Trial, describe_differences, select_finished
from int8run.tasks.search_overrides import SearchOverrides
from int8run.tracking.run_record import FINISHED, Record
from int8run.utils.plurals import count_noun

if TYPE_CHECKING:
    from int8run.jobs.job_batches import JobBatches
    from int8run.tasks.search import TrialRunner

log = logging.getLogger(__name__)
RECIPE_FILE, PAGE = "recipe.yaml", "search.html"
RECIPE_HEADING = """\
# Written by task=search. `int8run recipe=FILE` uses it; settings of the command line win over it.
"""


@dataclass(frozen=True)
class SearchOutcome:
    """A search at its end.

    Args:
        space: that was searched.
        goal: what was asked for.
        trials: all of them.
        base_record: of the base recipe, with the float model beside it.
        intervals: how they are computed.
        jobs_at_once: how many trials may have shared a machine.
        confirmed: the winner with the prompts of the command; None: it was not run again.
    """

    space: SearchSpace
    goal: Goal
    trials: Sequence[Trial]
    base_record: Record | None
    intervals: IntervalSettings
    jobs_at_once: int = 1
    confirmed: Measurement | None = None

    @cached_property
    def winner(self) -> Trial | None:
        """The cheapest trial that meets the quality, else the nearest one."""
        return choose_winner(self.trials, self.goal.minimise, self.goal.quality_db)[0]

    @cached_property
    def is_met(self) -> bool:
        """Whether the winner meets the quality."""
        return choose_winner(self.trials, self.goal.minimise, self.goal.quality_db)[1]

    @cached_property
    def tied(self) -> list[Trial]:
        """The other trials that meet the quality and whose time cannot be told from the winner's."""
        if self.goal.minimise != SECONDS:
            return []
        cheapest = find_cheapest(select_finished(self.trials), SECONDS, self.goal.quality_db)
        return [trial for trial in cheapest if trial is not self.winner]

    def describe(self, trial: Trial) -> str:
        """A trial by what differs from the base."""
        return describe_differences(trial.params, self.space.base)


@dataclass(frozen=True)
class Conclusion:
    """What is said at the end.

    Args:
        facts: for search.json.
        lines: for the terminal.
        message: of the error, where no recipe meets the quality.
    """

    facts: Mapping[str, Any]
    lines: Sequence[str]
    message: str = ""


def confirm_winner(
    outcome: SearchOutcome, runner: "TrialRunner", batches: "JobBatches"
) -> Measurement | None:
    """Run the winner with the prompts and seeds of the command, which had no part in choosing it.

    Where it has another float model than the base recipe, the base runs as well, to compare with.

    Returns:
        What was measured; None where that run failed, or has no float images beside it, which is logged.
    """
    winner = outcome.winner
    assert winner is not None
    number = len(outcome.trials)
    space, overrides = outcome.space, runner.overrides
    recipe = overrides.make_confirmation(space.list_settings(winner.params))
    base = overrides.make_confirmation(space.list_settings(space.base))
    jobs = {number: recipe}
    has_same_images = batches.create_spec(recipe).float_key == batches.create_spec(base).float_key
    reference = number if has_same_images else number + 1
    if not has_same_images:
        jobs[reference] = base
    records = batches.run(jobs)
    if any(record.state != FINISHED for record in records.values()):
        return None
    try:
        return measure_trial(records[number], records[reference], outcome.intervals)
    except FileError as error:
        log.warning("the winner is not confirmed: %s", error)
        return None


def conclude_search(outcome: SearchOutcome, overrides: SearchOverrides, job: Job) -> Conclusion:
    """Write recipe.yaml and search.html; return what there is to say.

    Args:
        outcome: of the search.
        overrides: for the recipe.
        job: where to write.
    """
    winner = outcome.winner
    facts: dict[str, Any] = {
        "winner": None if winner is None else winner.number,
        "is_met": outcome.is_met,
        "front": {cost: [trial.number for trial in find_front(outcome.trials, cost)] for cost in COSTS},
        "predictions": summarize_predictions(outcome.trials),
        "failed": count_failed(outcome.trials),
        "confirmed": None if outcome.confirmed is None else outcome.confirmed.to_json(),
    }
    page = job.output_dir / PAGE
    recipe = job.output_dir / RECIPE_FILE
    if winner is not None:
        write_recipe(recipe, outcome, winner, overrides)
    write_search_page(page, build_page_facts(outcome, facts))
    lines = describe_outcome(outcome)
    lines += [f"recipe:   {recipe}", f"report:   {page}"]
    return Conclusion(facts, lines, describe_unmet(outcome, recipe))


def write_recipe(path: Path, outcome: SearchOutcome, winner: Trial, overrides: SearchOverrides) -> None:
    """Write the winner's settings, for `recipe=FILE`."""
    measured = winner.measured
    assert measured is not None
    settings = outcome.space.list_settings(winner.params)
    content = {
        "recipe": overrides.list_recipe(settings),
        "found": {
            "int8run": __version__,
            "trial": winner.number,
            "asked_db": outcome.goal.quality_db,
            "is_met": outcome.is_met,
            "psnr_db": round(measured.quality_db, 3),
            "seconds_per_image": round(measured.seconds, 6),
            "bytes": int(measured.bytes),
        },
    }
    write_text_file(path, RECIPE_HEADING + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


# -- words ---------------------------------------------------------------------------------------------------


def describe_outcome(outcome: SearchOutcome) -> list[str]:
    """The last lines of a search: what it found, at what cost, and how sure that is."""
    winner = outcome.winner
    if winner is None:
        return ["no trial finished"]
    verb = "cheapest" if outcome.is_met else "nearest"
    lines = [f"{verb}: {describe_trial(outcome, winner)}"]
    base = outcome.trials[0]
    if base.measured is not None and winner is not base:
        lines.append(f"base:     {describe_trial(outcome, base)}")
    if outcome.confirmed is not None:
        lines.append(
            f"with the prompts of the command: {describe_measurement(outcome.confirmed, outcome.intervals)}"
        )
    summary = summarize_predictions(outcome.trials)
    finished = select_finished(outcome.trials)
    line = f"{count_noun(len(outcome.trials), 'trial')}, {len(finished)} finished"
    if summary["combinations"]:
        combinations = count_noun(int(summary["combinations"]), "combination")
        line += f"; {combinations} predicted within {summary['rms_db']:.2f} dB (root mean square)"
    return [*lines, line, *list_doubts(outcome)]


def list_doubts(outcome: SearchOutcome) -> list[str]:
    """Why its times may say little."""
    doubts = []
    finished = select_finished(outcome.trials)
    tied = outcome.tied
    if tied:
        numbers = ", ".join(str(trial.number) for trial in tied)
        doubts.append(
            f"the winner's time cannot be told from that of {count_noun(len(tied), 'other trial')} "
            f"({numbers}); it is the closest to float of them"
        )
    scattered = sum(trial.measured is not None and trial.measured.scatters for trial in finished)
    if scattered:
        doubts.append(
            f"the step times of {scattered} of {len(finished)} trials scatter by more than twice: other "
            "work ran on this machine, so times say little"
        )
    if outcome.jobs_at_once > 1:
        doubts.append(
            f"up to {outcome.jobs_at_once} trials shared a machine, so times are not those of a run alone"
        )
    return doubts


def describe_trial(outcome: SearchOutcome, trial: Trial) -> str:
    """A trial with its numbers."""
    assert trial.measured is not None
    numbers = describe_measurement(trial.measured, outcome.intervals)
    return f"trial {trial.number} ({outcome.describe(trial)}): {numbers}"


def describe_measurement(measured: Measurement, intervals: IntervalSettings) -> str:
    """Quality, time and memory in words."""
    quality = f"{measured.quality_db:.2f} dB{format_interval(measured.compute_quality_interval(intervals))}"
    low, high = format_seconds(measured.seconds_low), format_seconds(measured.seconds_high)
    seconds = f"{format_seconds(measured.seconds)} per image [{low}, {high}]"
    return f"{quality}, {seconds}, {format_megabytes(measured.bytes)}"


def format_interval(interval: Interval | None) -> str:
    """` [35.1, 36.9]`; empty without one."""
    return "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"


def format_seconds(seconds: float) -> str:
    """A time with its unit."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def describe_unmet(outcome: SearchOutcome, recipe: Path) -> str:
    """Why a search that met no quality ends with an error."""
    winner = outcome.winner
    if outcome.is_met:
        return ""
    if winner is None:
        return "task=search: no trial finished; search.json names why each failed"
    recipes = count_noun(len(select_finished(outcome.trials)), "recipe")
    return (
        f"quality_db={outcome.goal.quality_db:g} is met by none of {recipes}; the nearest is "
        f"{describe_trial(outcome, winner)}, and is in {recipe}; ask for less, or for more trials "
        "(task.n_trials=… with resume=true goes on)"
    )


# -- the page ------------------------------------------------------------------------------------------------


def build_page_facts(outcome: SearchOutcome, found: Mapping[str, Any]) -> dict[str, Any]:
    """What search.html shows.

    Args:
        outcome: of the search.
        found: facts of search.json.
    """
    finished = select_finished(outcome.trials)
    fronts = {cost: {trial.number for trial in find_front(outcome.trials, cost)} for cost in COSTS}
    winner = outcome.winner
    shared = outcome.intervals.share_among(len(finished) * (len(finished) - 1) // 2)
    rows = [build_row(outcome, trial, fronts, shared) for trial in outcome.trials]
    return {
        "title": "Search",
        "goal": vars(outcome.goal),
        "lines": describe_outcome(outcome),
        "is_met": outcome.is_met,
        "winner": None if winner is None else winner.number,
        "rows": rows,
        "float": describe_float(outcome.base_record),
        "predictions": found["predictions"],
        "failed": found["failed"],
        "samples": len(finished[0].measured.psnrs_db) if finished and finished[0].measured else 0,
        "level": outcome.intervals.level,
        "space": outcome.space.to_json(),
    }


def build_row(
    outcome: SearchOutcome, trial: Trial, fronts: Mapping[str, set[int]], shared: IntervalSettings
) -> dict[str, Any]:
    """A trial on the page.

    Args:
        outcome: of the search.
        trial: the row's.
        fronts: numbers of the trials on each front.
        shared: of the differences, all of which hold at once.
    """
    row: dict[str, Any] = {
        "number": trial.number,
        "recipe": outcome.describe(trial),
        "reason": trial.reason,
        "state": trial.state.lower(),
        "error": trial.error,
        "predicted_db": None if trial.predicted is None else trial.predicted.quality_db,
        "predicted_seconds": None if trial.predicted is None else trial.predicted.seconds,
        "fronts": [cost for cost in COSTS if trial.number in fronts[cost]],
    }
    measured = trial.measured
    if measured is None:
        return row
    interval = measured.compute_quality_interval(outcome.intervals)
    winner = outcome.winner
    assert winner is not None and winner.measured is not None
    difference = compare_pairs(measured.psnrs_db, winner.measured.psnrs_db, shared, measured.clusters)
    return row | {
        "quality_db": measured.quality_db,
        "quality_low": None if interval is None else interval.low,
        "quality_high": None if interval is None else interval.high,
        "seconds": measured.seconds,
        "seconds_low": measured.seconds_low,
        "seconds_high": measured.seconds_high,
        "bytes": measured.bytes,
        "difference": describe_difference(difference, is_winner=trial is winner),
        "cost": get_cost(trial, outcome.goal.minimise),
    }


def describe_difference(difference: Difference, *, is_winner: bool) -> str:
    """What a trial's quality differs from the winner's by."""
    if is_winner:
        return "winner"
    text = f"{difference.mean:+.2f} dB{format_interval(difference.interval)}"
    return text if difference.sign else f"{text}, not told apart"


def describe_float(record: Record | None) -> dict[str, float] | None:
    """Time and memory of the float model; None where it was not timed."""
    if record is None or not record.metrics.get("float/images_per_s"):
        return None
    metrics = record.metrics
    nbytes = metrics["float/denoiser_bytes"] + metrics.get("float/text_encoder_bytes", 0.0)
    return {SECONDS: 1 / metrics["float/images_per_s"], BYTES: nbytes}
