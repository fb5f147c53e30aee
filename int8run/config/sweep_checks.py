"""Checks of all jobs of a sweep, before the first one starts: their settings, their files, where they save.

The sweeper calls `check_jobs` with what `compose` has composed, and `check_files_of_jobs`. A sweep with bad
jobs gets one error with a line for each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.config_safety import check_targets
from int8run.config.named_files import check_named_files
from int8run.errors import (
    ConfigError,
    FileError,
    Int8RunError,
    SweepError,
)
from int8run.utils.paths import expand_path


def check_jobs(jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[Any]:
    """Target-check and range-check every job of a sweep before the first one starts.

    Args:
        jobs: the overrides of each.
        configs: composed from them.

    Returns:
        The RunSpec of each job.

    Raises:
        ConfigError: for a command with one job, which is bad.
        SweepError: for a sweep with bad jobs; it has a line for each.
    """
    specs: list[Any] = []
    problems: list[tuple[int, Int8RunError]] = []
    for number, config in enumerate(configs):
        check_targets(config)
        try:
            specs.append(create_run_spec(config))
        except Int8RunError as error:
            problems.append((number, error))
    if problems and len(jobs) == 1:
        raise problems[0][1]
    if problems:
        raise SweepError(list_problems(jobs, problems), ConfigError.exit_code)
    for spec in specs:
        if spec.task.makes_runs:
            raise ConfigError(
                f"task={type(spec.task).__name__.lower()} makes runs of its own and is no job of a sweep; "
                "leave -m and values with commas out"
            )
    check_saved_files(specs)
    return specs


def check_saved_files(specs: Sequence[Any]) -> None:
    """Raise ConfigError where jobs that build different models name one file or folder in `save=`.

    Models differ by everything that enters `build_key`, such as the backend and the device, even where their
    weights would be equal.
    """
    build_keys: dict[Path, set[str]] = {}
    for spec in specs:
        if spec.save is not None:
            path = expand_path(spec.save).absolute()
            build_keys.setdefault(path, set()).add(spec.build_key)
    for path, keys in build_keys.items():
        if len(keys) > 1:
            raise ConfigError(
                f"save={path} is one place for {len(keys)} models that this sweep makes, and the last would "
                "replace the others; run a command for each, with a save= of its own"
            )


def check_files_of_jobs(jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> None:
    """Refuse a sweep of which no job can find its files. One that can runs; the others fail as they start.

    Args:
        jobs: the overrides of each.
        configs: composed from them.

    Raises:
        FileError: where every job lacks the same file.
        SweepError: where each lacks another one.
    """
    problems: list[tuple[int, Int8RunError]] = []
    for number, config in enumerate(configs):
        try:
            check_named_files(get_plain_config(config))
        except FileError as error:
            problems.append((number, error))
        else:
            return
    if len({str(error) for _, error in problems}) == 1:
        raise problems[0][1]
    raise SweepError(list_problems(jobs, problems), FileError.exit_code)


def list_problems(jobs: Sequence[Sequence[str]], problems: Sequence[tuple[int, Int8RunError]]) -> str:
    """The message for a sweep that is not started: a line for each job that cannot run.

    Args:
        jobs: the overrides of each.
        problems: numbers of jobs, and why they cannot run.
    """
    common = set.intersection(*(set(job) for job in jobs))
    lines = []
    for number, error in problems:
        own_words = [word for word in jobs[number] if word not in common]
        lines.append(f"  job {number} ({' '.join(own_words)}): {error}")
    return "\n".join([f"{len(problems)} of {len(jobs)} jobs cannot run; none was started", *lines])
