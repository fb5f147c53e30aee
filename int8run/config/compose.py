"""Before the first job starts: compose every job, refuse foreign code in the config, check every value.

`cli.py` calls `check_command` first; the jobs of a sweep are checked by `sweep_checks`. Whoever has a
composed config gets its RunSpec from `create_run_spec`. Nothing here starts a job or writes a file.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from int8run.config.allowed_classes import check_classes, check_keys_of_hydra, list_option_classes
from int8run.config.config_safety import check_targets
from int8run.config.help import list_options
from int8run.config.measures import complete_measures
from int8run.config.named_files import check_named_files
from int8run.config.open_mappings import open_mappings
from int8run.config.renamed import old_names_in_files
from int8run.config.shared_files import checked_files
from int8run.errors import (
    ConfigError,
    find_int8run_error,
    suggest_setting,
)

if TYPE_CHECKING:
    from int8run.config.run_spec import RunSpec

# called with the number of jobs and the choices of the first
Announce = Callable[[int, dict[str, str]], None]
PRIMARY_CONFIG = "config"
GROUPS = (
    "task",
    "model",
    "model_type",
    "outlier",
    "rounding",
    "backend",
    "lora",
    "clip",
    "cache_steps",
    "sampler",
    "prompts",
    "metrics",
    "tracker",
)


@dataclass(frozen=True)
class SingleRun:
    """The one job of a command without a sweep, checked.

    Args:
        config: as hydra has composed it, hydra's part included.
        spec: made from it.
        loader: hydra's, which has composed it.
    """

    config: DictConfig
    spec: "RunSpec"
    loader: ConfigLoader


def check_command(
    overrides: Sequence[str],
    *,
    announce: Announce,
    config_dir: str | None = None,
    config_name: str = PRIMARY_CONFIG,
    multirun: bool = False,
) -> SingleRun | None:
    """Compose and check a single job; of a sweep, what its jobs share.

    The jobs themselves are checked when the sweep composes them, see `sweep_checks`.

    Args:
        overrides: of the command line.
        announce: called with the number of jobs and the choices of each group, before anything heavy is
            imported.
        config_dir: a folder with options of the user's.
        config_name: of the primary config.
        multirun: whether the command line has -m.

    Returns:
        The single job; None for a sweep.

    Raises:
        ConfigError: for settings that cannot work.
        FileError: for a file that is missing.
    """
    check_no_group_is_null(overrides, config_dir)
    with hydra_composition(config_dir) as loader:
        shared, jobs = compose_shared(overrides, config_name, multirun=multirun)
        check_targets(shared)
    check_one_option_each(overrides)
    announce_jobs(shared, overrides, jobs, announce)
    if jobs is not None:
        return None
    spec = create_run_spec(shared)
    if spec.resume and not spec.task.makes_runs:
        raise ConfigError(
            "resume=true goes on with a sweep or a search, and this is a single run; add -m, or leave "
            "resume out"
        )
    check_named_files(get_plain_config(shared))
    return SingleRun(shared, spec, loader)


def check_no_group_is_null(overrides: Sequence[str], config_dir: str | None) -> None:
    """Raise ConfigError for a group that is set to null; `config_dir` has further options to choose from."""
    for override in overrides:
        group, _, option = override.partition("=")
        if group in GROUPS and option == "null":
            raise ConfigError(describe_missing_option(group, None, config_dir))


def check_one_option_each(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a group that is given a list of options: hydra merges them, and the last wins."""
    for group in GROUPS:
        if any(override.startswith(f"{group}=[") for override in overrides):
            raise ConfigError(
                f"{group}=[…] names several options, and a run has one; for a job each: -m {group}=a,b"
            )


def announce_jobs(
    shared: DictConfig, overrides: Sequence[str], jobs: Sequence[Sequence[str]] | None, announce: Announce
) -> None:
    """Say how many jobs there are and what they are made from.

    Args:
        shared: the config of a single job, or what the jobs of a sweep share.
        overrides: of the command line, whose values with commas are shown for a sweep.
        jobs: the overrides of each; None for a single one.
        announce: see `check_command`.
    """
    choices: dict[str, str] = dict(shared.hydra.runtime.choices)
    if jobs is None:
        announce(1, choices)
        return
    for override in overrides:
        group, _, values = override.partition("=")
        if group in choices:
            choices[group] = values
    announce(len(jobs), choices)


def compose_jobs(
    overrides: Sequence[str],
    *,
    config_dir: str | None = None,
    config_name: str = PRIMARY_CONFIG,
    multirun: bool = False,
) -> tuple[list[list[str]], list[DictConfig]]:
    """Compose every job of a command line, and walk each config for what could run code.

    Args:
        overrides: of the command line.
        config_dir: a folder with options of the user's.
        config_name: of the primary config.
        multirun: whether the command line has -m.

    Returns:
        The overrides of each job, and its config.

    Raises:
        ConfigError: for a config that could run code.
    """
    check_no_group_is_null(overrides, config_dir)
    with hydra_composition(config_dir):
        _, jobs = compose_shared(overrides, config_name, multirun=multirun)
        if jobs is None:
            jobs = [list(overrides)]
        configs = [compose(config_name, job, return_hydra_config=True) for job in jobs]
    for config in configs:
        check_targets(config)
    return jobs, configs


