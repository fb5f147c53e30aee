"""What `build.py` does with a run's LoRAs: read their files, bake them in, or bring them to the INT8 layers.

How a LoRA is matched and added is `lora.stack`'s business.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from int8run.config.run_spec import RunSpec
from int8run.layers.int8_linear import Int8Linear
from int8run.lora.entries import Entry
from int8run.lora.header_info import LoraHeader
from int8run.lora.joined_norms import read_joined_norms
from int8run.lora.load import read_lora
from int8run.lora.match import Matches
from int8run.lora.modes import Overhead
from int8run.lora.stack import LoraStack
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.loaded_model import LoadedModel
from int8run.ptq.layer_costs import BranchCosts

log = logging.getLogger(__name__)


def read_entries(spec: RunSpec, headers: Sequence[LoraHeader]) -> list[Entry]:
    """Read the LoRA files of the stack."""
    entries = []
    for header, adapter in zip(headers, spec.lora.adapters, strict=True):
        entries.append(Entry(header.name, read_lora(header.path), components=adapter.components))
    return entries


def bake_loras(spec: RunSpec, loaded: LoadedModel, loras: LoraStack, matches: Matches) -> None:
    """Give the LoRAs their strengths before anything is quantized: they become part of the weights."""
    # some DoRA norms need several weights, all at hand only now
    read_joined_norms(matches.denoiser, loaded.read_weight)
    loras.set_strengths(spec.lora.strengths)


def report_loras(spec: RunSpec, loras: LoraStack) -> None:
    """Log what each LoRA changes, and warn of strengths that change nothing."""
    for line in loras.report():
        log.info("%s", line)
    for index, adapter in enumerate(spec.lora.adapters):
        if adapter.text_strength is not None and not loras.matches.changes_text_encoder(index):
            log.warning(
                "LoRA %r has a text_strength and no part for a text encoder; it has no effect", adapter.name
            )


def attach_loras(built: BuiltModel, spec: RunSpec, rows: Mapping[str, int]) -> None:
    """Bring the LoRAs to the INT8 layers, each by the mode that it can have.

    Args:
        built: has the INT8 denoiser and the stack.
        spec: the settings of the run.
        rows: that each layer sees in one step, by name.
    """
    overhead: Overhead | None = None
    if spec.lora.mode == "auto" and not spec.lora.is_scheduled:
        costs = BranchCosts(spec.backend, built.device, getattr(torch, spec.model.dtype))
        overhead = partial(measure_overhead, costs, rows)
    # weights of int8.checkpoint were not made from the float ones in memory
    has_own_float_weights = "float" in built.denoisers and spec.int8.checkpoint is None
    built.loras.attach(
        built.denoisers["int8"],
        float_weights=has_own_float_weights,
        rounding=spec.rounding,
        scheduled=spec.lora.is_scheduled,
        overhead=overhead,
        max_overhead=spec.lora.max_overhead,
    )
    loras = built.loras
    for warning in loras.sizes.list_large_changes(loras.names, spec.lora.largest_strengths):
        log.warning("%s", warning)


def measure_overhead(
    costs: BranchCosts, rows: Mapping[str, int], name: str, layer: Int8Linear, rank: int
) -> float:
    """Time of an INT8 layer with LoRA branches over its time without.

    Args:
        costs: measures each kind of layer once.
        rows: that each layer sees in one step, by name.
        name: of the layer.
        layer: the layer itself.
        rank: of all its LoRAs together.
    """
    return costs.get_ratio(layer, rank, rows[name])
