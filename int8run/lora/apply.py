"""Bring a stack of LoRA files to a model: match names, then merge into float weights or attach run-time branches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.layers.linear import Int8Linear, LowRank, LowRankBranch, linear_at
from int8run.lora.files import LoraFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matches:
    """Where the files of a stack land: per module, which adapter brings which pair."""

    by_module: dict[str, list[tuple[int, LowRank]]]
    unmatched: tuple[str, ...]


def match(model: nn.Module, files: Sequence[LoraFile], strict: bool) -> Matches:
    """Find the Linear of every pair and check the shapes; nothing is changed.

    Raises:
        LoraError: no match at all, a wrong shape, or, when strict, any key without a place.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    by_module: dict[str, list[tuple[int, LowRank]]] = {}
    unmatched: list[str] = []
    for index, file in enumerate(files):
        lost = list(file.unknown)
        for name, pair in file.pairs.items():
            if name not in linears:
                lost.append(name)
                continue
            wanted, got = tuple(linears[name].weight.shape), (pair.lora_B.shape[0], pair.lora_A.shape[1])
            if got != wanted:
                raise LoraError(
                    f"{file.path.name}: {name} changes a {got[0]}x{got[1]} weight, the model's is {wanted[0]}x{wanted[1]}; "
                    "the LoRA was made for another base model"
                )
            by_module.setdefault(name, []).append((index, pair))
        if len(lost) == len(file.pairs) + len(file.unknown):
            raise LoraError(
                f"{file.path.name}: none of its {len(lost)} modules is in the model (first: {lost[0] if lost else 'none'}); "
                "the LoRA was made for another architecture"
            )
        if lost and strict:
            raise LoraError(
                f"{file.path.name}: {len(lost)} of {len(file.pairs) + len(file.unknown)} keys have no place in the model "
                f"(first: {lost[0]}); lora.strict=false applies the rest"
            )
        if lost:
            log.warning("%s: %d keys have no place in the model and are left out (first: %s)", file.path.name, len(lost), lost[0])
        unmatched += lost
    return Matches(by_module, tuple(unmatched))


class FloatMerge:
    """LoRAs added to float weights, with the originals kept: changing a strength starts from them, so undo is exact."""

    def __init__(self, model: nn.Module, matches: Matches):
        self.pairs: dict[Tensor, list[tuple[int, LowRank]]] = {
            linear_at(model, name).weight: pairs for name, pairs in matches.by_module.items()
        }
        self.originals = {w: w.detach().clone() for w in self.pairs}

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """`W = W0 + sum of strength * delta`, summed in float32 and rounded once."""
        for weight, pairs in self.pairs.items():
            merged = self.originals[weight].float()
            for index, pair in pairs:
                if strengths[index] != 0:
                    merged = merged + strengths[index] * pair.delta().to(merged.device)
            weight.copy_(merged)


class DynamicBranches:
    """Low-rank branches beside the INT8 layers of a model."""

    def __init__(self, model: nn.Module, matches: Matches):
        self.branches: list[tuple[Int8Linear, LowRankBranch, list[int]]] = []
        for name, pairs in matches.by_module.items():
            layer = model.get_submodule(name)
            if isinstance(layer, Int8Linear):  # layers that stayed float carry the merge
                branch = LowRankBranch([pair for _, pair in pairs], layer.dtype, layer.scale.device)
                branch.fuse(layer.backend, layer.transform)
                self.branches.append((layer, branch, [index for index, _ in pairs]))
        self.attach(True)

    def attach(self, on: bool) -> None:
        """Put the branches on their layers, or take them off."""
        for layer, branch, _ in self.branches:
            layer.adapter = branch if on else None

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write new strengths; nothing else changes."""
        for _, branch, indices in self.branches:
            branch.set_strengths([strengths[i] for i in indices])
