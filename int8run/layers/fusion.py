"""Layers that share work: one quantization for Linears with the same input, a GELU inside the next layer's quantization."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from int8run.layers.int8_linear import Int8Linear, KeepsDtypes, SharedInput
from int8run.models.family import ModelFamily

log = logging.getLogger(__name__)


def group_by_shared_input(names: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Layers that read the same tensor, by full name; a layer that shares its input with none is a group of its own.

    Args:
        groups: names relative to a block.
    """
    left = dict.fromkeys(names)
    found = []
    for group in groups:
        for block in sorted({block for name in group for block in find_block_prefixes(left, name)}):
            members = [block + name for name in group if block + name in left]
            found.append(members)
            for name in members:
                del left[name]
    return found + [[name] for name in left]


def assemble_int8_model(model: nn.Module, layers: Mapping[str, Int8Linear], family: ModelFamily) -> nn.Module:
    """An INT8 model: a copy of the module tree with these layers in it, sharing every tensor with both.

    Layers that read the same tensor share its quantization, and GELUs between INT8 layers move into the second one's, as the family
    says.
    """
    target = copy_sharing_tensors(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(target.get_submodule(parent), child, copy_sharing_tensors(layer))
    saved = share_inputs(target, family.same_input)
    moved = sum(defer_gelu(target, g.activation, g.source, g.into) for g in family.deferred_gelu)
    log.debug(
        "layers with the same input share a quantization: %d fewer per step; %d GELUs moved into one",
        saved,
        moved,
    )
    return target


def find_block_prefixes(names: Iterable[str], relative: str) -> Iterator[str]:
    """Prefixes (with their final dot) of the blocks that hold a module of that relative name."""
    return (name.removesuffix(relative) for name in names if name.endswith(f".{relative}"))


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Let INT8 layers of one block that read the same tensor quantize it once; layers that treat it differently do not share.

    Args:
        groups: names relative to a block.

    Returns:
        The number of quantizations saved per call of the model.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}
    saved = 0
    for group in group_by_shared_input(layers, groups):
        members = [layers[name] for name in group]
        while members:
            first = members[0]
            alike = [m for m in members if (m.backend, m.float_rows) == (first.backend, first.float_rows)]
            alike = [m for m in alike if m.transform.has_same_input_transform(first.transform)]
            members = [m for m in members if m not in alike]
            if len(alike) > 1:
                shared = SharedInput(len(alike))
                for member in alike:
                    member.shared = shared
                saved += len(alike) - 1
    return saved


def defer_gelu(model: nn.Module, activation: str, source: str, into: str) -> int:
    """In every block, take out a GELU (tanh) whose result an INT8 layer quantizes, and let that quantization compute it.

    Returns:
        The number of activations moved.
    """
    modules = dict(model.named_modules())
    moved = 0
    for block in list(find_block_prefixes(modules, activation)):
        found, layer = modules[block + activation], modules.get(block + into)
        width = getattr(modules.get(block + source), "out_features", None)
        if (
            not isinstance(layer, Int8Linear)
            or width is None
            or getattr(found, "approximate", None) != "tanh"
        ):
            continue
        if (
            not layer.backend.limits.fuses_gelu or layer.transform.centered
        ):  # the mean is that of what the GELU gives
            continue
        # a module that holds its projection as well keeps that, under its old name
        held = source.removeprefix(f"{activation}.")
        rest = (
            nn.Identity() if held == source else nn.Sequential(OrderedDict({held: modules[block + source]}))
        )
        parent, _, child = (block + activation).rpartition(".")
        setattr(model.get_submodule(parent), child, rest)
        layer.gelu_from = layer.in_features - width
        moved += 1
    return moved


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors and backends are the same: no memory until layers are replaced."""
    backends = [m.backend for m in model.modules() if isinstance(m, KeepsDtypes) and hasattr(m, "backend")]
    same = [*model.parameters(), *model.buffers(), *backends]
    return copy.deepcopy(model, memo={id(s): s for s in same})
