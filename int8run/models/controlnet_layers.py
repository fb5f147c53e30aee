"""Which layers of a ControlNet stay float: data of `controlnet_layers.yaml`, before the rules of its family.

`pipeline.controlnets` asks before it quantizes. No code knows the class of a ControlNet.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from int8run.models.family import IgnoreRule, ModelFamily

CONTROLNET_LAYERS_FILE = Path(__file__).with_name("controlnet_layers.yaml")
# where a pipeline has several ControlNets, diffusers keeps them in a list of this name
IN_A_LIST = "nets.[0-9]."


@functools.cache
def load_controlnet_rules() -> tuple[IgnoreRule, ...]:
    """Read the file."""
    facts = yaml.safe_load(CONTROLNET_LAYERS_FILE.read_text(encoding="utf-8"))
    return tuple(IgnoreRule(**rule) for rule in facts["ignore"])


def add_controlnet_rules(family: ModelFamily, *, is_list: bool) -> ModelFamily:
    """The family of a denoiser as that of its ControlNet, which has layers of its own besides.

    Args:
        family: of the denoiser.
        is_list: whether the component is a list of several ControlNets.
    """
    rules: Sequence[IgnoreRule] = (*load_controlnet_rules(), *family.ignore)
    if is_list:
        rules = [IgnoreRule(IN_A_LIST + rule.pattern, rule.reason) for rule in rules]
    return replace(family, ignore=rules)
