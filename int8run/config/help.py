"""`int8run --help`, made from the YAML files in conf/: an overview, and a page for each group.

Groups, options and settings are described by the comments beside them. Hydra's own page composes its config
once per group and takes several times as long. `cli.py` prints the pages; `error_messages.py` asks which
option has a setting. Nothing here composes or checks a config.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path

from int8run.config.plugins import iter_installed_plugins
from int8run.errors import ConfigError, suggest_similar

WIDTH = 120
ALL_PAGES = "all"
MAX_OPTION_CHARACTERS = 100_000  # of a file in a user's folder
KEY = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]\w*):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")
FIRST_GROUPS = ("task", "model")
DEFAULT = re.compile(r"^  - (?P<group>[a-z_]+): (?P<option>\w+)(?: +# (?P<comment>.*))?$", flags=re.MULTILINE)
NAME_WIDTH = 16
KEY_WIDTH = 44
OVERVIEW_WIDTH = 22


@dataclass(frozen=True)
class Setting:
    """A key of a YAML file that has a comment.

    Args:
        key: with its path.
        value: the default, as it is written.
        comment: what it is.
    """

    key: str
    value: str
    comment: str


@dataclass(frozen=True)
class Group:
    """A group of options.

    Args:
        name: as on the command line.
        default: the option that is used where none is named.
        description: what its options decide.
    """

    name: str
    default: str
    description: str


# hydra's own group, with our options
LAUNCHER = Group("hydra/launcher", default="basic", description="where the jobs of a sweep run")
# no group of which a run has one option: `metrics.perceptual` names as many as it likes
METRIC_TOPIC = "metric"
MEASURE_PREFIX = "metrics.measures."
# words of the command line that no file of conf/ has; `prompt_argument` turns them into settings of `prompts`
PROMPT_SETTINGS = (
    Setting("prompt", "'TEXT'", "what to generate, any text as it is; may be given several times"),
    Setting(
        "negative_prompt", "'TEXT'", "what images shall not show, any text, where the pipeline takes one"
    ),
)
USAGE = """\
int8run: build a diffusion model in INT8 (W8A8), generate, and measure it against the float model.

  int8run                                             the tiny model in this package, offline
  int8run prompt='red apple'                          a prompt of yours: any text
  int8run model=z_image_turbo prompt='red apple'      another model, from the hub
  int8run outlier=convrot backend=onednn              options of groups
  int8run lora=stack_a lora.adapters.0.strength=0.5   any setting of any option
  int8run -m lora=stack_a lora.strength=0,0.5,1       a sweep: one job per value, one page that compares them
  int8run task=inspect task.path=FILE.safetensors     what a file is
  int8run task=audit task.path=FILE task.base=FLOAT   a grade for a quantized file of anybody
"""
FLAGS = """\
Flags
  --help GROUP             options and settings of a group; `--help all`: of every group
  --version                the version of int8run
  -m, --multirun           run a sweep over comma-separated values
  --cfg job                print the composed config and stop
  --config-dir FOLDER      look for options of yours there too: FOLDER/<group>/<name>.yaml
  --hydra-help             hydra's own flags
