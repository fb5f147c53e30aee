"""What a file of `--config-dir` may set. Somebody else may have written it, so it describes an experiment and
no more.

Whatever starts a program, loads code, writes or reads outside of the working folder, or reaches another
machine comes from the command line alone: the tables below are the rules, SECURITY.md explains them. A file
is checked where hydra has put its settings into the config, whatever folder, `@package` line or defaults list
brought them there, and before anything is made from them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import GroupDefault, InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from int8run.config.key_patterns import is_at, is_below
from int8run.config.yaml_bounds import MAX_CHARACTERS, check_yaml_text
from int8run.errors import ConfigError

# what is not foreign: our own options and hydra's
SHIPPED_SOURCES = ("pkg://int8run.conf", "pkg://hydra.", "structured://")


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
    CommandLineKey("sync", "what is in that folder is sent to the tracker"),
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
MISSING = "???"  # of omegaconf, for a value that has to be given
SWEEP_PARAMS = "hydra.sweeper.params"
# files and folders: below the working folder, and not hidden, where programs keep passwords and settings
PATH_KEYS = (
    "save",
    "prompts.path",
    "task.path",
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


@contextmanager
def checked_files() -> Iterator[None]:
    """Let hydra read files on disk, such as those of `--config-dir`, only where they keep to these rules."""
    source_class = SourcesRegistry.instance().types["file"]
    read_file = source_class.load_config
    place_settings = ConfigLoaderImpl._load_single_config
    if getattr(place_settings, "checks_files", False):  # we are inside another such block
        yield
        return

    def read_checked_file(source: Any, config_path: str) -> ConfigResult:
        file = Path(source.path, config_path).with_suffix(".yaml")
        check_text(file)
        try:
            result = read_file(source, config_path)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits
            reason = " ".join(str(error).split())
            raise ConfigError(f"{file} cannot be read as YAML: {reason}") from error
        check_defaults_list(result.config, file)
        return result

    def place_checked_settings(loader: Any, default: ResultDefault, repo: Any) -> ConfigResult:
        result = place_settings(loader, default, repo)
        if not str(result.path).startswith(SHIPPED_SOURCES):
            check_placed_file(result, default)
        return result

    place_checked_settings.checks_files = True  # type: ignore[attr-defined]
    source_class.load_config = read_checked_file
    ConfigLoaderImpl._load_single_config = place_checked_settings
    try:
        yield
    finally:
        source_class.load_config = read_file
        ConfigLoaderImpl._load_single_config = place_settings


# -- a file as it is read ----------------------------------------------------------------------------


def check_text(file: Path) -> None:
    """Raise ConfigError for a file that is no text of a reasonable size; a missing one is left to hydra."""
    if not file.is_file():
        return
    size = file.stat().st_size
    if size > 4 * MAX_CHARACTERS:  # bytes of UTF-8
        raise ConfigError(f"{file} has {size:,} bytes; a config has at most {MAX_CHARACTERS:,} characters")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}") from error
    check_yaml_text(text, file)


def check_defaults_list(config: Any, file: Path) -> None:
    """Raise ConfigError for a defaults list that hydra does not take."""
    if not isinstance(config, DictConfig):
        return
    tree = OmegaConf.to_container(config, resolve=False)
    entries = tree.get("defaults", []) if isinstance(tree, dict) else []
    if not isinstance(entries, list) or not all(map(is_defaults_entry, entries)):
        raise ConfigError(
            f"{file}: defaults is {entries!r}; it is a list of options, such as [basic, _self_] or "
            "[{override /outlier: convrot}]"
        )


def is_defaults_entry(entry: object) -> bool:
    """Whether hydra takes a value as an entry of a defaults list: a name, or a group and its option."""
    if isinstance(entry, str):
        return entry not in ("", MISSING)
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((group, option),) = entry.items()
    names = option if isinstance(option, list) else [option]
    is_group = isinstance(group, str) and group != ""
    return is_group and all(name is None or isinstance(name, str) for name in names)


# -- a file where its settings are in the config -----------------------------------------------------


def check_placed_file(result: ConfigResult, default: ResultDefault) -> None:
    """Check the defaults list and the settings of a file.

    Args:
        result: with the settings at their place in the whole config.
        default: which file it is, and where its settings are.

    Raises:
        ConfigError: naming the file, the key and the rule.
    """
    file = f"{str(default.config_path).removesuffix('.yaml')}.yaml"
    for entry in result.defaults_list or ():
        check_defaults_entry(entry, file)
    tree = OmegaConf.to_container(result.config, resolve=False)
    check_settings(drop_defaults_list(tree, default.package), "", file)


def drop_defaults_list(tree: Any, package: str | None) -> Any:
    """The settings of a file without its defaults list, which hydra takes out later.

    Args:
        tree: the settings at their place in the whole config.
        package: that place.
    """
    node = tree
    for part in filter(None, (package or "").split(".")):
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop("defaults", None)
    return tree


def check_defaults_entry(entry: InputDefault, file: str) -> None:
    """Raise ConfigError for an entry of a defaults list that chooses an option of hydra's own groups."""
    if isinstance(entry, GroupDefault):
        group, value = str(entry.group), entry.value
    else:
        group, value = str(getattr(entry, "path", "")), None
    options = [value] if isinstance(value, str | None) else list(value)
    package = entry.package or ""
    folder = PurePosixPath(file).parent
    path = PurePosixPath(group.lstrip("/")) if group.startswith("/") else folder / group
    is_of_hydra = path.parts[:1] == ("hydra",) or "hydra" in package.split(".")
    # an option of a launcher may build on another one: the command line has chosen the launcher
    is_same_group = not package and len(folder.parts) > 1 and path.is_relative_to(folder)
    if is_of_hydra and not is_same_group:
        raise refuse(file, f"{path} in its defaults list", "it decides where and how jobs run")
    leaves_folder = any(".." in PurePosixPath(str(name)).parts for name in (group, *options))
    if leaves_folder or "${" in group or "${" in package:
        raise ConfigError(
            f"{file} has {group!r} in its defaults list; name a group and an option, without '..' and "
            "without a reference"
        )


