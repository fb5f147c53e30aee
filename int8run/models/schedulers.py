"""Gives a pipeline the scheduler that the settings name.

Called before images are generated: a sweep may change the scheduler of a pipeline that is loaded already.
Which scheduler a few-step LoRA needs is decided elsewhere.
"""

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from int8run.errors import ConfigError, suggest_similar
from int8run.models.sampling import Sampling
from int8run.utils.text import shorten_error


def set_scheduler(pipe: DiffusionPipeline, original: Any, sampling: Sampling) -> None:
    """Give the pipeline the scheduler that the sampling names, made from the config of its original one.

    Args:
        pipe: is changed.
        original: the scheduler that the checkpoint has.
        sampling: without a scheduler and settings of one, the pipeline gets its original one back.

    Raises:
        ConfigError: for a class that diffusers does not have, or a setting that the class does not have.
    """
    if sampling.scheduler is None and not sampling.scheduler_settings:
        pipe.register_modules(scheduler=original)
        return
    name = sampling.scheduler or type(original).__name__
    check_scheduler(name, original)
    cls: Any = getattr(diffusers, name)
    check_settings(name, sampling.scheduler_settings, list_parameters(cls))
    try:
        pipe.register_modules(scheduler=cls.from_config(original.config, **sampling.scheduler_settings))
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = shorten_error(error)
        raise ConfigError(f"sampler.scheduler={name} does not take these settings: {reason}") from error


def check_scheduler(name: str, original: Any) -> None:
    """Raise ConfigError unless diffusers has a scheduler of this name; the message lists those that fit."""
    if is_scheduler(name):
        return
    is_listed = name in dir(diffusers)
    reason = "needs a library that is not there" if is_listed else "is not a scheduler of diffusers"
    known = list_compatible_schedulers(original)
    raise ConfigError(
        f"sampler.scheduler={name} {reason}; {suggest_similar(name, known)}choose from {', '.join(known)}"
    )


def check_settings(scheduler: str, settings: Any, known: set[str]) -> None:
    """Raise ConfigError for a setting that a scheduler does not have."""
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"sampler.scheduler_settings.{key} is not a setting of {scheduler}; "
                f"choose from {', '.join(sorted(known))}"
            )


def list_compatible_schedulers(original: Any) -> list[str]:
    """Return the schedulers that a pipeline made for the original one can use.

    These take their steps in the same way, and add noise in the same way (flow matching or not).
    """
    needed = list_parameters(original.set_timesteps) & {"sigmas", "timesteps"}
    is_flow_matching = type(original).__name__.startswith("FlowMatch")
    compatible: list[str] = []
    for name in sorted(dir(diffusers)):
        if not name.endswith("Scheduler") or not is_scheduler(name):
            continue
        set_timesteps = getattr(getattr(diffusers, name), "set_timesteps", None)
        if set_timesteps is None or name.startswith("FlowMatch") != is_flow_matching:
            continue
        if needed <= list_parameters(set_timesteps):
            compatible.append(name)
    return compatible


def is_scheduler(name: str) -> bool:
    """Return whether diffusers has a scheduler of that name that can be made from a config here."""
    # diffusers puts a placeholder, which is neither, where a library is missing
    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        return False
    return issubclass(cls, diffusers.SchedulerMixin) and issubclass(cls, diffusers.ConfigMixin)


def list_parameters(function: Any) -> set[str]:
    """Return the names of the parameters of a function, or of the constructor of a class."""
    return set(inspect.signature(function).parameters)
