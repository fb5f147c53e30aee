"""`task=search`: the cheapest recipe for a quality, found by runs of the ordinary kind.

`search_options.Search` calls `run_search`. `search.engine` decides what runs next, `jobs.job_batches` runs
it, `search_results` writes what was found.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from int8run.config.compose import get_plain_config
from int8run.config.error_messages import explain_error
from int8run.config.job import Job, flatten_settings
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, FileError, Int8RunError
from int8run.jobs.job_batches import JobBatches
from int8run.jobs.resume import SEARCH_FILE, list_lasting_overrides
from int8run.report.console import print_lines
from int8run.search.engine import Goal, Search, count_failed, mark_failed
from int8run.search.measurement import measure_trial
from int8run.search.parse_space import parse_space
from int8run.search.space import Params, SearchSpace
from int8run.search.store import SearchIdentity, read_trials, write_search
from int8run.search.trials import Trial, describe_differences
from int8run.tasks.search_options import Search as SearchOptions
from int8run.tasks.search_overrides import SearchOverrides
from int8run.tasks.search_results import SearchOutcome, conclude_search, confirm_winner
from int8run.tracking.run_record import FAILED, FINISHED, UNHASHED_SETTINGS, Record
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
TRIALS = "trials"


def run_search(spec: RunSpec, job: Job, options: SearchOptions) -> None:
    """Search, confirm the winner, and write what was found.

    Args:
        spec: of the search command.
        job: where it came from, and where to write.
        options: what is asked for.

    Raises:
        ConfigError: something of the space cannot work, or no recipe meets the quality; then the nearest one
            is written all the same.
    """
    assert spec.quality_db is not None  # `SearchOptions.check` has asked
    overrides = SearchOverrides(spec, job.overrides, options.judge_by)
    space = parse_space(options.space)
    batches = JobBatches(job.output_dir / TRIALS, space.keys)
    space = fit_space(space, overrides, batches)
    warn_overruled(space, overrides)
    runner = TrialRunner(spec, space, overrides, batches)
    identity = identify_search(job, space, runner)
    path = job.output_dir / SEARCH_FILE
    goal = Goal(
        minimise=options.minimise,
        quality_db=spec.quality_db,
        num_trials=options.n_trials,
        batch=options.batch or batches.jobs_at_once,
        seed=spec.seed,
    )
    facts = {"goal": vars(goal)}

    def save(trials: Sequence[Trial]) -> None:
        write_search(path, identity, trials, facts)

    trials = read_trials(path, identity)
    if trials:
        log.info("the search goes on with %s in %s", count_noun(len(trials), "trial"), job.output_dir)
    search = Search(space, goal, runner.run, save, trials)
    try:
        trials = search.run()
    finally:
        num_failed = count_failed(search.trials)
        if num_failed:
            log.warning("%s failed; search.json names each", count_noun(num_failed, "trial"))
    jobs_at_once = batches.manifest.jobs_at_once
    outcome = SearchOutcome(space, goal, trials, runner.base_record, spec.metrics.intervals, jobs_at_once)
    if options.confirm and outcome.winner is not None:
        outcome = replace(outcome, confirmed=confirm_winner(outcome, runner, batches))
    batches.finish(spec.tracker, job.output_dir / "report.html")
    found = conclude_search(outcome, overrides, job)
    write_search(path, identity, trials, {**facts, **found.facts})
    print_lines(*found.lines)
    if not outcome.is_met:
        raise ConfigError(found.message)


class TrialRunner:
    """Runs the trials of a search, and measures them beside the base recipe's float images.

    Args:
        spec: of the search command.
        space: what is searched.
        overrides: makes those of each trial.
        batches: runs them.
    """

    def __init__(self, spec: RunSpec, space: SearchSpace, overrides: SearchOverrides, batches: JobBatches):
        self.spec, self.space, self.overrides, self.batches = spec, space, overrides, batches
        self.base_spec = batches.create_spec(overrides.make_trial(space.list_settings(space.base)))
        self.base_record: Record | None = None

    def run(self, trials: Sequence[Trial]) -> list[Trial]:
        """Run trials and return them as they ended; one that fails ends no other one.

        Raises:
            ConfigError: the base recipe cannot run, with which all others are compared.
        """
        jobs: dict[int, list[str]] = {}
        impossible: dict[int, str] = {}
        for trial in trials:
            try:
                jobs[trial.number] = self.make_overrides(trial.params)
            except Int8RunError as problem:
                impossible[trial.number] = str(problem)
        records = self.batches.run(jobs)
        if self.base_record is None and 0 not in records:  # the search goes on
            records |= self.batches.run({0: self.make_overrides(self.space.base)})
        if self.base_record is None:
            self.base_record = check_base(records[0])
        ended = []
        for trial in trials:
            if trial.number in impossible:
                error = impossible[trial.number]
                log.warning("trial %d (%s) cannot run: %s", trial.number, self.describe(trial), error)
                ended.append(mark_failed(trial, FAILED, error))
            else:
                ended.append(self.measure(trial, records[trial.number], self.base_record))
        return ended

    def make_overrides(self, params: Params) -> list[str]:
        """The overrides of a trial. Only the base has a float model beside it; others have its images.

        Raises:
            Int8RunError: the recipe cannot work.
        """
        settings = self.space.list_settings(params)
        if params == self.space.base:
            return self.overrides.make_trial(settings)
        spec = self.batches.create_spec(self.overrides.make_trial(settings))
        # a recipe with steps or LoRAs of its own has another float model; it is not what it is compared with
        has_same_images = spec.float_key == self.base_spec.float_key
        return self.overrides.make_trial(settings, baseline="cached" if has_same_images else "none")

    def measure(self, trial: Trial, record: Record, base: Record) -> Trial:
        """A trial with what its run left."""
        if record.state != FINISHED:
            return mark_failed(trial, record.state, record.error or "it left no reason")
        try:
            measured = measure_trial(record, base, self.spec.metrics.intervals)
        except FileError as error:
            log.warning("trial %d (%s): %s", trial.number, self.describe(trial), error)
            return mark_failed(trial, FAILED, str(error))
        return replace(trial, state=FINISHED, error=None, measured=measured)

    def describe(self, trial: Trial) -> str:
        """A trial by what differs from the base."""
        return describe_differences(trial.params, self.space.base)


def check_base(record: Record) -> Record:
    """Return the base's record; raise ConfigError where it did not finish."""
    if record.state != FINISHED:
        raise ConfigError(
            f"the base recipe, with which all others are compared, did not finish: {record.error}; its log "
            f"is in {record.folder}"
        )
    return record


