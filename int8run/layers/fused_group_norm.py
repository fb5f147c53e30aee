"""GroupNorms and the SiLU behind them, computed where an INT8 convolution quantizes its input.

`assemble` and `pipeline.vae` call `defer_norms` for a copy of a model; which modules follow each other is
data of a family or of `vae_layers.yaml`. Nothing here changes a weight. Every module keeps its name and its
tensors, so that files and LoRAs find them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from int8run.layers.fusion import find_block_prefixes
from int8run.layers.int8_conv import DeferredSteps, Int8Conv
from int8run.models.family import DeferredNorm

FEWEST_DIMENSIONS = 4  # of images; vectors, such as embeddings of the time, have fewer


class Place(NamedTuple):
    """The modules of a rule in one block."""

    norm: nn.GroupNorm
    conv: nn.Module | None


def defer_norms(model: nn.Module, rules: Iterable[DeferredNorm]) -> int:
    """Let INT8 convolutions compute what stands before them, as far as their backend can.

    An activation may serve several norms of a block. It lets all images pass then: a norm whose
    convolution does not take the SiLU computes it itself.

    Args:
        model: changed in place.
        rules: those of a block and an activation must name every norm whose output goes through it.

    Returns:
        The number of convolutions that compute a SiLU.
    """
    modules = dict(model.named_modules())
    by_activation: dict[tuple[str, str], list[DeferredNorm]] = defaultdict(list)
    for rule in rules:
        for prefix in find_block_prefixes(modules, rule.norm):
            by_activation[prefix, rule.activation].append(rule)
    n_deferred = 0
    for (prefix, activation), together in by_activation.items():
        places = find_places(modules, prefix, together)
        taking = [place for place in places if takes_silu(place.conv)]
        if not taking or type(modules.get(prefix + activation)) is not nn.SiLU:
            continue
        for place in places:
            move_steps(place)
        parent, _, child = (prefix + activation).rpartition(".")
        setattr(model.get_submodule(parent), child, SiluOfVectors())
        n_deferred += len(taking)
    return n_deferred


def find_places(modules: Mapping[str, nn.Module], prefix: str, rules: Iterable[DeferredNorm]) -> list[Place]:
    """The modules that rules name in one block; none where one of the norms is not as its rule has it.

    Args:
        modules: of the model, by name.
        prefix: of the block's names, with the dot.
        rules: of one activation.
    """
    block = modules[prefix.removesuffix(".")]
    places = []
    for rule in rules:
        norm = modules[prefix + rule.norm]
        is_alike = all(getattr(block, name, None) in values for name, values in rule.where.items())
        if type(norm) is not nn.GroupNorm or not is_alike:
            return []
        places.append(Place(norm, modules.get(prefix + rule.into)))
    return places


def takes_silu(conv: nn.Module | None) -> bool:
    """Whether a convolution computes a SiLU where it quantizes its input."""
    return type(conv) is Int8Conv and conv.backend.limits.fuses_silu


def move_steps(place: Place) -> None:
    """Move a norm and the SiLU behind it into the convolution, as far as it takes them."""
    norm: Any = place.norm
    if not takes_silu(place.conv):
        norm.__class__ = NormWithSilu
        return
    conv: Any = place.conv
    if conv.backend.limits.fuses_norm:
        norm.__class__ = DeferredGroupNorm
        conv.deferred = DeferredSteps(norm)
    else:
        conv.deferred = DeferredSteps(None)


class DeferredGroupNorm(nn.GroupNorm):
    """Keeps the tensors of a norm that a convolution computes, and hands its input on."""

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return input


class NormWithSilu(nn.GroupNorm):
    """A norm whose activation lets images pass."""

    def forward(self, input: Tensor) -> Tensor:
        """The SiLU of the norm."""
        return F.silu(super().forward(input))


class SiluOfVectors(nn.Module):
    """A SiLU that images had elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """The SiLU of vectors; images as they are."""
        if x.dim() >= FEWEST_DIMENSIONS:
            return x
        return F.silu(x)
