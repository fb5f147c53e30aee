"""The metrics that ship: the class that each YAML in `conf/metric/` names.

`metrics.names` has their names and directions from here, `metrics.settings` their defaults. Importing this
module imports their files, which load libraries and weights only when a metric is computed.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import replace

from int8run.metrics.base import Measure, MeasureClass, Metric
from int8run.metrics.metric_files import TARGET, read_metric_files


@functools.cache
def load_measure_classes() -> Mapping[str, MeasureClass]:
    """The class of each metric that ships, by its name."""
    classes = {}
    for name, settings in read_metric_files().items():
        module, _, class_name = settings[TARGET].rpartition(".")
        classes[name] = getattr(importlib.import_module(module), class_name)
    return classes


def build_measure(name: str) -> Measure:
    """A metric that ships, with the settings of its YAML."""
    settings = {key: value for key, value in read_metric_files()[name].items() if key != TARGET}
    measure: Measure = load_measure_classes()[name](**settings)
    return measure


def describe_measured(measures: Mapping[str, Measure | MeasureClass]) -> dict[str, Metric]:
    """What some metrics add to a run, by public name, each with the metric that adds it."""
    described = {}
    for name, measure in measures.items():
        for public_name, metric in measure.metrics.items():
            described[public_name] = replace(metric, measure=name)
    return described
