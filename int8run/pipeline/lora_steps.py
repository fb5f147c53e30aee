"""What `build.py` does with a run's LoRAs: read their files, bake them in, say what they change.

How a LoRA is matched and added is `lora.stack`'s business.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.layers.int8_conv import Int8Conv, Int8Layer
from int8run.layers.plan import LayerPlan
from int8run.lora.config import LoraSettings
from int8run.lora.entries import Entry
from int8run.lora.header_info import LoraHeader
from int8run.lora.joined_norms import read_joined_norms
from int8run.lora.load import read_lora
from int8run.lora.match import Matches
from int8run.lora.stack import LoraStack
from int8run.pipeline.loaded_model import LoadedModel
from int8run.ptq.conv_costs import ConvCosts
from int8run.ptq.layer_costs import BranchCosts

log = logging.getLogger(__name__)


def read_entries(lora: LoraSettings, headers: Sequence[LoraHeader]) -> list[Entry]:
    """Read the LoRA files of the stack."""
    entries = []
    for header, adapter in zip(headers, lora.adapters, strict=True):
        entries.append(Entry(header.name, read_lora(header.path), components=adapter.components))
    return entries


def bake_loras(strengths: Sequence[float], loaded: LoadedModel, loras: LoraStack, matches: Matches) -> None:
    """Give the LoRAs their strengths before anything is quantized: they become part of the weights."""
    # some DoRA norms need several weights, all at hand only now
    read_joined_norms(matches.denoiser, loaded.read_weight)
    loras.set_strengths(strengths)


def report_loras(lora: LoraSettings, loras: LoraStack) -> None:
    """Log what each LoRA changes, and warn of strengths that change nothing."""
    for line in loras.report():
        log.info("%s", line)
    for index, adapter in enumerate(lora.adapters):
        if adapter.text_strength is not None and not loras.matches.changes_text_encoder(index):
            log.warning(
                "LoRA %r has a text_strength and no part for a text encoder; it has no effect", adapter.name
            )


@dataclass(frozen=True)
class BranchOverhead:
    """What LoRA branches cost the INT8 layers of one model, each kind of layer measured once.

    Args:
        costs: of Linears.
        conv_costs: of convolutions.
        rows: that each layer sees in one step, by name.
        conv_inputs: shape of what each convolution gets in it.
    """

    costs: BranchCosts
    conv_costs: ConvCosts
    rows: Mapping[str, int]
    conv_inputs: Mapping[str, Sequence[int]]

    def measure(self, name: str, layer: Int8Layer, rank: int) -> float:
        """Time of an INT8 layer with LoRA branches over its time without.

        Args:
            name: of the layer.
            layer: the layer itself.
            rank: of all its LoRAs together.
        """
        if not isinstance(layer, Int8Conv):
            return self.costs.get_ratio(layer, rank, self.rows[name])
        if name not in self.conv_inputs:
            return 1.0  # no call of a step reaches it, so that a branch costs nothing
        return self.conv_costs.get_branch_ratio(layer, rank, self.conv_inputs[name])


def note_lora_modes(plans: Sequence[LayerPlan], loras: LoraStack) -> None:
    """Write into the plans of INT8 layers how they get their LoRAs, and why not otherwise."""
    for plan in plans:
        choice = loras.choices.get(plan.name)
        if choice is not None:
            plan.lora, plan.lora_reason = choice.mode, choice.reason
