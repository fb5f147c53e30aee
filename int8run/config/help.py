"""`int8run --help`, made from the YAML files in conf/: an overview, and a page for each group.

Groups, options and settings are described by the comments beside them. Hydra's own page composes its config
once per group and takes several times as long.
"""

import re
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

from int8run.errors import ConfigError, suggest_similar

WIDTH = 120
LAUNCHER = ("hydra/launcher", "basic")  # hydra's own group, with our options
LAUNCHER_DESCRIPTION = "where the jobs of a sweep run"
ALL_PAGES = "all"
# key with its path, default value, comment
KeyComment = tuple[str, str, str]
KEY = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]\w*):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")
DEFAULT = re.compile(r"^  - (?P<group>[a-z_]+): (?P<option>\w+)(?: +# (?P<comment>.*))?$", flags=re.MULTILINE)
NAME_WIDTH = 16
KEY_WIDTH = 44
OVERVIEW_WIDTH = 22

USAGE = """\
int8run: build a diffusion model in INT8 (W8A8), generate, and measure it against the float model.

  int8run                                             the tiny model in this package, offline
  int8run prompt='red apple'                          a prompt of yours: any text
  int8run model=flux lora=stack_a                     options of groups
  int8run lora=stack_a lora.adapters.0.strength=0.5   any setting of any option
  int8run -m lora=stack_a lora.strength=0,0.5,1       a sweep: one job per value, one page that compares them
  int8run task=inspect task.path=FILE.safetensors     what a file is
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


def render_help(topic: str | None = None) -> str:
    """A page of help.

    Args:
        topic: a group, a section of config.yaml such as `cache`, `all`, or None for the overview.

    Raises:
        ConfigError: for another topic.
    """
    if topic is None:
        return render_overview()
    groups = {group: default for group, default, _ in read_groups()}
    sections = list_sections()
    launcher_group = LAUNCHER[0]
    if topic == launcher_group.rpartition("/")[2]:
        topic = launcher_group
    if topic in groups:
        return render_group(topic, groups[topic])
    if topic in sections:
        return render_section(topic)
    if topic == ALL_PAGES:
        pages = [render_overview()]
        pages += [render_section(section) for section in sections]
        pages += [render_group(group, default) for group, default in groups.items()]
        return "\n".join(pages)
    known = [*groups, *sections, ALL_PAGES]
    raise ConfigError(
        f"--help {topic}: no group of that name; {suggest_similar(topic, known)}"
        f"choose from {', '.join(known)}"
    )


def render_overview() -> str:
    """The first page: what groups and settings there are. It fits a screen."""
    lines = ["Groups, with the option that is used where none is named"]
    for group, default, description in read_groups():
        options = list_options(group, default)
        label = f"{group}={default}"
        text = f"{description}: {', '.join(options)}"
        if len(text) > WIDTH - OVERVIEW_WIDTH - 4:
            text = f"{description}; {len(options)} options"
        lines += format_row(label, text, OVERVIEW_WIDTH)
    sections = list_sections()
    section_lines: list[str] = []
    setting_lines: list[str] = []
    for key, value, comment in parse_key_comments(read_config(), ""):
        if key in sections:
            section_lines += format_row(key, comment, OVERVIEW_WIDTH)
        elif "." not in key:
            setting_lines += format_row(f"{key}={value}", comment, OVERVIEW_WIDTH)
    lines += ["", "Sections of settings", *section_lines, "", "Settings", *setting_lines]
    return "\n".join([USAGE, *lines, "", FLAGS])


def render_group(group: str, default: str) -> str:
    """The page of a group: its options, and what can be set with them."""
    folder = files("int8run.conf").joinpath(group)
    lines = [f"{group}=OPTION (default: {default})"]
    options = list_options(group, default)
    width = max(NAME_WIDTH, *(len(name) for name in options))
    for name in options:
        lines += format_row(name, read_description(folder.joinpath(f"{name}.yaml")), width)
    keys = list_group_keys(group, default)
    if keys:
        lines += ["", "Settings (in brackets the options that have them, where the default has not)"]
    for key, value, comment, owners in keys:
        lines += format_row(f"{key}={value}", f"{comment}{owners}", KEY_WIDTH)
    return "\n".join(lines) + "\n"


def list_group_keys(group: str, default: str) -> list[tuple[str, str, str, str]]:
    """Key, default value, comment, and in brackets its options, of all settings of a group.

    What the default option has comes first; other options add what is their own.
    """
    option_keys = read_option_keys(group, default)
    default_keys = option_keys.pop(default)
    rows = [(key, value, comment, "") for key, value, comment in default_keys]
    known = {key for key, _, _ in default_keys}
    owners: dict[KeyComment, list[str]] = {}
    for name, keys in option_keys.items():
        for key_comment in keys:
            if key_comment[0] not in known:
                owners.setdefault(key_comment, []).append(name)
    for (key, value, comment), names in owners.items():
        rows.append((key, value, comment, f" [{', '.join(names)}]"))
    return rows


def render_section(section: str) -> str:
    """The page of a part of config.yaml, such as `cache`."""
    comments = parse_key_comments(read_config(), "")
    title = next(comment for key, _, comment in comments if key == section)
    lines = [f"{section}: {title}"]
    for key, value, comment in comments:
        if key.startswith(f"{section}."):
            lines += format_row(f"{key}={value}", comment, KEY_WIDTH)
    return "\n".join(lines) + "\n"


def check_flags(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a setting that was given as a flag: `--lora stack_a`.

    Args:
        arguments: of the command line.
    """
    names = {group for group, _, _ in read_groups()} | {
        key for key, _, _ in parse_key_comments(read_config(), "")
    }
    for number, argument in enumerate(arguments):
        name, _, value = argument.removeprefix("--").partition("=")
        is_setting = name in names or name.partition(".")[0] in names
        if not argument.startswith("--") or not is_setting:
            continue
        following = [word for word in arguments[number + 1 : number + 2] if not word.startswith("-")]
        example = value or (following[0] if following else "…")
        raise ConfigError(f"{argument} is no flag; settings have no dashes: {name}={example}")