"""


def render_help(topic: str | None = None, config_dir: str | None = None) -> str:
    """A page of help.

    Args:
        topic: a group, a section of config.yaml such as `cache`, `all`, or None for the overview.
        config_dir: a folder with options of the user's.

    Raises:
        ConfigError: for another topic.
    """
    if topic is None:
        return render_overview(config_dir)
    groups = {group.name: group for group in read_groups()}
    sections = list_sections()
    if topic == LAUNCHER.name.rpartition("/")[2]:
        topic = LAUNCHER.name
    if topic in groups:
        return render_group(groups[topic], config_dir)
    if topic in sections:
        return render_section(topic)
    if topic == METRIC_TOPIC:
        return render_metrics()
    if topic == ALL_PAGES:
        pages = [render_overview(config_dir)]
        pages += [render_section(section) for section in sections]
        pages += [render_group(group, config_dir) for group in groups.values()]
        pages.append(render_metrics())
        return "\n".join(pages)
    known = [*groups, *sections, METRIC_TOPIC, ALL_PAGES]
    raise ConfigError(
        f"--help {topic}: no group of that name; {suggest_similar(topic, known)}"
        f"choose from {', '.join(known)}"
    )


def render_overview(config_dir: str | None = None) -> str:
    """The first page: what groups and settings there are. It fits a screen.

    Args:
        config_dir: a folder with options of the user's.
    """
    lines = ["Groups, with the option that is used where none is named"]
    for group in read_groups():
        options = list_options(group.name, group.default, config_dir)
        text = f"{group.description}: {', '.join(options)}"
        if len(text) > WIDTH - OVERVIEW_WIDTH - 4:
            text = f"{group.description}; {len(options)} options"
        lines += format_row(f"{group.name}={group.default}", text, OVERVIEW_WIDTH)
    sections = list_sections()
    section_lines: list[str] = []
    setting_lines: list[str] = []
    for setting in [*PROMPT_SETTINGS, *read_own_settings()]:
        if setting.key in sections:
            section_lines += format_row(setting.key, setting.comment, OVERVIEW_WIDTH)
        elif "." not in setting.key:
            setting_lines += format_row(f"{setting.key}={setting.value}", setting.comment, OVERVIEW_WIDTH)
    lines += ["", "Sections of settings", *section_lines, "", "Settings", *setting_lines]
    lines += render_plugins()
    return "\n".join([USAGE, *lines, "", FLAGS])


def render_plugins() -> list[str]:
    """The lines about installed plug-ins; none where there are none."""
    rows: list[str] = []
    for plugin in iter_installed_plugins():
        options = [f"{group}={file.stem}" for group, file in plugin.list_options()]
        rows += format_row(plugin.name, ", ".join(options), OVERVIEW_WIDTH)
    if not rows:
        return []
    return ["", "Plug-ins that are installed; plugins=[NAME] brings their options", *rows]


def render_group(group: Group, config_dir: str | None = None) -> str:
    """The page of a group: its options, and what can be set with them.

    Args:
        group: the group.
        config_dir: a folder with options of the user's.
    """
    lines = [f"{group.name}=OPTION (default: {group.default})"]
    options = list_options(group.name, group.default, config_dir)
    width = max(NAME_WIDTH, *(len(name) for name in options))
    for name, file in options.items():
        lines += format_row(name, read_description(file), width)
    rows = list_group_rows(group, config_dir)
    if rows:
        lines += ["", "Settings (in brackets the options that have them, where the default has not)"]
    for label, text in rows:
        lines += format_row(label, text, KEY_WIDTH)
    return "\n".join(lines) + "\n"


def render_metrics() -> str:
    """The page of the metrics that `metrics.perceptual` can name, and of their settings."""
    lines = ["metrics.perceptual=[NAME,NAME]: metrics to add to those of every run"]
    metrics = list_options(METRIC_TOPIC)
    width = max(NAME_WIDTH, *(len(name) for name in metrics))
    for name, file in metrics.items():
        lines += format_row(name, read_description(file), width)
    lines += ["", "Settings"]
    for setting in list_measure_settings():
        lines += format_row(f"{setting.key}={setting.value}", setting.comment, KEY_WIDTH)
    return "\n".join(lines) + "\n"


def list_measure_settings() -> list[Setting]:
    """The settings of every metric, by their places in the config."""
    settings = []
    for name, file in list_options(METRIC_TOPIC).items():
        settings += parse_settings(read_option(file), f"{MEASURE_PREFIX}{name}.")
    return settings


def list_group_rows(group: Group, config_dir: str | None) -> list[tuple[str, str]]:
    """Label and description of all settings of a group.

    What the default option has comes first. Other options add what is their own, with the names of these
    options in brackets.
    """
    settings_by_option = read_option_settings(group.name, group.default, config_dir)
    default_settings = settings_by_option.pop(group.default)
    rows = [(f"{setting.key}={setting.value}", setting.comment) for setting in default_settings]
    known = {setting.key for setting in default_settings}
    owners: dict[Setting, list[str]] = {}
    for option, settings in settings_by_option.items():
        for setting in settings:
            if setting.key not in known:
                owners.setdefault(setting, []).append(option)
    for setting, options in owners.items():
        rows.append((f"{setting.key}={setting.value}", f"{setting.comment} [{', '.join(options)}]"))
    return rows


def render_section(section: str) -> str:
    """The page of a part of config.yaml, such as `cache`."""
    lines = []
    for setting in read_own_settings():
        if setting.key == section:
            lines.append(f"{section}: {setting.comment}")
        if setting.key.startswith(f"{section}."):
            lines += format_row(f"{setting.key}={setting.value}", setting.comment, KEY_WIDTH)
    return "\n".join(lines) + "\n"


def check_flags(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a setting that was given as a flag: `--lora stack_a`.

    Args:
        arguments: of the command line.
    """
    names = {group.name for group in read_groups()}
    names |= {setting.key for setting in read_own_settings()}
    for argument, following in pairwise([*arguments, ""]):
        if not argument.startswith("--"):
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        is_setting = name in names or name.partition(".")[0] in names
        if not is_setting:
            continue
        if not value and not following.startswith("-"):
            value = following
        raise ConfigError(f"{argument} is no flag; settings have no dashes: {name}={value or '…'}")


