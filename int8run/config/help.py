"""`int8run --help`, made from the YAML files: groups, options with their first comment line, and keys.

Hydra's own page composes its config once per group and takes several times as long.
"""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable

LAUNCHER = ("hydra/launcher", "basic")  # hydra's own group, with our options
KEY = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]\w*):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")

USAGE = """\
int8run: build a diffusion model in INT8 (W8A8), generate, and measure it against the float model.

  int8run                                             the tiny model in this package, offline
  int8run model=flux lora=stack_a                     options of groups
  int8run lora=stack_a lora.adapters.0.strength=0.5   any key of any option
  int8run -m lora=stack_a lora.strength=0,0.5,1       a sweep: one job per value, one page that compares them
  int8run task=inspect task.path=FILE.safetensors     what a file is

"""
FLAGS = """\
Flags
  -m, --multirun           run a sweep over comma-separated values
  --cfg job                print the composed config and stop
  --config-dir FOLDER      look for options of yours there too: FOLDER/<group>/<name>.yaml
  --hydra-help             hydra's own flags
"""


def render_help() -> str:
    """The whole page."""
    conf = files("int8run.conf")
    root = conf.joinpath("config.yaml").read_text()
    groups = [*re.findall(r"^  - ([a-z_]+): (\w+)$", root, flags=re.MULTILINE), LAUNCHER]
    lines = ["Groups (default first)"]
    for group, default in groups:
        options = sorted(
            (f.name.removesuffix(".yaml"), f)
            for f in conf.joinpath(group).iterdir()
            if f.name.endswith(".yaml")
        )
        width = max(14, *(len(name) for name, _ in options))
        for name, file in sorted(options, key=lambda o: o[0] != default):
            lines.append(f"  {group if name == default else '':<14} {name:<{width}} {read_description(file)}")
    lines += ["", "Keys (in brackets the option that has them, where it is not the default)"]
    lines += [format_key_line(*found, "") for found in parse_key_comments(root, "")]
    for group, default in groups:
        found = read_option_keys(group, default)
        own = found.pop(default)
        lines += [format_key_line(*key, "") for key in own]
        plain = {key for key, _, _ in own}
        others: dict[tuple[str, str, str], list[str]] = {}
        for name, keys in found.items():  # others add what is their own
            for key in keys:
                if key[0] not in plain:
                    others.setdefault(key, []).append(name)
        lines += [format_key_line(*key, f" [{group}={','.join(names)}]") for key, names in others.items()]
    return USAGE + "\n".join(lines) + "\n\n" + FLAGS


def format_key_line(key: str, value: str, comment: str, owner: str) -> str:
    """One line of the list of keys."""
    return f"  {f'{key}={value}':<46} {comment}{owner}"


def read_option_keys(group: str, default: str = "") -> dict[str, list[tuple[str, str, str]]]:
    """The keys of each shipped option of a group, the default option first; empty for an unknown group."""
    folder = files("int8run.conf").joinpath(group)
    options = [f for f in folder.iterdir() if f.name.endswith(".yaml")] if folder.is_dir() else []
    found = {}
    for file in sorted(options, key=lambda f: (f.name != f"{default}.yaml", f.name)):
        text = file.read_text()
        found[file.name.removesuffix(".yaml")] = parse_key_comments(
            text, "" if "@package _global_" in text else f"{group.replace('/', '.')}."
        )
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


def parse_key_comments(text: str, prefix: str) -> list[tuple[str, str, str]]:
    """(key with its path, default, comment) for every commented key of a YAML text."""
    lines: list[tuple[str, str, str]] = []
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
