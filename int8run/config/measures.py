"""Puts the YAML of each metric that a config asks for into the config, below the settings that it has there.

`conf/metric/` is no group of which a run chooses one option: `metrics.perceptual` names as many as it likes.
compose.py calls this before it checks classes and makes objects.
"""

from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from int8run.config.plugins import SETTING, load_plugins
from int8run.errors import ConfigError, suggest_similar
from int8run.metrics.metric_files import read_metric_files

MEASURES = "metrics.measures"
METRIC_GROUP = "metric"


def complete_measures(config: DictConfig) -> None:
    """Fill `metrics.measures` with the metrics of `metrics.perceptual`.

    Args:
        config: our part of a composed config; changed. A name that no file has is left to the check of
            `metrics.perceptual`.

    Raises:
        ConfigError: for settings of a metric that there is not, or that are no mapping.
    """
    files = list_metric_files(config)
    given = read_given_settings(config, files)
    names = OmegaConf.select(config, "metrics.perceptual")
    asked = list(names) if OmegaConf.is_list(names) else []
    completed = {}
    for name in [*asked, *given]:
        if isinstance(name, str) and name in files:
            completed[name] = {**files[name], **given.get(name, {})}
    with open_dict(config):
        OmegaConf.update(config, MEASURES, completed, merge=False)


def list_metric_files(config: DictConfig) -> Mapping[str, Mapping[str, Any]]:
    """What the YAML of each metric says, by its name; those of the config's plug-ins included."""
    found = dict(read_metric_files())
    for plugin in load_plugins(tuple(config.get(SETTING) or ())):
        for name, file in plugin.list_group(METRIC_GROUP).items():
            found[name] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def read_given_settings(
    config: DictConfig, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The settings of single metrics that a config has.

    Args:
        config: our part of it.
        files: what the metrics' own files say, by name.

    Raises:
        ConfigError: for a metric that there is not, and for what is no mapping.
    """
    node = OmegaConf.select(config, MEASURES)
    given: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{MEASURES} is {given!r}; it takes settings by metric: {{flip: {{…}}}}")
    settings_by_name: dict[str, dict[str, Any]] = given
    for name, settings in settings_by_name.items():
        if name not in files:
            near = suggest_similar(str(name), files)
            raise ConfigError(f"{MEASURES} has {name!r}; {near}choose from {', '.join(files)}")
        if not isinstance(settings, dict):
            raise ConfigError(f"{MEASURES}.{name} is {settings!r}; it takes settings by their names")
    return settings_by_name
