"""Before the first job starts: compose every job, refuse foreign code in the config, check every value.

A shared YAML may not run code. Hydra instantiates callbacks, launchers and log handlers from the config, so the whole
composed tree is walked before hydra does.
"""

import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from int8run.errors import ConfigError, Int8RunError, suggest

TARGET = re.compile(r"_target_: *([\w.]+)")
# what hydra and its launcher plugins name themselves
HYDRA_TARGETS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
LOG_CLASSES = (
    "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter", "rich.logging.RichHandler",
)  # fmt: skip
LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_all(
    config_dir: str | None, config_name: str, overrides: list[str], multirun: bool, announce: Callable[[int, dict[str, str]], None]
) -> None:
    """Compose, target-check and range-check every job.

    Args:
        announce: called with the number of jobs and the choices of the first, before anything heavy is imported.

    Raises:
        ConfigError: one bad job: its message; several: one line for each.
    """
    extra = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder (looked for {Path(config_dir).absolute()})")
        extra = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    with initialize_config_module("int8run.conf", version_base="1.3", job_name="int8run"):
        jobs = split_jobs(overrides) if multirun else [overrides]
        configs = [compose(config_name, [*job, *extra], return_hydra_config=True) for job in jobs]
    for config in configs:
        refuse_foreign_targets(config)
    announce(len(jobs), dict(configs[0].hydra.runtime.choices))
    problems: list[tuple[int, Int8RunError]] = []
    for number, config in enumerate(configs):
        try:
            to_spec(config)
        except Int8RunError as error:
            problems.append((number, error))
    if problems and len(jobs) == 1:
        raise problems[0][1]
    if problems:
        lines = [f"  job {number} ({' '.join(jobs[number])}): {error}" for number, error in problems]
        raise ConfigError("\n".join([f"{len(problems)} of {len(jobs)} jobs cannot run; none was started", *lines]))


def split_jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a multirun, as hydra's basic sweeper makes them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        # a sweeper other than the basic one decides; its jobs are checked as they come
        return [[text for text, o in zip(overrides, parsed, strict=True) if not o.is_sweep_override()]]
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def to_spec(config: DictConfig) -> Any:
    """The RunSpec of a composed config; checks of ours come out as they were raised."""
    try:
        return instantiate(without_hydra(config), _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Int8RunError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{str(error).splitlines()[-1]}: {reason}") from error


def plain_config(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without hydra's own part."""
    resolved = OmegaConf.to_container(without_hydra(config), resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of the config that is ours."""
    return OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])


def refuse_foreign_targets(config: DictConfig) -> None:
    """Refuse every `_target_` that is not one of ours, and every log handler that is not a plain one.

    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    tree = OmegaConf.to_container(config, resolve=False)
    own = own_targets()
    for path, key, value in leaves(tree, ""):
        where = f"{path}{key}"
        if key == "_target_":
            allowed = HYDRA_TARGETS if where.startswith("hydra.") else own
            if value not in allowed:
                raise ConfigError(
                    f"{where} is {value!r}; {suggest(str(value), allowed)}a config may only name the classes that int8run's own "
                    "YAML names, so that a shared file cannot run code"
                )
        in_logging = where.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        if in_logging and key in ("class", "()", "factory") and value not in LOG_CLASSES:
            raise ConfigError(f"{where} is {value!r}; log handlers are limited to {', '.join(LOG_CLASSES)}")
        if in_logging and isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in LOG_STREAMS:
            raise ConfigError(f"{where} is {value!r}; log streams are limited to {', '.join(LOG_STREAMS)}")


def own_targets() -> frozenset[str]:
    """Every class that the shipped YAML names. A prefix would not do: `int8run.cli.os.system` has it too."""
    conf = Path(str(files("int8run.conf")))
    return frozenset(t for file in conf.rglob("*.yaml") for t in TARGET.findall(file.read_text()))


def leaves(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path with a dot at its end, key, value) of every leaf of a tree of dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path, str(key), value
