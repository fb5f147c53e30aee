"""ControlNets in INT8: the steps of the denoiser, for a module that the pipeline calls before it.

build.py calls `quantize_controlnets` once the denoiser is INT8. Which layers stay float is data
(`models/controlnet_layers.yaml`, and the rules of the denoiser's family). The settings of a run are not
known here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from int8run.generate.capture import Call
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_conv import is_convolution
from int8run.layers.plan import FLOAT, LayerPlan
from int8run.layers.plan_summary import select_int8_plans
from int8run.lora.stack import LoraStack
from int8run.metrics.layers import count_macs, count_own_bytes, note_macs_shares
from int8run.models.controlnet_layers import add_controlnet_rules, load_controlnet_rules
from int8run.models.family import UNKNOWN_FAMILY, ModelFamily, build_conservative_family
from int8run.models.given_model import find_controlnets
from int8run.models.loader import list_block_prefixes
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.quantize_denoiser import leave_slow_layers_float, quantize_denoiser
from int8run.pipeline.shared_layers import (
    Int8Denoiser,
    find_shared_modules,
    put_shared_modules,
    take_plans,
)
from int8run.pipeline.trace_layers import trace_layers
from int8run.report.console import Progress

log = logging.getLogger(__name__)


@dataclass
class BuiltControlnet:
    """A ControlNet of a pipeline, and what became of its layers.

    Args:
        component: its name in the pipeline.
        module: that the INT8 model generates with; the float one where no layer of it is INT8.
        float_module: as the pipeline had it; None where no float model generates beside the INT8 one.
        float_bytes: size of the float one, without what it shares with the denoiser.
        plans: of its layers; none where the run has no INT8 model.
        calls: its arguments in the traced step.
    """

    component: str
    module: nn.Module
    float_module: nn.Module | None
    float_bytes: int
    plans: list[LayerPlan] = field(default_factory=list)
    calls: Sequence[Call] = ()

    @property
    def named_plans(self) -> list[LayerPlan]:
        """The plans under the names of `layers.csv`: component first, as those of two denoisers."""
        return [replace(plan, name=f"{self.component}.{plan.name}") for plan in self.plans]


def list_float_controlnets(loaded: LoadedModel) -> list[BuiltControlnet]:
    """The ControlNets of a pipeline as they are, for a run without an INT8 model."""
    built = []
    for component, module in find_controlnets(loaded.pipe.components).items():
        built.append(BuiltControlnet(component, module, module, count_own_bytes(module, loaded.denoiser)))
    return built


def quantize_controlnets(
    loaded: LoadedModel,
    calls: Mapping[str, Sequence[Call]],
    settings: QuantizationSettings,
    *,
    denoiser: Int8Denoiser,
    keeps_float: bool,
    progress: Progress,
) -> list[BuiltControlnet]:
    """Make the ControlNets of a pipeline INT8, each in a copy that shares every float tensor.

    Args:
        loaded: the model, whose ControlNets stay as they are.
        calls: arguments of each ControlNet in the traced step, by component.
        settings: how layers become INT8.
        denoiser: the INT8 one, with its LoRAs.
        keeps_float: whether a float model generates, too.
        progress: of each step.

    Raises:
        ConfigError: when the outlier method can take no layer of a ControlNet.
        BackendError: when the backend cannot take a layer.
    """
    # attentions were chosen for the denoiser's modules, and its search is over
    settings = replace(settings, attentions=())
    built = []
    for controlnet in list_float_controlnets(loaded):
        controlnet.calls = calls.get(controlnet.component, ())
        quantize_controlnet(loaded, controlnet, settings, denoiser=denoiser, progress=progress)
        if not keeps_float:
            controlnet.float_module = None
        built.append(controlnet)
    return built


def quantize_controlnet(
    loaded: LoadedModel,
    controlnet: BuiltControlnet,
    settings: QuantizationSettings,
    *,
    denoiser: Int8Denoiser,
    progress: Progress,
) -> None:
    """Make one ControlNet INT8.

    Args:
        loaded: the model that it belongs to.
        controlnet: gets its plans and its INT8 module.
        settings: how layers become INT8.
        denoiser: the INT8 one, whose layers it may share.
        progress: of each step.
    """
    float_module = controlnet.module
    # everything that quantizes a denoiser takes it for one
    view = replace(
        loaded,
        component=controlnet.component,
        denoiser=float_module,
        family=adapt_family(loaded.family, float_module),
        checkpoint=None,
    )
    shared = find_shared_modules(float_module, loaded.denoiser)
    controlnet.plans = take_plans(view.plan_layers(settings.int8.convolutions), shared, denoiser.plans)
    obstacle = find_obstacle(controlnet, settings)
    if obstacle is not None:
        for plan in controlnet.plans:
            plan.skip(obstacle)
    if controlnet.calls:
        note_macs_shares(controlnet.plans, count_macs(float_module, controlnet.calls))
    if not select_int8_plans(controlnet.plans):
        return
    own_plans = [plan for plan in controlnet.plans if plan.name not in shared]
    module = quantize_own_layers(view, own_plans, settings, calls=controlnet.calls, progress=progress)
    put_shared_modules(module, shared, denoiser.module)
    if select_int8_plans(controlnet.plans):
        controlnet.module = module


def quantize_own_layers(
    view: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    calls: Sequence[Call],
    progress: Progress,
) -> nn.Module:
    """A copy of a ControlNet in which the layers that it does not share are INT8, as their plans say.

    Args:
        view: the model with the ControlNet in the denoiser's place.
        plans: of those layers.
        settings: how they become INT8.
        calls: arguments of the ControlNet in the traced step.
        progress: of each step.
    """
    chosen = select_int8_plans(plans)
    if not chosen:
        return copy_sharing_tensors(view.denoiser)
    traced = trace_layers(view.denoiser, chosen, calls)
    loras = LoraStack(view.denoiser, {})  # LoRAs change the denoiser alone
    quantized = quantize_denoiser(
        view, plans, settings, traced=traced, prequantized=None, loras=loras, progress=progress
    )
    return leave_slow_layers_float(view, plans, settings, quantized=quantized, loras=loras).denoiser


def adapt_family(family: ModelFamily, controlnet: nn.Module) -> ModelFamily:
    """The rules for a ControlNet: its own, and those of the denoiser's family, whose blocks it repeats.

    Args:
        family: of the denoiser.
        controlnet: one, or several in a list.
    """
    if family.name == UNKNOWN_FAMILY:
        # its rules are the names of the denoiser's layers
        family = build_unknown_family(controlnet)
    is_list = isinstance(getattr(controlnet, "nets", None), nn.ModuleList)
    return add_controlnet_rules(family, is_list=is_list)


def build_unknown_family(controlnet: nn.Module) -> ModelFamily:
    """The conservative rule for a ControlNet of an unknown denoiser; lists of projections are no blocks."""
    layers = []
    for name, module in controlnet.named_modules():
        if isinstance(module, nn.Linear) or is_convolution(module):
            layers.append(name)
    own = ModelFamily(name=UNKNOWN_FAMILY, ignore=load_controlnet_rules())
    blocks = []
    for prefix in list_block_prefixes(controlnet):
        if own.find_skip_reason(prefix) is None:
            blocks.append(prefix)
    return build_conservative_family(blocks, layers)


def find_obstacle(controlnet: BuiltControlnet, settings: QuantizationSettings) -> str | None:
    """Why a ControlNet stays float as a whole; None: it does not.

    Args:
        controlnet: with its calls.
        settings: how layers become INT8.
    """
    if settings.int8.controlnet == FLOAT:
        return "int8.controlnet=float"
    if not controlnet.calls:
        return "the pipeline does not call it by itself"
    if settings.quality_db is not None:
        return "quality_db is searched for in the denoiser alone"
    if settings.is_fitted and not settings.needs_calibration:
        return "with int8.checkpoint no float denoiser is there for the calibration"
    return None
