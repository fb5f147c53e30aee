"""Plug-ins: installed packages that bring options of their own, named on the command line: `plugins=[NAME]`.

A plug-in is an entry point of the group `int8run.plugins` whose value is a package with a folder `conf`, laid
out as int8run's own. Its options may name classes of that package and of int8run, no others. `cli` calls
`add_plugin_options`, `allowed_classes` and `measures` ask for what the plug-ins of a config bring. No file
can name one: importing a package runs its code, and what does that comes from the command line alone.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.resources import files
from pathlib import Path

from int8run.errors import ConfigError, suggest_similar
from int8run.utils.text import shorten_error

ENTRY_POINTS = "int8run.plugins"
SETTING = "plugins"
OVERRIDE = re.compile(r"\+*plugins=(?P<value>.*)", flags=re.DOTALL)
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
TARGET = re.compile(r"_target_: *([\w.]+)")
OPTIONS_FOLDER = "conf"
# what a plug-in may bring options of; what starts jobs, tasks and servers is int8run's own
GROUPS = (
    "backend",
    "cache_steps",
    "lora",
    "metric",
    "metrics",
    "model",
    "model_type",
    "outlier",
    "prompts",
    "rounding",
    "sampler",
)


@dataclass(frozen=True)
class Plugin:
    """An installed package that brings options.

    Args:
        name: of its entry point.
        package: the top package, whose classes its options may name.
        folder: with its options.
    """

    name: str
    package: str
    folder: Path

    def list_options(self) -> list[tuple[str, Path]]:
        """The group and the file of each option."""
        options = []
        for file in sorted(self.folder.rglob("*.yaml")):
            group = file.parent.relative_to(self.folder).as_posix()
            options.append((group, file))
        return options

    def list_group(self, group: str) -> dict[str, Path]:
        """The files of a group by the names of the options."""
        return {file.stem: file for own_group, file in self.list_options() if own_group == group}


# -- names on the command line -----------------------------------------------------------------------


def add_plugin_options(overrides: Sequence[str]) -> list[str]:
    """The overrides, with the folders of the plug-ins that they name where hydra looks for options.

    Args:
        overrides: of the command line.

    Raises:
        ConfigError: for a plug-in that there is not, that fails, or that takes an option of int8run's.
    """
    names = read_plugin_names(overrides)
    if not names:
        return list(overrides)
    paths = [quote(f"file://{plugin.folder.absolute()}") for plugin in load_plugins(names)]
    return [*overrides, f"hydra.searchpath=[{','.join(paths)}]"]


def quote(text: str) -> str:
    """A text as hydra's grammar reads it back unchanged."""
    from hydra.core.override_parser.types import Quote, QuotedString  # the help does without hydra

    quoted: str = QuotedString(text, Quote.single).with_quotes()
    return quoted


def read_plugin_names(overrides: Sequence[str]) -> tuple[str, ...]:
    """The names in `plugins=[…]`; none without it.

    Args:
        overrides: of the command line.

    Raises:
        ConfigError: for what is no list of names, and for one that stands there twice.
    """
    values = [found["value"] for found in map(OVERRIDE.fullmatch, overrides) if found is not None]
    if not values:
        return ()
    value = values[-1].strip()
    if not (value.startswith("[") and value.endswith("]")):
        raise ConfigError(f"plugins={value} is no list; give the names in brackets: plugins=[{value}]")
    names = [name.strip(" '\"") for name in value[1:-1].split(",")]
    names = [name for name in names if name]
    check_plugin_names(names)
    return tuple(names)