def format_row(label: str, text: str, label_width: int) -> list[str]:
    """The lines of a label and its description; a long label has a line of its own."""
    indent = " " * (label_width + 4)
    # a long word is a list of values, which is cut where it must
    wrapped = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    first = f"  {label:<{label_width}}  "
    if len(first) > len(indent):
        labels = textwrap.wrap(label, WIDTH - 4, initial_indent="  ", subsequent_indent="      ")
        return [*labels, *(indent + line for line in wrapped)]
    return [(first + wrapped[0]).rstrip(), *(indent + line for line in wrapped[1:])]


def read_config() -> str:
    """The text of config.yaml."""
    return files("int8run.conf").joinpath("config.yaml").read_text()


def read_groups() -> list[tuple[str, str, str]]:
    """Name, default option and description of every group."""
    found = [(row["group"], row["option"], row["comment"] or "") for row in DEFAULT.finditer(read_config())]
    return [*found, (*LAUNCHER, LAUNCHER_DESCRIPTION)]


def list_sections() -> list[str]:
    """The keys of config.yaml that have settings below them."""
    keys = [key for key, _, _ in parse_key_comments(read_config(), "")]
    parents = [key.partition(".")[0] for key in keys if "." in key]
    return list(dict.fromkeys(parents))


def list_options(group: str, default: str) -> list[str]:
    """The shipped options of a group, the default first; none of an unknown group."""
    folder = files("int8run.conf").joinpath(group)
    if not folder.is_dir():
        return []
    names = [file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")]
    return sorted(names, key=lambda name: (name != default, name))


def read_option_keys(group: str, default: str = "") -> dict[str, list[KeyComment]]:
    """The keys of each shipped option of a group, the default option first; empty for an unknown group."""
    folder = files("int8run.conf").joinpath(group)
    found = {}
    for name in list_options(group, default):
        text = folder.joinpath(f"{name}.yaml").read_text()
        prefix = "" if "@package _global_" in text else f"{group.replace('/', '.')}."
        found[name] = parse_key_comments(text, prefix)
    return found


def find_options_with(key: str) -> list[str]:
    """The options that have a key which the composed config lacks: `backend.tile` -> `backend=triton`."""
    group = LAUNCHER[0] if key.startswith("hydra.launcher.") else key.partition(".")[0]
    options = []
    for name, rows in read_option_keys(group).items():
        keys = [row[0] for row in rows]
        if any(own == key or own.startswith(f"{key}.") for own in keys):
            options.append(f"{group}={name}")
    return options


def read_description(file: Traversable) -> str:
    """The description of an option: the first comment line that is not a directive."""
    comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if not c.startswith("@")), "")


def parse_key_comments(text: str, prefix: str) -> list[KeyComment]:
    """(key with its path, default, comment) for every commented key of a YAML text."""
    lines: list[KeyComment] = []
    path: list[str] = []
    for line in text.splitlines():
        found = KEY.match(line)
        if not found:
            continue
        depth = len(found["indent"]) // 2
        path = [*path[:depth], found["key"]]
        if path[0] in ("defaults", "hydra") or "adapters" in path[:-1] or not found["comment"]:
            continue
        lines.append((prefix + ".".join(path), found["value"].strip(), found["comment"]))
    return lines
