"""The YAML files of metrics in `conf/metric/`, read without importing what they name.

`metrics.catalog` imports the classes; composing a config asks for the files alone.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

METRIC_FOLDER = Path(__file__).parents[1] / "conf" / "metric"
TARGET = "_target_"


@functools.cache
def read_metric_files() -> Mapping[str, Mapping[str, Any]]:
    """What each YAML in `conf/metric/` says, by the name of the metric."""
    settings_by_name = {}
    for file in sorted(METRIC_FOLDER.glob("*.yaml")):
        settings_by_name[file.stem] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return settings_by_name