def fit_space(space: SearchSpace, overrides: SearchOverrides, batches: JobBatches) -> SearchSpace:
    """The space with shares as numbers, without optional choices that the model cannot have.

    Raises:
        ConfigError: a setting or a value that does not exist, or nothing is left to choose.
    """
    base_spec = batches.create_spec(overrides.make_trial({}))
    base_config = get_plain_config(batches.compose(overrides.make_trial({})))

    def get_number(key: str) -> float | None:
        value: object = base_spec.sampling.steps if key == "sampler.steps" else base_config
        if key != "sampler.steps":
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and isinstance(value, int | float) else None

    space = space.resolve_shares(get_number)
    left_out: dict[str, list[str]] = {}
    for name, ingredient in space.ingredients.items():
        # as far as another one is needed, beside its first choice that will do
        context = space.list_contexts(ingredient)[0]
        for point in ingredient.list_points(2):
            settings = space.list_settings({**context, name: point})
            message = find_problem(overrides.make_trial(settings), batches)
            if message is None:
                continue
            if not ingredient.is_optional:
                raise ConfigError(f"task.space.{name}={point}: {message}")
            log.info("task.space.%s: %s is left out: %s", name, point, message)
            left_out.setdefault(name, []).append(str(point))
    fitted = space.without(left_out)
    if not fitted.ingredients:
        raise ConfigError(
            "task.space: this model can have none of the choices, so there is nothing to search"
        )
    return fitted


def warn_overruled(space: SearchSpace, overrides: SearchOverrides) -> None:
    """Log which settings of the command even the base recipe does not have."""
    for word in overrides.list_overruled(space.list_settings(space.base)):
        log.warning(
            "%s of the command is not used, because an ingredient of task.space sets it; "
            "task.space.NAME=null leaves that ingredient out",
            word,
        )


def find_problem(overrides: Sequence[str], batches: JobBatches) -> str | None:
    """Why a recipe cannot be composed; None where it can.

    Raises:
        Exception: of a kind that no user can cause.
    """
    try:
        batches.create_spec(overrides)
    except Exception as error:
        message, _ = explain_error(error)
        if message is None:
            raise
        return message
    return None


def identify_search(job: Job, space: SearchSpace, runner: TrialRunner) -> SearchIdentity:
    """What must be the same where a search goes on.

    Args:
        job: of the search.
        space: that is searched.
        runner: of its trials.
    """
    config = runner.batches.compose(runner.make_overrides(space.base))
    settings: dict[str, str] = {}
    for key, value in get_plain_config(config).items():
        if key not in (*UNHASHED_SETTINGS, "task"):
            flatten_settings(f"{key}.", value, settings)
    return SearchIdentity(list_lasting_overrides(job.overrides), space.to_json(), settings)


def get_trial_folder(output_dir: Path, number: int) -> Path:
    """Where a trial's run is."""
    return output_dir / TRIALS / str(number)
