"""Which settings a file of `--config-dir` may have: the tables, and the check of one file against them.

`shared_files.py` calls `check_settings` with the settings of each file at their place in the whole config.
The tables are the rules of SECURITY.md. Nothing here reads files or knows how hydra composes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException

from int8run.config.key_patterns import is_at, is_below
from int8run.errors import ConfigError
from int8run.generate.sample_inputs import INPUT_COLUMNS


@dataclass(frozen=True)
class CommandLineKey:
    """A setting that no file may set.

    Args:
        key: dotted path; `*` stands for one part.
        reason: what it could do, for the message.
        harmless: values that may stand in a file, such as a copy of the shipped one.
    """

    key: str
    reason: str
    harmless: tuple[object, ...] = (None,)


TRACKER_URI = "${oc.env:MLFLOW_TRACKING_URI,null}"  # as conf/tracker/mlflow.yaml has it
SLURM_FOLDER = "${hydra.sweep.dir}/.slurm"
COMMAND_LINE_KEYS = (
    CommandLineKey("tracker.uri", "it names the server that gets settings and images", (None, TRACKER_URI)),
    CommandLineKey("tracker.folder", "a database in it can send files to another machine", (None, ".")),
    CommandLineKey("cache.folder", "files in it are loaded, and removed when it is full"),
    CommandLineKey("plugins", "it imports code of an installed package", (None, [])),
    CommandLineKey("recipe", "its settings are read before any file, from the command line alone"),
    CommandLineKey("sync", "what is in that folder is sent to the tracker"),
    CommandLineKey("task.upload", "it sends a checkpoint to the hub", (None, False)),
    CommandLineKey("task.private", "it makes public what is uploaded", (None, True)),
    CommandLineKey("task.repo", "it names the repository that a checkpoint goes to"),
    CommandLineKey("hydra.launcher.address", "it hands the jobs to another cluster"),
    CommandLineKey("hydra.launcher.runtime_env", "it starts and installs programs"),
    CommandLineKey("hydra.launcher.include_dashboard", "it opens a web server", (None, False)),
    CommandLineKey("hydra.launcher.folder", "pickled results are read from it", (None, SLURM_FOLDER)),
    CommandLineKey("hydra.launcher.extra.mail_user", "it sends mail"),
    CommandLineKey("hydra.launcher.extra.mail-user", "it sends mail"),
)
# of hydra's own part the settings that a file may have; `*` at the end: and all below
HYDRA_KEYS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.output_subdir",
    "hydra.job_logging.*",
    "hydra.hydra_logging.*",
    "hydra.launcher.n_jobs",
    "hydra.launcher.gpus",
    "hydra.launcher.gpus.*",
    "hydra.launcher.threads",
    "hydra.launcher.num_cpus",
    "hydra.launcher.num_gpus",
    "hydra.launcher.resources",
    "hydra.launcher.resources.*",
    "hydra.launcher.workers",
    "hydra.launcher.partition",
    "hydra.launcher.time_min",
    "hydra.launcher.cpus",
    "hydra.launcher.mem_gb",
    "hydra.launcher.extra",
    "hydra.launcher.extra.*",
    "hydra.sweeper.params",
)
# only in a file of that group, which the command line alone can choose
HYDRA_OPTIONS = {"hydra.launcher._target_": "hydra/launcher/", "hydra.sweeper._target_": "hydra/sweeper/"}
SWEEP_PARAMS = "hydra.sweeper.params"
# files and folders: below the working folder, and not hidden, where programs keep passwords and settings
PATH_KEYS = (
    "save",
    "prompts.path",
    *(f"prompts.{column}" for column in INPUT_COLUMNS),
    *(f"prompts.{column}.*" for column in INPUT_COLUMNS),
    "task.path",
    "task.folder",
    "task.votes.*",
    "task.atlas.*",
    "metrics.measures.*.reference",
    "backend.table",
    "backend.candidates.*.table",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.output_subdir",
)
SHIPPED_SUBDIR = ".hydra"
# in a path of a file: their values have no slashes and no dots
SAFE_REFERENCE = re.compile(r"\$\{hydra\.job\.(num|id)\}")
DATE = re.compile(r"\$\{now:([^{}$]*)\}")
# variables of the environment that a file may refer to: none holds a password
HARMLESS_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HOME",
    "HOSTNAME",
    "LOGNAME",
    "OMP_NUM_THREADS",
    "PWD",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_PROCID",
    "TMPDIR",
    "USER",
    "XDG_CACHE_HOME",
)
VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*?)\s*[,}]")
HUB_ATTENTION = re.compile(r"hub", flags=re.IGNORECASE)  # diffusers' kernels that are code from the hub


# -- one setting after the other ---------------------------------------------------------------------


def check_settings(node: Any, key: str, file: str) -> None:
    """Check every setting below a key.

    Args:
        node: what stands at the key: a mapping, a list or a plain value.
        key: dotted path in the whole config; empty for all of it.
        file: for the message.

    Raises:
        ConfigError: naming the file, the key and the rule.
    """
    if key == SWEEP_PARAMS and isinstance(node, Mapping):
        check_sweep_params(node, file)
    elif isinstance(node, Mapping):
        for name, value in node.items():
            check_settings(value, join_key(key, name), file)
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            check_settings(value, join_key(key, index), file)
    else:
        check_setting(node, key, file)


def join_key(key: str, name: object) -> str:
    """The dotted path of what has this name below a key; at the top the key is empty."""
    return f"{key}.{name}" if key else str(name)


def check_setting(value: object, key: str, file: str) -> None:
    """Check one setting of a file.

    Args:
        value: plain, or an empty list.
        key: dotted path in the whole config.
        file: for the message.

    Raises:
        ConfigError: naming the file, the key and the rule.
    """
    rule = find_command_line_rule(key)
    if rule is not None and value in rule.harmless:
        return
    if rule is not None:
        raise refuse(file, key, rule.reason)
    check_mapping_reference(value, key, file)
    check_hydra_key(value, key, file)
    check_attention(value, key, file)
    if value is not None and matches_any(PATH_KEYS, key):
        check_path(value, key, file)
    if isinstance(value, str):
        check_variables(value, key, file)


def find_command_line_rule(key: str) -> CommandLineKey | None:
    """The rule of COMMAND_LINE_KEYS about a key or what it is a part of; None: there is none."""
    for rule in COMMAND_LINE_KEYS:
        if is_at(rule.key, key) or is_below(rule.key, key):
            return rule
    return None


def check_mapping_reference(value: object, key: str, file: str) -> None:
    """Raise ConfigError for a reference in the place of a mapping that has a key of the command line.

    What it refers to would come in unseen.
    """
    if not isinstance(value, str) or "${" not in value:
        return
    for rule in COMMAND_LINE_KEYS:
        if rule.key.startswith(f"{key}."):
            raise refuse(file, key, rule.reason)


def check_hydra_key(value: object, key: str, file: str) -> None:
    """Raise ConfigError for a setting of hydra's own part that is not on the list."""
    is_of_hydra = key == "hydra" or key.startswith("hydra.")
    if not is_of_hydra:
        return
    option_folder = HYDRA_OPTIONS.get(key)
    if option_folder is not None and file.startswith(option_folder):
        return
    # a reference to a mapping elsewhere, whose entries nobody has checked
    is_unseen = key == SWEEP_PARAMS and isinstance(value, str)
    if is_unseen or not matches_any(HYDRA_KEYS, key):
        raise refuse(file, key, "it decides where and how jobs run")


