"""Before the first job starts: compose every job, refuse foreign code in the config, check every value.

A shared YAML may not run code. Hydra instantiates callbacks, launchers and log handlers from the config, so
the whole composed tree is walked before hydra does.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from int8run.config.allowed_classes import (
    check_classes,
    check_keys_of_hydra,
    iterate_nodes,
    list_option_classes,
    list_own_classes,
)
from int8run.config.named_files import check_named_files
from int8run.config.open_mappings import open_mappings
from int8run.config.renamed import old_names_in_files
from int8run.config.shared_files import checked_files
from int8run.errors import ConfigError, FileError, Int8RunError, find_int8run_error, suggest_similar
from int8run.utils.paths import expand_path

# called with the number of jobs and the choices of the first
Announce = Callable[[int, dict[str, str]], None]
GROUPS = (
    "task",
    "model",
    "model_type",
    "outlier",
    "rounding",
    "backend",
    "lora",
    "clip",
    "sampler",
    "prompts",
    "metrics",
    "tracker",
)
# a resolver such as oc.create makes mappings that are not in the tree yet when it is walked
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
NESTED = re.compile(r"\$\{[^{}:]*\$\{")  # a name put together at run time
RESOLVERS = {"oc.env", "now", "hydra"}
# our sweeper and launchers, under the names that hydra wants
HYDRA_TARGETS = (
    "hydra_plugins.int8run.Grid",
    "hydra_plugins.int8run.InProcess",
    "hydra_plugins.int8run.Processes",
    "hydra_plugins.int8run.RayCluster",
    "hydra_plugins.int8run.Slurm",
)
LOG_CLASSES = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.Formatter",
    "rich.logging.RichHandler",
    "int8run.report.console.ConsoleHandler",
    "int8run.report.console.FileFormatter",
    "int8run.report.console.MaskingFormatter",
)
LOG_FILE = re.compile(r"\$\{hydra\.runtime\.output_dir\}/(\$\{hydra\.job\.name\}|[\w-]+)\.log")
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_command(
    config_dir: str | None, config_name: str, overrides: list[str], multirun: bool, announce: Announce
) -> tuple[DictConfig, Any] | None:
    """Compose, target-check and range-check a single job; of a sweep, what its jobs share: they are checked
    when the sweep composes them.

    Args:
        announce: called with the number of jobs and the choices of each group, before anything heavy is
            imported.

    Returns:
        The config of a single job, hydra's part included, and its RunSpec; None for a sweep.

    Raises:
        ConfigError: for settings that cannot work.
    """
    several = next((group for group in GROUPS if any(o.startswith(f"{group}=[") for o in overrides)), None)
    with hydra_composition(config_dir, overrides) as extra:
        shared, jobs = compose_shared(overrides, extra, config_name, multirun)
        check_targets(shared)
    if several is not None:  # hydra merges them, and the last one wins
        raise ConfigError(
            f"{several}=[…] names several options, and a run has one; for a job each: -m {several}=a,b"
        )
    swept = {} if jobs is None else dict(word.partition("=")[::2] for word in overrides)
    choices = {group: swept.get(group, option) for group, option in shared.hydra.runtime.choices.items()}
    announce(1 if jobs is None else len(jobs), choices)
    if jobs is not None:
        return None
    if shared.get("resume"):
        raise ConfigError(
            "resume=true goes on with a sweep, and this is a single run; add -m, or leave resume out"
        )
    spec = create_run_spec(shared)
    check_named_files(get_plain_config(shared))
    return shared, spec


def check_jobs(jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[Any]:
    """Target-check and range-check every job of a sweep before the first one starts.

    Args:
        jobs: the overrides of each.
        configs: composed from them.

    Returns:
        The RunSpec of each job.

    Raises:
        ConfigError: one bad job: its message; several: one line for each.
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
        raise ConfigError(list_problems(jobs, problems))
    check_saved_files(specs)
    return specs


