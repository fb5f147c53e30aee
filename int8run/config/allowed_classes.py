"""Which class may stand where in a config: each group takes the classes of its own options.

The options that ship are the list, so an option that is added to `conf/` brings its class along. What hydra
does with a class besides making it (`_partial_` and the like) is refused by name: nothing here wants it.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from int8run.config.key_patterns import is_at
from int8run.config.plugins import SETTING, TARGET, Plugin, list_plugin_classes, load_plugins
from int8run.errors import ConfigError, suggest_similar

KEYS_OF_HYDRA = ("_partial_", "_recursive_", "_args_", "_convert_")
# classes inside an option: dotted path, where `*` stands for one part -> the group whose classes they are
NESTED_OPTIONS = {
    "outlier.candidates.*": "outlier",
    "backend.candidates.*": "backend",
    "backend.last_resort": "backend",
    "model_type.families.*": "model_type",
    "model.sampling": "sampler",
    "metrics.measures.*": "metric",
}
# or the classes themselves
NESTED_CLASSES = {
    "": ("int8run.config.run_spec.RunSpec",),
    "int8": ("int8run.layers.plan.Int8Settings",),
    "calibration": ("int8run.generate.calibration_settings.CalibrationSettings",),
    "cache": ("int8run.utils.disk_cache.DiskCache",),
    "prompts.hub": ("int8run.generate.prompt_sources.HubPrompts",),
    "metrics.intervals": ("int8run.metrics.interval_settings.IntervalSettings",),
    "lora.adapters.*": ("int8run.lora.config.Adapter",),
    "backend.tile": ("int8run.backends.triton.parse_tile",),
    "backend.candidates.*.tile": ("int8run.backends.triton.parse_tile",),
}


def check_classes(tree: Mapping[str, Any]) -> None:
    """Refuse a class that stands where another kind of thing is wanted.

    Args:
        tree: our part of the config, resolved.

    Raises:
        ConfigError: naming the key, the class and those that may stand there.
    """
    plugins = load_plugins(tree.get(SETTING) or ())
    for key, node in iterate_nodes(tree):
        if not isinstance(node, Mapping) or "_target_" not in node:
            continue
        name = str(node["_target_"])
        allowed = list_allowed_classes(key, plugins)
        if name in allowed:
            continue
        where = f"{key}._target_".lstrip(".")
        if not allowed:
            raise ConfigError(f"{where} is {name!r}, and {key} takes a value and no class")
        raise ConfigError(
            f"{where} is {name!r}; {suggest_similar(name, allowed)}allowed here: {', '.join(allowed)}"
        )


def check_keys_of_hydra(tree: object) -> None:
    """Raise ConfigError for a key that makes hydra do something else with a class than make it."""
    for key, node in iterate_nodes(tree):
        if not isinstance(node, Mapping):
            continue
        found = [name for name in KEYS_OF_HYDRA if name in node]
        if found:
            where = f"{key}.{found[0]}".lstrip(".")
            raise ConfigError(
                f"{where} stands in the config; of hydra's special keys an option may have _target_ alone, "
                "and settings by their names"
            )


def iterate_nodes(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """A tree of mappings and lists, and everything in it, each with its dotted path."""
    yield key, node
    if isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return
    for name, value in items:
        yield from iterate_nodes(value, f"{key}.{name}".lstrip("."))


def list_allowed_classes(key: str, plugins: Sequence[Plugin] = ()) -> tuple[str, ...]:
    """The classes that may stand at a place in the config; none where a value is wanted.

    Args:
        key: the place.
        plugins: of the config.
    """
    is_group = key != "" and "." not in key
    if is_group and list_option_classes(key):
        return list_option_classes(key) + list_plugin_classes(plugins, key)
    for pattern, group in NESTED_OPTIONS.items():
        if is_at(pattern, key):
            return list_option_classes(group) + list_plugin_classes(plugins, group)
    for pattern, classes in NESTED_CLASSES.items():
        if is_at(pattern, key):
            return classes
    return ()


@functools.cache
def list_option_classes(group: str) -> tuple[str, ...]:
    """The classes of a group's shipped options: the first that each file names."""
    options = sorted((Path(str(files("int8run.conf"))) / group).glob("*.yaml"))
    found = set()
    for file in options:
        first = TARGET.search(file.read_text(encoding="utf-8"))
        if first is not None:
            found.add(first[1])
    return tuple(sorted(found))


@functools.cache
def list_own_classes() -> frozenset[str]:
    """Every class that the shipped YAML names. A prefix would not do: `int8run.cli.os.system` has it too."""
    found: set[str] = set()
    for file in Path(str(files("int8run.conf"))).rglob("*.yaml"):
        found.update(TARGET.findall(file.read_text(encoding="utf-8")))
    return frozenset(target for target in found if target.startswith("int8run."))
