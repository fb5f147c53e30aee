"""Modules that a ControlNet takes over from the denoiser of its pipeline, as that of Z-Image does.

controlnets.py calls this: the INT8 ControlNet computes with those of the INT8 denoiser, as the float one does
with those of the float denoiser. So they have the LoRAs of the denoiser, and are in memory once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from int8run.layers.plan import LayerPlan


@dataclass(frozen=True)
class Int8Denoiser:
    """The INT8 denoiser beside a ControlNet.

    Args:
        module: a copy of the float one, with modules of the same names.
        plans: of its layers.
    """

    module: nn.Module
    plans: Sequence[LayerPlan]


def find_shared_modules(controlnet: nn.Module, denoiser: nn.Module) -> dict[str, str]:
    """The modules of a float ControlNet that are the denoiser's, too: its name for each, and the denoiser's.

    Args:
        controlnet: of a pipeline.
        denoiser: of the same; float as well.
    """
    denoiser_names = {module: name for name, module in denoiser.named_modules()}
    shared = {}
    for name, module in controlnet.named_modules():
        if module in denoiser_names:
            shared[name] = denoiser_names[module]
    return shared


def take_plans(
    plans: Sequence[LayerPlan], shared: Mapping[str, str], denoiser_plans: Sequence[LayerPlan]
) -> list[LayerPlan]:
    """The plans of a ControlNet's layers, where those of shared layers say what the denoiser's say.

    Args:
        plans: as the ControlNet's own rules have them.
        shared: what `find_shared_modules` found.
        denoiser_plans: of the denoiser, whose layers are INT8 by now.
    """
    by_name = {plan.name: plan for plan in denoiser_plans}
    taken = []
    for plan in plans:
        if plan.name in shared:
            original = by_name[shared[plan.name]]
            plan = replace(original, name=plan.name, measured=dict(original.measured))
        taken.append(plan)
    return taken


def put_shared_modules(controlnet: nn.Module, shared: Mapping[str, str], int8_denoiser: nn.Module) -> None:
    """Let an INT8 ControlNet compute with modules of the INT8 denoiser.

    Args:
        controlnet: is changed; a copy of the float one.
        shared: what `find_shared_modules` found, modules before those inside them.
        int8_denoiser: has the modules.
    """
    for name, denoiser_name in shared.items():
        parent, _, child = name.rpartition(".")
        setattr(controlnet.get_submodule(parent), child, int8_denoiser.get_submodule(denoiser_name))
