"""What a composed config may hold: plain values, classes of int8run, and log handlers that only write.

A shared YAML may not run code. Hydra instantiates callbacks, launchers and log handlers from the config, so
`compose.py` has the whole composed tree walked by `check_targets` before hydra does. Which of our own classes
may stand at which place is asked later, by `allowed_classes.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from int8run.config.allowed_classes import iterate_nodes, list_own_classes
from int8run.config.plugins import SETTING, list_plugin_classes, load_plugins
from int8run.errors import ConfigError, suggest_similar

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
LOG_SECTIONS = ("hydra.job_logging.", "hydra.hydra_logging.")
ENVIRONMENT = "hydra.job.env_set."
# keys under which Python's logging config names a class, or a function that makes a handler
LOG_CLASS_KEYS = ("class", "()", "factory")


def check_targets(config: DictConfig) -> None:
    """Refuse every `_target_` that is not one of ours, and every log handler that is not a plain one.

    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    check_key_types(tree)
    foreign = list_plugin_classes(load_plugins(tree.get(SETTING) or ()))
    for key, value in iterate_nodes(tree):
        if not isinstance(value, dict | list):
            check_value(key, value, foreign)


def check_value(key: str, value: object, foreign: Sequence[str] = ()) -> None:
    """Check one plain value of a composed config.

    Args:
        key: dotted path.
        value: as it is written, references unresolved.
        foreign: classes of plug-ins that may be named.

    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    # the dot makes `hydra.job_logging` itself, set to a reference, a part of it
    place = f"{key}."
    name = key.rpartition(".")[2]
    if name == "_target_":
        check_target(key, value, foreign)
    if place.startswith(LOG_SECTIONS):
        check_log_setting(key, name, value)
    check_resolvers(key, value)
    if place.startswith(ENVIRONMENT):
        raise ConfigError(
            f"{key} sets an environment variable; set it in your shell, so that a shared file cannot "
            "change programs"
        )


def check_key_types(tree: Mapping[Any, Any]) -> None:
    """Refuse settings whose names are no text, such as `1:` and `true:`, which would be left out unseen.

    Raises:
        ConfigError: naming the key and where it stands.
    """
    check_names(tree, "the config")
    for group, node in tree.items():
        if isinstance(node, dict):
            check_names(node, group)


def check_names(node: Mapping[Any, Any], place: str) -> None:
    """Raise ConfigError for a name in one mapping that is no text."""
    for name in node:
        if not isinstance(name, str):
            raise ConfigError(
                f"{place} has the key {name!r}, which YAML reads as something else than text; no setting "
                "is called so, remove it"
            )


def check_target(key: str, value: object, foreign: Sequence[str] = ()) -> None:
    """Raise ConfigError for a `_target_` that is not one of ours.

    Args:
        key: dotted path.
        value: of `_target_`.
        foreign: classes of plug-ins that may be named outside of hydra's part.
    """
    is_of_hydra = key.startswith("hydra.")
    allowed = HYDRA_TARGETS if is_of_hydra else list_own_classes()
    if value in allowed or (value in foreign and not is_of_hydra):
        return
    rule = "a config may only name classes of int8run, so that a shared file cannot run code"
    if foreign:
        rule = "a config may only name classes of int8run, and those of the options of its plug-ins"
    message = f"{key} is {value!r}; {rule}"
    near = suggest_similar(str(value), allowed).rstrip()
    if near and str(value).startswith("int8run."):
        message += f"; {near}"
    raise ConfigError(message)


def check_log_setting(key: str, name: str, value: object) -> None:
    """Raise ConfigError for a class, a file or a stream that a log has no use for.

    Args:
        key: dotted path in the logging config.
        name: its last part.
        value: plain.
    """
    # a reference may turn into a class
    may_name_class = name in LOG_CLASS_KEYS or (name != "filename" and "${" in str(value))
    if may_name_class and value not in LOG_CLASSES:
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
    has_other_resolver = not RESOLVERS.issuperset(RESOLVER.findall(value))
    if has_other_resolver or NESTED.search(value):
        raise ConfigError(
            f"{key} is {value!r}; its resolver could make any object, and a config may only name classes of "
            f"int8run; resolvers are limited to {', '.join(sorted(RESOLVERS))}"
        )
