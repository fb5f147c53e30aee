"""Work that INT8 layers save by knowing each other, as the model family allows.

Layers that read the same tensor quantize it once, and a GELU before an INT8 layer is computed inside that
layer's quantization. `assemble` applies both to a copy of the model; nothing here changes a weight.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from int8run.layers.int8_linear import Int8Linear
from int8run.layers.shared_input import SharedInput
from int8run.models.family import DeferredGelu


def group_by_shared_input(names: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Group layers that read the same tensor.

    Args:
        names: full names of the layers.
        groups: names relative to a block, such as ["to_q", "to_k", "to_v"].

    Returns:
        Groups of full names, none of them empty, each name in exactly one. A layer that shares its input with
        none is a group of its own.
    """
    ungrouped = dict.fromkeys(names)  # a set that keeps their order
    found = []
    for group in groups:
        for prefix in list_block_prefixes(ungrouped, group):
            members = [prefix + name for name in group if prefix + name in ungrouped]
            if not members:
                # a name that ends in another one of the group, as `attn.to_q` in `to_q`, was taken with an
                # earlier block
                continue
            found.append(members)
            for member in members:
                del ungrouped[member]
    for name in ungrouped:
        found.append([name])
    return found


def list_block_prefixes(names: Iterable[str], group: Sequence[str]) -> list[str]:
    """Prefixes of the blocks that hold a module of the group, sorted, each once."""
    prefixes: set[str] = set()
    for relative in group:
        prefixes.update(find_block_prefixes(names, relative))
    return sorted(prefixes)


def find_block_prefixes(names: Iterable[str], relative: str) -> Iterator[str]:
    """Prefixes (with their final dot) of the blocks that hold a module of that relative name."""
    return (name.removesuffix(relative) for name in names if name.endswith(f".{relative}"))


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Let INT8 layers of one block that read the same tensor quantize it once.

    Layers that treat the tensor differently do not share.

    Args:
        model: changed in place.
        groups: names relative to a block.

    Returns:
        The number of quantizations saved per call of the model.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    n_saved = 0
    for names in group_by_shared_input(layers, groups):
        for alike in split_by_quantization([layers[name] for name in names]):
            if len(alike) == 1:
                continue
            shared = SharedInput(len(alike))
            for place, layer in enumerate(alike):
                layer.shared, layer.shared_place = shared, place
                shared.set_branch(place, layer.adapter)
            n_saved += len(alike) - 1
    return n_saved


def split_by_quantization(layers: Iterable[Int8Linear]) -> list[list[Int8Linear]]:
    """Split layers that read the same tensor into lists of those that quantize it alike."""
    found: list[list[Int8Linear]] = []
    for layer in layers:
        for alike in found:
            if can_share_input(layer, alike[0]):
                alike.append(layer)
                break
        else:
            found.append([layer])
    return found


def can_share_input(layer: Int8Linear, other: Int8Linear) -> bool:
    """Whether both layers quantize the same tensor to the same integers."""
    if layer.backend != other.backend or layer.float_rows != other.float_rows:
        return False
    return layer.transform.has_same_input_transform(other.transform)


def defer_gelu(model: nn.Module, gelu: DeferredGelu) -> int:
    """In every block, take out a GELU (tanh) before an INT8 layer, and let that layer's quantization compute
    it.

    Args:
        model: changed in place.
        gelu: names of the modules, relative to a block.

    Returns:
        The number of activations moved.
    """
    modules = dict(model.named_modules())
    n_moved = 0
    for block in list(find_block_prefixes(modules, gelu.activation)):
        activation = modules[block + gelu.activation]
        source = modules.get(block + gelu.source)
        layer = modules.get(block + gelu.into)
        width = getattr(source, "out_features", None)
        if source is None or width is None or getattr(activation, "approximate", None) != "tanh":
            continue
        if not isinstance(layer, Int8Linear) or not can_compute_gelu(layer):
            continue
        parent, _, child = (block + gelu.activation).rpartition(".")
        setattr(model.get_submodule(parent), child, replace_activation(gelu, source))
        # the activation is the last of the layer's input columns
        layer.gelu_from = layer.in_features - width
        n_moved += 1
    return n_moved


def can_compute_gelu(layer: Int8Linear) -> bool:
    """Whether the layer's quantization computes a GELU at next to no cost."""
    # a centered transform subtracts the mean of what the GELU returns, so the GELU must come first
    return layer.backend.limits.fuses_gelu and not layer.transform.centered


def replace_activation(gelu: DeferredGelu, source: nn.Module) -> nn.Module:
    """What takes the place of a GELU that moved: nothing, or the projection that its module holds."""
    inner_name = gelu.source.removeprefix(f"{gelu.activation}.")
    if inner_name == gelu.source:
        return nn.Identity()
    return nn.Sequential(OrderedDict({inner_name: source}))  # under its old name