def check_plugin_names(names: object) -> None:
    """Raise ConfigError for what is no list of names, each once."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(
            f"plugins is {names!r}; it takes a list of installed plug-ins: plugins=[my_package]"
        )
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"plugins has {name!r}, which is no name of a plug-in; give letters and digits")
        if list(names).count(name) > 1:
            raise ConfigError(f"plugins has {name!r} twice; name each plug-in once")


# -- installed packages ------------------------------------------------------------------------------


def load_plugins(names: Sequence[str]) -> list[Plugin]:
    """Import plug-ins, and check what they bring.

    Args:
        names: of entry points.

    Raises:
        ConfigError: for one that there is not, that fails, or that takes an option that there is already.
    """
    check_plugin_names(names)
    plugins = [load_plugin(name) for name in names]
    owners: dict[tuple[str, str], str] = {}
    for plugin in plugins:
        for group, file in plugin.list_options():
            check_option(plugin, group, file)
            owner = owners.setdefault((group, file.stem), plugin.name)
            if owner != plugin.name:
                raise ConfigError(
                    f"the plug-ins {owner} and {plugin.name} both bring {group}={file.stem}; name one of them"
                )
    return plugins


@functools.cache
def load_plugin(name: str) -> Plugin:
    """Import one plug-in, once: later jobs of a sweep ask again.

    Raises:
        ConfigError: for one that there is not, or that fails.
    """
    entry_point = find_entry_point(name)
    try:
        module = importlib.import_module(entry_point.module)
    except Exception as error:  # whatever a package of somebody else raises
        reason = f"{type(error).__name__}: {shorten_error(error)}"
        raise ConfigError(
            f"the plug-in {name} cannot be imported ({reason}); mend its package, or leave it out of plugins"
        ) from error
    folder = find_options_folder(entry_point)
    if folder is None:
        raise ConfigError(
            f"the plug-in {name} has no options: there is no folder {OPTIONS_FOLDER}/ in {module.__name__}; "
            "see docs/plugins.md"
        )
    return Plugin(name, entry_point.module.partition(".")[0], folder)


def find_entry_point(name: str) -> EntryPoint:
    """The entry point of a plug-in.

    Raises:
        ConfigError: where there is none of that name.
    """
    installed = {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINTS)}
    if name in installed:
        return installed[name]
    try:
        distribution(name)
    except (PackageNotFoundError, ValueError):
        known = ", ".join(sorted(installed)) or "none"
        raise ConfigError(
            f"plugins names {name!r}, which is not installed; {suggest_similar(name, installed)}installed "
            f"plug-ins: {known}; install it with pip, or leave it out"
        ) from None
    raise ConfigError(
        f"plugins names {name!r}, and the package of that name is no plug-in: it has no entry point in the "
        f"group {ENTRY_POINTS}; see docs/plugins.md"
    )


def find_options_folder(entry_point: EntryPoint) -> Path | None:
    """The folder of a plug-in's options; None where there is none. Its package is not imported."""
    top, _, rest = entry_point.module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(
        next(iter(spec.submodule_search_locations)), *rest.split(".") if rest else (), OPTIONS_FOLDER
    )
    return folder if folder.is_dir() else None


def iter_installed_plugins() -> Iterator[Plugin]:
    """The plug-ins that are installed and have options, without importing them; for the help."""
    for entry_point in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry_point: entry_point.name):
        folder = find_options_folder(entry_point)
        if folder is not None:
            yield Plugin(entry_point.name, entry_point.module.partition(".")[0], folder)


def suggest_plugin(group: str, option: str) -> str:
    """`; the installed plug-in example has it: plugins=[example]` for an option of one; else nothing.

    Args:
        group: of the option.
        option: that was not found.
    """
    for plugin in iter_installed_plugins():
        if option in plugin.list_group(group):
            return f"; the installed plug-in {plugin.name} has it: plugins=[{plugin.name}]"
    return ""


def check_option(plugin: Plugin, group: str, file: Path) -> None:
    """Raise ConfigError for an option of a group that no plug-in may have, and for a taken name.

    Args:
        plugin: whose option it is.
        group: of the option.
        file: of the option.
    """
    if group not in GROUPS:
        shown = "the top of conf/" if group == "." else group
        raise ConfigError(
            f"the plug-in {plugin.name} brings {file.name} in {shown}; a plug-in has options of "
            f"{', '.join(GROUPS)}"
        )
    if files("int8run.conf").joinpath(group, file.name).is_file():
        raise ConfigError(
            f"the plug-in {plugin.name} brings {group}={file.stem}, which int8run has itself; it needs "
            "another name"
        )


# -- what the plug-ins of a config bring -------------------------------------------------------------


def list_plugin_classes(plugins: Sequence[Plugin], group: str | None = None) -> tuple[str, ...]:
    """The classes of their own packages that the options of plug-ins name.

    Args:
        plugins: loaded.
        group: whose options; None: all.
    """
    found = []
    for plugin in plugins:
        for own_group, file in plugin.list_options():
            if group not in (None, own_group):
                continue
            for target in TARGET.findall(file.read_text(encoding="utf-8")):
                if target.startswith(f"{plugin.package}."):
                    found.append(target)
    return tuple(sorted(set(found)))