def format_row(label: str, text: str, label_width: int) -> list[str]:
    """The lines of a label and its description; a long label has a line of its own."""
    indent = " " * (label_width + 4)
    # a long word is a list of values, which is cut where it must
    first, *others = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    following = [indent + line for line in others]
    start = f"  {label:<{label_width}}  "
    if len(start) <= len(indent):
        return [(start + first).rstrip(), *following]
    labels = textwrap.wrap(label, WIDTH - 4, initial_indent="  ", subsequent_indent="      ")
    return [*labels, indent + first, *following]


def read_config() -> str:
    """The text of config.yaml."""
    return files("int8run.conf").joinpath("config.yaml").read_text(encoding="utf-8")


def read_own_settings() -> list[Setting]:
    """The settings of config.yaml, which belong to no group."""
    return parse_settings(read_config(), prefix="")


def read_groups() -> list[Group]:
    """Every group of config.yaml, the most used ones first, and the launchers of hydra."""
    groups = [
        Group(row["group"], row["option"], row["comment"] or "") for row in DEFAULT.finditer(read_config())
    ]
    # in config.yaml the model stands behind the groups of which it may choose an option
    groups.sort(key=lambda group: group.name not in FIRST_GROUPS)
    return [*groups, LAUNCHER]


def list_sections() -> list[str]:
    """The keys of config.yaml that have settings below them."""
    parents = [setting.key.partition(".")[0] for setting in read_own_settings() if "." in setting.key]
    return list(dict.fromkeys(parents))


def list_options(group: str, default: str = "", config_dir: str | None = None) -> dict[str, Traversable]:
    """The options of a group, and the file of each; none of an unknown group.

    Args:
        group: such as `model`, or `hydra/launcher`.
        default: the option that comes first.
        config_dir: a folder with options of the user's; one that is not there has none.
    """
    folders: list[Traversable] = [files("int8run.conf").joinpath(group)]
    if config_dir is not None:
        folders.append(Path(config_dir, group))
    found: dict[str, Traversable] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        for file in folder.iterdir():
            if file.name.endswith(".yaml"):  # of two with one name hydra takes the one that ships
                found.setdefault(file.name.removesuffix(".yaml"), file)
    names = sorted(found, key=lambda name: (name != default, name))
    return {name: found[name] for name in names}


def read_option_settings(
    group: str, default: str = "", config_dir: str | None = None
) -> dict[str, list[Setting]]:
    """The settings of each option of a group; see `list_options`."""
    settings_by_option = {}
    for name, file in list_options(group, default, config_dir).items():
        text = read_option(file)
        prefix = f"{group.replace('/', '.')}."
        if "@package _global_" in text:
            prefix = ""
        settings_by_option[name] = parse_settings(text, prefix)
    return settings_by_option


def find_options_with(key: str) -> list[str]:
    """The options that have a key which the composed config lacks: `backend.tile` -> `backend=triton`."""
    group = key.partition(".")[0]
    if key.startswith("hydra.launcher."):
        group = LAUNCHER.name
    options = []
    for name, settings in read_option_settings(group).items():
        keys = [setting.key for setting in settings]
        if any(own == key or own.startswith(f"{key}.") for own in keys):
            options.append(f"{group}={name}")
    return options


def read_option(file: Traversable) -> str:
    """The text of an option; of a file in a user's folder, which may be anything, the beginning."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(MAX_OPTION_CHARACTERS)


def read_description(file: Traversable) -> str:
    """The description of an option: the first comment line that is not a directive."""
    for line in read_option(file).splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and not comment.startswith("@"):
            return comment
    return ""


def parse_settings(text: str, prefix: str) -> list[Setting]:
    """Every key of a YAML text that has a comment.

    Args:
        text: the YAML; a level is two spaces.
        prefix: of the keys, with a dot at its end; empty for none.
    """
    settings: list[Setting] = []
    path: list[str] = []
    for line in text.splitlines():
        found = KEY.match(line)
        if found is None:
            continue
        depth = len(found["indent"]) // 2
        path = [*path[:depth], found["key"]]
        is_of_hydra = path[0] in ("defaults", "hydra")
        is_example = "adapters" in path[:-1]  # a LoRA of a stack
        if found["comment"] and not is_of_hydra and not is_example:
            settings.append(Setting(prefix + ".".join(path), found["value"].strip(), found["comment"]))
    return settings
