"""Which layers of a denoiser become INT8, and which of them exist already.

quantize_denoiser.py works on this selection; build.py and api.py use the parts of it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from int8run.errors import ConfigError
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.plan import CONV, LayerPlan
from int8run.layers.plan_summary import describe_skip_reasons, select_int8_plans
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.prequantized import PrequantizedLayers


@dataclass(frozen=True)
class SelectedLayers:
    """The layers that become INT8, and where the integers of each come from.

    Args:
        plans: of all of them, in the model's order.
        new: plans of those that are quantized here.
        existing: plans of those whose integers exist already.
        rows: that each layer sees in one step, by name.
        conv_inputs: shape [B, C, *size] of what each convolution gets in it.
        groups: names of the new layers that read the same tensor; each stands in one group.
    """

    plans: Sequence[LayerPlan]
    new: Sequence[LayerPlan]
    existing: Sequence[LayerPlan]
    rows: Mapping[str, int]
    groups: Sequence[Sequence[str]]
    conv_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def new_linears(self) -> list[LayerPlan]:
        """Plans of the Linears that are quantized here: most calibrations are about those."""
        return [plan for plan in self.new if plan.is_linear]

    @property
    def new_convolutions(self) -> list[LayerPlan]:
        """Plans of the convolutions that are quantized here."""
        return [plan for plan in self.new if plan.kind == CONV]


def select_layers(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    *,
    rows: Mapping[str, int],
    conv_inputs: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    prequantized: PrequantizedLayers | None,
) -> SelectedLayers:
    """The layers that become INT8: those that exist already, and those to quantize.

    Args:
        loaded: the model.
        plans: of every Linear.
        rows: that each layer which becomes INT8 sees in one step, by name.
        conv_inputs: shape of what each convolution gets in it.
        prequantized: layers that exist already.

    Raises:
        ConfigError: when there are none.
    """
    chosen = select_int8_plans(plans)
    if not chosen:
        raise ConfigError(
            f"{loaded.source.denoisers[0].class_name}: no layer became INT8 "
            f"({describe_skip_reasons(plans)}); choose another model_type= or set int8.enable=false"
        )
    existing_names: Collection[str] = ()
    if prequantized is not None:
        existing_names = prequantized.layers.keys()
    new = [plan for plan in chosen if plan.name not in existing_names]
    return SelectedLayers(
        plans=chosen,
        new=new,
        existing=[plan for plan in chosen if plan.name in existing_names],
        rows=rows,
        conv_inputs=conv_inputs,
        groups=group_by_shared_input([plan.name for plan in new if plan.is_linear], loaded.family.same_input),
    )