@contextmanager
def hydra_composition(config_dir: str | None) -> Iterator[ConfigLoader]:
    """Hydra ready to compose our config, and afterwards as it was: a program around us may use it, too.

    Args:
        config_dir: a folder with options of the user's, behind those that ship.

    Yields:
        Hydra's loader.

    Raises:
        ConfigError: for a folder that is not there.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: no such folder (looked for {Path(config_dir).absolute()})"
        )
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3", job_name="int8run"):
        loader: Any = GlobalHydra.instance().config_loader()
        if config_dir is not None:
            # as hydra itself does for --config-dir
            loader.config_search_path.prepend(
                provider="command-line",
                path=f"file://{Path(config_dir).absolute()}",
                anchor=SearchPathQuery(provider="schema"),
            )
            loader.repository.initialize_sources(loader.config_search_path)
        yield loader


@contextmanager
def int8run_options() -> Iterator[None]:
    """Let `hydra/launcher=` and `hydra/sweeper=` choose between the files in conf/; hydra and its plugins
    have some of these names, too.

    Afterwards theirs are back: the program around us may be another one that uses hydra.
    """
    Plugins.instance()  # finds them
    groups = ConfigStore.instance().repo.get("hydra", {})
    taken = []
    for group in ("launcher", "sweeper"):
        for file in files("int8run.conf").joinpath("hydra", group).iterdir():
            if file.name in groups.get(group, {}):
                taken.append((group, file.name, groups[group].pop(file.name)))
    try:
        with checked_files(), open_mappings(), old_names_in_files():
            yield
    finally:
        for group, name, node in taken:
            groups[group][name] = node


def compose_shared(
    overrides: Sequence[str], config_name: str, *, multirun: bool
) -> tuple[DictConfig, list[list[str]] | None]:
    """Compose a single run, or what the jobs of a sweep share.

    Args:
        overrides: of the command line.
        config_name: of the primary config.
        multirun: whether the command line has -m.

    Returns:
        The config, and the overrides of each job of a sweep, one that a file describes included; None for a
        single run.
    """
    parser = OverridesParser.create()
    shared_overrides = list(overrides)
    if multirun:  # without -m, hydra refuses what only a sweep may have
        parsed = parser.parse_overrides(shared_overrides)
        shared_overrides = [override.input_line for override in parsed if not override.is_sweep_override()]
    shared = compose(config_name, shared_overrides, return_hydra_config=True)
    is_sweep = multirun or shared.hydra.mode is RunMode.MULTIRUN
    if not is_sweep:
        return shared, None

    check_targets(shared)
    params = shared.hydra.sweeper.get("params") or {}
    from_file = [f"{key}={values}" for key, values in params.items()]
    parsed = parser.parse_overrides([*from_file, *overrides])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return shared, [list(job) for job in jobs]


def create_run_spec(config: DictConfig) -> Any:
    """The RunSpec of a composed config; checks of ours come out as they were raised."""
    own = drop_hydra_settings(config)
    check_groups(own)
    complete_measures(own)
    settings: Any = OmegaConf.to_container(own, resolve=True)
    check_keys_of_hydra(settings)
    check_classes(settings)
    try:
        return instantiate(own, _convert_="all")
    except InstantiationException as error:
        ours = find_int8run_error(error)
        if ours is not None:
            raise ours from None
        raise ConfigError(describe_call_error(error, own)) from error


def check_groups(config: DictConfig) -> None:
    """Refuse a group that was left out, set to a bare value, or whose option names no class."""
    for group in (*GROUPS, "int8", "calibration"):
        node = config.get(group)
        if isinstance(node, DictConfig) and "_target_" in node:
            continue
        value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        raise ConfigError(describe_missing_option(group, value))


def describe_missing_option(group: str, value: object, config_dir: str | None = None) -> str:
    """The message for a group without an option.

    Args:
        group: of the command line.
        value: what it is instead; None: nothing.
        config_dir: a folder with options of the user's.
    """
    message = f"{group} is {value!r}, which names no class in _target_"
    options = list_options(group, config_dir=config_dir)
    if options:
        message += f"; choose from {', '.join(sorted(options))}"
    classes = list_option_classes(group)
    if classes and value is not None:
        message += f"; an option of yours begins with _target_: {' or '.join(classes)}"
    return message


def describe_call_error(error: InstantiationException, config: DictConfig) -> str:
    """One line for a class of ours that could not be made: the key, and what was wrong with its settings."""
    text = str(error)
    place = text.rpartition("full_key: ")[2].strip() if "full_key: " in text else ""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is None:
        reason = " ".join(str(error.__cause__ or error).partition("\n    full_key")[0].split())
        return f"{place or 'the config'}: {reason}"
    owner = get_class(OmegaConf.select(config, place)._target_)
    known = sorted(field.name for field in fields(owner))
    name = f"{place}.{unknown[1]}".lstrip(".")
    near = suggest_setting(name, known)
    return f"no setting called {name!r}; {near}choose from {', '.join(known)}"


def get_plain_config(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without hydra's own part."""
    resolved = OmegaConf.to_container(drop_hydra_settings(config), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def drop_hydra_settings(config: DictConfig) -> DictConfig:
    """The part of the config that is ours."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