def check_attention(value: object, key: str, file: str) -> None:
    """Raise ConfigError for an attention kernel that is downloaded."""
    if key == "attention" and HUB_ATTENTION.search(str(value)):
        raise refuse(file, f"{key}={value}", "it runs code from the hub")


def check_path(value: object, key: str, file: str) -> None:
    """Raise ConfigError for a path that may lead out of the working folder, or to a hidden file."""
    if key == "hydra.output_subdir" and value == SHIPPED_SUBDIR:
        return
    without_safe_references = SAFE_REFERENCE.sub("0", str(value))
    text = DATE.sub(r"\1", without_safe_references)
    leaves_folder = text.startswith(("/", "~"))
    is_hidden = any(part.startswith(".") for part in PurePosixPath(text).parts)  # `..` as well
    if leaves_folder or is_hidden or "${" in text:
        raise ConfigError(
            f"{file} sets {key} to {value!r}; a file may name a path below the working folder, without '..', "
            f"'~', hidden parts and references; any other comes from the command line: {key}=…"
        )


def check_variables(text: str, key: str, file: str) -> None:
    """Raise ConfigError for a reference to a variable of the environment that may hold a password."""
    names = VARIABLE.findall(text)
    unknown = [name for name in names if name not in HARMLESS_VARIABLES]
    if len(names) < text.count("oc.env"):  # its name is put together at run time
        unknown.append(text)
    if unknown:
        name = unknown[0]
        raise ConfigError(
            f"{file} sets {key} to {text!r}; {name} may hold a password, and settings are kept and shown; a "
            f"file may refer to {', '.join(HARMLESS_VARIABLES)}; on the command line any variable may stand"
        )


# -- a sweep that is written in a file --------------------------------------------------------------


def check_sweep_params(params: Mapping[Any, Any], file: str) -> None:
    """Check a sweep that is written in a file: each entry is an override, and hydra takes it apart anew."""
    parser = OverridesParser.create()
    for key, values in params.items():
        check_variables(str(values), f"{SWEEP_PARAMS}.{key}", file)
        try:
            override = parser.parse_override(f"{key}={values}")
        except HydraException:
            continue  # hydra says what is wrong with it
        place = override.package or override.key_or_group.replace("/", ".")
        for value in list_choices(override._value):
            check_settings(value, place, file)


def list_choices(value: Any) -> list[Any]:
    """The values of an override as plain ones: of a sweep all of them."""
    if not isinstance(value, ChoiceSweep):
        return [unquote(value)]
    choices = []
    for item in value.list:
        choices += list_choices(item)
    return choices


def unquote(value: Any) -> Any:
    """A value of hydra's grammar without its quotes."""
    match value:
        case QuotedString():
            return value.text
        case dict():
            return {str(unquote(key)): unquote(item) for key, item in value.items()}
        case list():
            return [unquote(item) for item in value]
    return value


# -- keys and the message ----------------------------------------------------------------------------


def matches_any(patterns: Iterable[str], key: str) -> bool:
    """Whether a key is the one of one of the rules."""
    return any(matches(pattern, key) for pattern in patterns)


def matches(pattern: str, key: str) -> bool:
    """Whether a key is the one of a rule: `*` stands for one part, at the end for one or more."""
    parent, _, last = pattern.rpartition(".")
    if parent and last == "*":
        return is_below(parent, key)
    return is_at(pattern, key)


def refuse(file: str, key: str, reason: str) -> ConfigError:
    """The error for something that only the command line may have."""
    return ConfigError(
        f"{file} sets {key}; {reason}, and somebody else may have written the file: it comes from the "
        "command line alone"
    )