def check_settings(node: Any, key: str, file: str) -> None:
    """Check every setting below a key.

    Raises:
        ConfigError: naming the file, the key and the rule.
    """
    if key == SWEEP_PARAMS and isinstance(node, Mapping):
        check_sweep_params(node, file)
        return
    prefix = f"{key}." if key else ""
    if isinstance(node, Mapping):
        for name, value in node.items():
            check_settings(value, f"{prefix}{name}", file)
        return
    if isinstance(node, list) and node:
        for index, value in enumerate(node):
            check_settings(value, f"{prefix}{index}", file)
        return
    check_setting(node, key, file)


def check_setting(value: object, key: str, file: str) -> None:
    """Check one setting of a file.

    Args:
        value: plain, or an empty list.
        key: dotted path in the whole config.
        file: for the message.

    Raises:
        ConfigError: naming the file, the key and the rule.
    """
    for rule in COMMAND_LINE_KEYS:
        is_key = is_at(rule.key, key) or is_below(rule.key, key)
        # a reference in the place of a mapping: what it refers to would come in unseen
        is_mapping_by_reference = rule.key.startswith(f"{key}.") and isinstance(value, str) and "${" in value
        if (is_key and value not in rule.harmless) or is_mapping_by_reference:
            raise refuse(file, key, rule.reason)
        if is_key:
            return
    check_hydra_key(value, key, file)
    if value is not None and any(matches(pattern, key) for pattern in PATH_KEYS):
        check_path(value, key, file)
    if key == "attention" and HUB_ATTENTION.search(str(value)):
        raise refuse(file, f"{key}={value}", "it runs code from the hub")
    if isinstance(value, str):
        check_variables(value, key, file)


def check_hydra_key(value: object, key: str, file: str) -> None:
    """Raise ConfigError for a setting of hydra's own part that is not on the list."""
    if key != "hydra" and not key.startswith("hydra."):
        return
    if key in HYDRA_OPTIONS and file.startswith(HYDRA_OPTIONS[key]):
        return
    is_unseen = key == SWEEP_PARAMS and isinstance(value, str)  # a reference to a mapping elsewhere
    if is_unseen or not any(matches(pattern, key) for pattern in HYDRA_KEYS):
        raise refuse(file, key, "it decides where and how jobs run")


def check_path(value: object, key: str, file: str) -> None:
    """Raise ConfigError for a path that may lead out of the working folder, or to a hidden file."""
    if key == "hydra.output_subdir" and value == SHIPPED_SUBDIR:
        return
    text = DATE.sub(r"\1", SAFE_REFERENCE.sub("0", str(value)))
    parts = PurePosixPath(text).parts
    is_inside = not text.startswith(("/", "~")) and not any(part.startswith(".") for part in parts)
    if not is_inside or "${" in text:
        raise ConfigError(
            f"{file} sets {key} to {value!r}; a file may name a path below the working folder, without '..', "
            f"'~', hidden parts and references; any other comes from the command line: {key}=…"
        )


def check_variables(text: str, key: str, file: str) -> None:
    """Raise ConfigError for a reference to a variable of the environment that may hold a password."""
    count = text.count("oc.env")
    names = VARIABLE.findall(text)
    unknown = [name for name in names if name not in HARMLESS_VARIABLES]
    if unknown or len(names) < count:
        name = unknown[0] if unknown else text
        raise ConfigError(
            f"{file} sets {key} to {text!r}; {name} may hold a password, and settings are kept and shown; a "
            f"file may refer to {', '.join(HARMLESS_VARIABLES)}; on the command line any variable may stand"
        )


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
    if isinstance(value, ChoiceSweep):
        return [choice for item in value.list for choice in list_choices(item)]
    return [unquote(value)]


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


def matches(pattern: str, key: str) -> bool:
    """Whether a key is the one of a rule: `*` stands for one part, at the end for one or more."""
    place, dot, last = pattern.rpartition(".")
    return is_below(place, key) if dot and last == "*" else is_at(pattern, key)


def refuse(file: str, key: str, reason: str) -> ConfigError:
    """The error for something that only the command line may have."""
    return ConfigError(
        f"{file} sets {key}; {reason}, and somebody else may have written the file: it comes from the "
        "command line alone"
    )
