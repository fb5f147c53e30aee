"""The backends that ship, read from their YAML: what an error message can recommend."""

import importlib
from importlib.resources import files

import torch
import yaml

from int8run.backends.base import Limits


def usable_here(device: torch.device) -> list[str]:
    """Names of the backends that can run on this device, as the command line knows them."""
    usable = []
    for option in sorted(files("int8run.conf").joinpath("backend").iterdir(), key=lambda f: f.name):
        if option.name.endswith(".yaml"):
            module, _, name = yaml.safe_load(option.read_text())["_target_"].rpartition(".")
            limits: Limits = getattr(importlib.import_module(module), name).limits
            if not limits.refuse(device):
                usable.append(option.name.removesuffix(".yaml"))
    return usable
