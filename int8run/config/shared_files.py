"""Every file of `--config-dir` is checked as hydra reads it.

Somebody else may have written it, so it describes an experiment and no more.

Whatever starts a program, loads code, writes or reads outside of the working folder, or reaches another
machine comes from the command line alone: `shared_settings.py` has the rules, SECURITY.md explains them. A
file is checked where hydra has put its settings into the config, whatever folder, `@package` line or defaults
list brought them there, and before anything is made from them. `int8run_options` of compose.py opens
`checked_files` around each composition.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import GroupDefault, InputDefault, ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from int8run.config.shared_settings import check_settings, refuse
from int8run.config.yaml_bounds import MAX_CHARACTERS, check_yaml_text
from int8run.errors import ConfigError

# what is not foreign: our own options and hydra's
SHIPPED_SOURCES = ("pkg://int8run.conf", "pkg://hydra.", "structured://")
MISSING = "???"  # of omegaconf, for a value that has to be given


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
    assert isinstance(tree, dict)
    entries = tree.get("defaults", [])
    is_list = isinstance(entries, list)
    if not is_list or not all(is_defaults_entry(entry) for entry in entries):
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
    if not isinstance(group, str) or group == "":
        return False
    options = option if isinstance(option, list) else [option]
    return all(isinstance(name, str | None) for name in options)


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
    parts = package.split(".") if package else []
    node = tree
    for part in parts:
        if not isinstance(node, dict):
            return tree
        node = node.get(part)
    if isinstance(node, dict):
        node.pop("defaults", None)
    return tree


def check_defaults_entry(entry: InputDefault, file: str) -> None:
    """Check one entry of a file's defaults list.

    Args:
        entry: as hydra has read it: a group and its option, or another file.
        file: for the message.

    Raises:
        ConfigError: for an option of hydra's own groups, and for a path that leaves the folder.
    """
    if isinstance(entry, GroupDefault):
        group, value = str(entry.group), entry.value
    else:
        group, value = str(getattr(entry, "path", "")), None
    package = entry.package or ""
    path = locate_group(group, file)
    is_of_hydra = path.parts[:1] == ("hydra",) or "hydra" in package.split(".")
    if is_of_hydra and not builds_on_own_group(path, package, file):
        raise refuse(file, f"{path} in its defaults list", "it decides where and how jobs run")

    options = [value] if isinstance(value, str | None) else list(value)
    leaves_folder = any(".." in PurePosixPath(str(name)).parts for name in (group, *options))
    has_reference = "${" in group or "${" in package
    if leaves_folder or has_reference:
        raise ConfigError(
            f"{file} has {group!r} in its defaults list; name a group and an option, without '..' and "
            "without a reference"
        )


def locate_group(group: str, file: str) -> PurePosixPath:
    """The path of a group that a defaults list names, relative to its file unless it begins with a slash."""
    if group.startswith("/"):
        return PurePosixPath(group.lstrip("/"))
    return PurePosixPath(file).parent / group


def builds_on_own_group(path: PurePosixPath, package: str, file: str) -> bool:
    """Whether an entry names an option of the group that its file is in, at its usual place.

    An option of a launcher may build on another one: the command line has chosen the launcher.
    """
    folder = PurePosixPath(file).parent
    return not package and len(folder.parts) > 1 and path.is_relative_to(folder)
