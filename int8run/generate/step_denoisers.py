"""Several denoisers for one image, each for its part of the steps: float for some, INT8 for the others.

`generate` asks before each step. Which denoisers these are, and how they come to a GPU, is not known here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from int8run.models.dual_denoisers import has_denoiser, set_denoiser
from int8run.utils.step_schedule import Schedule, find_value_at


def keep_place(left: nn.Module) -> None:
    """Nothing is moved: every denoiser lies where it computes."""


@dataclass(frozen=True)
class StepDenoisers:
    """Denoisers that take turns within one call of a pipeline.

    All pipelines of diffusers look up their denoiser anew in each step, so that it can be exchanged between
    two steps; so it stays compiled, and hooks that offload it stay on it.

    Args:
        schedule: names of denoisers by the fraction of the steps from which on they compute.
        denoisers: by these names.
        components: others that change with them, such as ControlNets, by the same names.
        on_change: called with the denoiser that was left, once another one has its place.
    """

    schedule: Schedule
    denoisers: Mapping[str, nn.Module]
    components: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)
    on_change: Callable[[nn.Module], None] = keep_place

    def install(self, pipe: Any, component: str, fraction: float) -> str:
        """Give the pipeline the denoiser for the step that comes.

        Args:
            pipe: is changed where that is another one than it has.
            component: name of its denoiser component.
            fraction: of the steps that is done; from 1 on nothing is changed, as no step comes.

        Returns:
            The name of the denoiser that the pipeline has then.
        """
        name: str = find_value_at(self.schedule, min(fraction, 1.0))
        denoiser = self.denoisers[name]
        if fraction >= 1 or has_denoiser(pipe, denoiser, component):
            return name
        left = [other for other in self.denoisers.values() if has_denoiser(pipe, other, component)]
        set_denoiser(pipe, denoiser, component)
        for part, module in self.components.get(name, {}).items():
            pipe.register_modules(**{part: module})
        for other in left:
            self.on_change(other)
        return name