def check_saved_files(specs: Sequence[Any]) -> None:
    """Raise ConfigError where jobs of a sweep would write different weights to one file, `save=`."""
    build_keys: dict[Path, set[str]] = {}
    for spec in specs:
        if spec.save is not None:
            path = expand_path(spec.save).absolute()
            build_keys.setdefault(path, set()).add(spec.build_key)
    for path, keys in build_keys.items():
        if len(keys) > 1:
            raise ConfigError(
                f"save={path} is one file for {len(keys)} models that this sweep makes, and the last would "
                "replace the others; run a command for each, with a file of its own"
            )


def check_files_of_jobs(jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> None:
    """Refuse a sweep of which no job can find its files. One that can runs; the others fail as they start.

    Args:
        jobs: the overrides of each.
        configs: composed from them.

    Raises:
        FileError: where each job names a file that is missing.
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
    raise FileError(list_problems(jobs, problems))


def list_problems(jobs: Sequence[Sequence[str]], problems: Sequence[tuple[int, Int8RunError]]) -> str:
    """The message for a sweep that is not started: a line for each job that cannot run.

    Args:
        jobs: the overrides of each.
        problems: numbers of jobs, and why they cannot run.
    """
    common = set.intersection(*(set(job) for job in jobs))
    names = [" ".join(word for word in job if word not in common) for job in jobs]
    lines = [f"  job {number} ({names[number]}): {error}" for number, error in problems]
    return "\n".join([f"{len(problems)} of {len(jobs)} jobs cannot run; none was started", *lines])


def compose_jobs(
    config_dir: str | None, config_name: str, overrides: list[str], multirun: bool
) -> tuple[list[list[str]], list[DictConfig]]:
    """The overrides and the composed config of every job, each walked for what could run code."""
    with hydra_composition(config_dir, overrides) as extra:
        jobs = compose_shared(overrides, extra, config_name, multirun)[1] or [overrides]
        configs = [compose(config_name, [*job, *extra], return_hydra_config=True) for job in jobs]
    for config in configs:
        check_targets(config)
    return jobs, configs


@contextmanager
def hydra_composition(config_dir: str | None, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Hydra ready to compose our config.

    Returns:
        the words to add to each job's, for a folder of the user's.

    Raises:
        ConfigError: for a folder that is not there, and for a group that is set to null.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: no such folder (looked for {Path(config_dir).absolute()})"
        )
    for group in (
        o.removesuffix("=null")
        for o in overrides
        if o.endswith("=null") and o.removesuffix("=null") in GROUPS
    ):
        raise ConfigError(describe_missing_option(group, None))
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3", job_name="int8run"):
        yield [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]


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
    overrides: list[str], extra: list[str], config_name: str, multirun: bool
) -> tuple[DictConfig, list[list[str]] | None]:
    """Compose a single run, or what the jobs of a sweep share.

    Args:
        overrides: of the command line.
        extra: more words for every job, from `hydra_composition`.
        config_name: of the primary config.
        multirun: whether the command line has -m.

    Returns:
        The config, and the overrides of each job of a sweep, one that a file describes included; None for a
        single run.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    single = [text for text, o in zip(overrides, parsed, strict=True) if not o.is_sweep_override()]
    # without -m, hydra refuses what only a sweep may have
    composed = single if multirun else overrides
    shared = compose(config_name, [*composed, *extra], return_hydra_config=True)
    if not multirun and (shared.hydra.mode is None or shared.hydra.mode.name != "MULTIRUN"):
        return shared, None
    check_targets(shared)
    written = [f"{key}={value}" for key, value in (shared.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*written, *overrides])
    return shared, [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def create_run_spec(config: DictConfig) -> Any:
    """The RunSpec of a composed config; checks of ours come out as they were raised."""
    own = drop_hydra_settings(config)
    check_groups(own)
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
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigError(
                describe_missing_option(
                    group, OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
                )
            )


def describe_missing_option(group: str, value: object) -> str:
    """The message for a group without an option."""
    there = sorted((Path(str(files("int8run.conf"))) / group).glob("*.yaml"))
    classes = list_option_classes(group)
    choices = f"; choose from {', '.join(p.stem for p in there)}" if there else ""
    own = (
        f"; an option of yours begins with _target_: {' or '.join(classes)}"
        if classes and value is not None
        else ""
    )
    return f"{group} is {value!r}, which names no class in _target_{choices}{own}"


def describe_call_error(error: InstantiationException, config: DictConfig) -> str:
    """One line for a class of ours that could not be made: the key, and what was wrong with its settings."""
    text = str(error)
    where = text.rpartition("full_key: ")[2].strip() if "full_key: " in text else ""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        cls = get_class(OmegaConf.select(config, where)._target_)
        known = [field.name for field in fields(cls)]
        name = f"{where}.{unknown[1]}".lstrip(".")
        return (
            f"no setting called {name!r}; {suggest_similar(unknown[1], known)}choose "
            f"from {', '.join(sorted(known))}"
        )
    reason = " ".join(str(error.__cause__ or error).partition("\n    full_key")[0].split())
    return f"{where or 'the config'}: {reason}"


def get_plain_config(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without hydra's own part."""
    resolved = OmegaConf.to_container(drop_hydra_settings(config), resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def drop_hydra_settings(config: DictConfig) -> DictConfig:
    """The part of the config that is ours."""
    return OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])


def check_targets(config: DictConfig) -> None:
    """Refuse every `_target_` that is not one of ours, and every log handler that is not a plain one.

    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    check_key_types(tree)
    for key, value in iterate_nodes(tree):
        if isinstance(value, dict | list):
            continue
        name = key.rpartition(".")[2]
        if name == "_target_":
            check_target(key, value)
        # the dot makes `hydra.job_logging` itself, set to a reference, a part of it
        if f"{key}.".startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
            check_log_setting(key, name, value)
        check_resolvers(key, value)
        if f"{key}.".startswith("hydra.job.env_set."):
            raise ConfigError(
                f"{key} sets an environment variable; set it in your shell, so that a shared file cannot "
                "change programs"
            )


def check_key_types(tree: Mapping[Any, Any]) -> None:
    """Refuse settings whose names are no text, such as `1:` and `true:`, which would be left out unseen.

    Raises:
        ConfigError: naming the key and where it stands.
    """
    for group, node in {"the config": tree, **tree}.items():
        for key in node if isinstance(node, dict) else ():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{group} has the key {key!r}, which YAML reads as something else than text; no setting "
                    "is called so, remove it"
                )


def check_target(key: str, value: object) -> None:
    """Raise ConfigError for a `_target_` that is not one of ours."""
    allowed = HYDRA_TARGETS if key.startswith("hydra.") else list_own_classes()
    if value in allowed:
        return
    rule = "a config may only name classes of int8run, so that a shared file cannot run code"
    near = suggest_similar(str(value), allowed).rstrip() if str(value).startswith("int8run.") else ""
    hint = f"; {near}" if near else ""
    raise ConfigError(f"{key} is {value!r}; {rule}{hint}")


def check_log_setting(key: str, name: str, value: object) -> None:
    """Raise ConfigError for a class, a file or a stream that a log has no use for.

    Args:
        key: dotted path in the logging config.
        name: its last part.
        value: plain.
    """
    names_class = name in ("class", "()", "factory") or (name != "filename" and "${" in str(value))
    if names_class and value not in LOG_CLASSES:
        raise ConfigError(f"{key} is {value!r}; log handlers are limited to {', '.join(LOG_CLASSES)}")
    if name == "filename" and not LOG_FILE.fullmatch(str(value)):
        raise ConfigError(
            f"{key} is {value!r}; log files are limited to the job's own folder: "
            "${hydra.runtime.output_dir}/NAME.log"
        )
    is_reference = isinstance(value, str) and value.startswith(("ext://", "cfg://"))
    if is_reference and value not in LOG_STREAMS:
        raise ConfigError(f"{key} is {value!r}; log streams are limited to {', '.join(LOG_STREAMS)}")


def check_resolvers(key: str, value: object) -> None:
    """Raise ConfigError for a reference that omegaconf resolves with anything but RESOLVERS."""
    if not isinstance(value, str):
        return
    if set(RESOLVER.findall(value)) - RESOLVERS or NESTED.search(value):
        raise ConfigError(
            f"{key} is {value!r}; its resolver could make any object, and a config may only name classes of "
            f"int8run; resolvers are limited to {', '.join(sorted(RESOLVERS))}"
        )
