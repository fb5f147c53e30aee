"""How LoRAs get to the weights: added in float, beside an INT8 layer, or written into its integers.

`LoraStack` makes one of these objects for each float model and each INT8 layer, and calls `set_strengths` on
all of them. Each keeps what it needs to come back to the untouched weight exactly. Nothing here knows files
or names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from int8run.layers.int8_linear import Int8Linear, LowRankBranch
from int8run.lora.adapters.base import LoraDelta, RuntimeBranch
from int8run.lora.adapters.change import LoraChange
from int8run.quant.rounding import Rounding
from int8run.quant.stochastic_rounding import add_with_stochastic_rounding, make_generator
from int8run.quant.weight import QuantizedWeight

# of one module: (index of the LoRA in the stack, what it does)
IndexedChanges = Sequence[tuple[int, LoraChange]]
IndexedDeltas = Sequence[tuple[int, LoraDelta]]
IndexedBiases = Sequence[tuple[int, Tensor]]
IndexedBranches = Sequence[tuple[int, RuntimeBranch]]


def get_weight_deltas(changes: IndexedChanges) -> list[tuple[int, LoraDelta]]:
    """The changes of the weight."""
    return [(index, change.weight_delta) for index, change in changes if change.weight_delta is not None]


def get_bias_deltas(changes: IndexedChanges) -> list[tuple[int, Tensor]]:
    """The changes of the bias."""
    return [(index, change.bias_delta) for index, change in changes if change.bias_delta is not None]


def add_deltas(start: Tensor, deltas: IndexedDeltas, strengths: Sequence[float], original: Tensor) -> Tensor:
    """`start + sum of strength * delta(original)` in float32, so that the order of the LoRAs does not matter.

    Args:
        start: what the changes are added to, in the shape of the weight.
        deltas: by index of their LoRA.
        strengths: one for each LoRA of the stack.
        original: the weight without any LoRA.
    """
    total = start.float()
    for index, delta in deltas:
        if strengths[index] != 0:
            total = total + strengths[index] * delta.compute_delta(original)
    return total


# -- float weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedWeight:
    """A float weight of a model, as it was, and what LoRAs add to it."""

    parameter: nn.Parameter
    original: Tensor
    deltas: IndexedDeltas

    def merge(self, strengths: Sequence[float]) -> None:
        """Write the weight for these strengths."""
        self.parameter.copy_(add_deltas(self.original, self.deltas, strengths, self.original))


@dataclass(frozen=True)
class MergedBias:
    """A float bias of a model, as it was, and what LoRAs add to it."""

    parameter: nn.Parameter
    original: Tensor
    deltas: IndexedBiases

    def merge(self, strengths: Sequence[float]) -> None:
        """Write the bias for these strengths."""
        merged = self.original.float()
        for index, delta in self.deltas:
            merged = merged + strengths[index] * delta.to(merged)
        self.parameter.copy_(merged)


class FloatMerge:
    """LoRAs added to float weights and biases, with the originals kept: every strength starts from them.

    Weights that are not in memory are deferred to `merge_weight`, which adds to them when they are read.

    Args:
        model: a denoiser or text encoder; its INT8 layers are left alone.
        changes: module -> what the LoRAs of the stack do to it.
    """

    def __init__(self, model: nn.Module, changes: Mapping[str, IndexedChanges]):
        self.strengths: list[float] | None = None
        self.weights: dict[str, MergedWeight] = {}
        self.biases: dict[str, MergedBias] = {}
        self.deferred: dict[str, IndexedDeltas] = {}
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        for name, module_changes in changes.items():
            module = model.get_submodule(name)
            if not isinstance(module, Int8Linear):
                self.add_module(name, module, module_changes, device)

    def add_module(self, name: str, module: nn.Module, changes: IndexedChanges, device: torch.device) -> None:
        """Keep the originals of one module."""
        deltas, bias_deltas, weight = get_weight_deltas(changes), get_bias_deltas(changes), module.weight
        if deltas and isinstance(weight, nn.Parameter):
            if weight.is_meta:
                self.deferred[name] = deltas
            else:
                self.weights[name] = MergedWeight(weight, weight.detach().clone(), deltas)
        if bias_deltas:
            bias = get_or_create_bias(module, device)
            self.biases[name] = MergedBias(bias, bias.detach().clone(), bias_deltas)

    def get_original(self, name: str) -> Tensor:
        """The weight of a module without any LoRA."""
        return self.weights[name].original

    @torch.no_grad()
    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight that was just read, with the LoRAs added at the present strengths."""
        deltas, strengths = self.deferred.get(name, []), self.strengths or []
        if not deltas or not any(strengths):
            return weight
        return add_deltas(weight, deltas, strengths, weight).to(weight.dtype)

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """`W = W0 + sum of strength * delta(W0)`, summed in float32 and rounded once."""
        if list(strengths) == self.strengths:
            return
        self.strengths = list(strengths)
        for weight in self.weights.values():
            weight.merge(strengths)
        for bias in self.biases.values():
            bias.merge(strengths)


def get_or_create_bias(module: nn.Module, device: torch.device) -> nn.Parameter:
    """The bias of a module; where it has none, one of zeros on the device."""
    if module.bias is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
    assert isinstance(module.bias, nn.Parameter)
    return module.bias


# -- INT8 layers -------------------------------------------------------------------------------------------


class Int8BiasMerge:
    """The bias of one INT8 layer, to which LoRAs are added in float, whatever the mode."""

    def __init__(self, layer: Int8Linear, changes: IndexedChanges):
        self.deltas = [(index, delta.to(layer.scale)) for index, delta in get_bias_deltas(changes)]
        self.original = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias.clone()
        if self.deltas and layer.bias is None:
            layer.bias = self.original.clone()
        self.bias = layer.bias

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the bias for these strengths."""
        if self.deltas and self.bias is not None:
            self.bias.copy_(self.original)
            for index, delta in self.deltas:
                self.bias.add_(delta, alpha=strengths[index])


class DynamicLayer:
    """LoRAs beside one INT8 layer: a low-rank branch, and row factors of adapters that have them (DoRA, IA3).

    Args:
        layer: keeps its integers.
        changes: of the layer.
        branches: the branch of each change of the weight.
    """

    def __init__(self, layer: Int8Linear, changes: IndexedChanges, branches: IndexedBranches):
        self.layer, self.float_weight = layer, layer.float_weight
        self.bias = Int8BiasMerge(layer, changes)
        self.scale = layer.scale.clone()
        self.row_factors = [
            (index, branch.row_factor.to(layer.scale))
            for index, branch in branches
            if branch.row_factor is not None
        ]
        self.indices: list[int] = []  # of the LoRAs that have a low-rank part
        pairs: list[tuple[Tensor, Tensor]] = []
        for index, branch in branches:
            if branch.lora_A is not None and branch.lora_B is not None:
                self.indices.append(index)
                pairs.append(balance_factors(branch.lora_A, branch.lora_B))
        self.branch = None
        if pairs:
            self.branch = LowRankBranch(pairs, layer.dtype, layer.scale.device)
            self.branch.fuse_into_backend(layer.backend, layer.transform)
        self.attach(True)
        if self.branch is not None and self.branch.fused is not None and layer.float_weight is None:
            self.branch.drop_float_factors()

    def attach(self, on: bool) -> None:
        """Put the branch beside its layer, or take it off."""
        self.layer.adapter = self.branch if on else None
        # a float copy of the weight would have to follow every strength of an adapter that scales rows
        self.layer.float_weight = None if on and self.row_factors else self.float_weight

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the strengths of the branch, the bias, and the scales where an adapter changes them."""
        if self.branch is not None:
            self.branch.set_strengths([strengths[index] for index in self.indices])
        if self.row_factors:
            total_factor = torch.ones_like(self.scale)
            for index, factor in self.row_factors:
                total_factor.add_(factor, alpha=strengths[index])
            self.layer.scale.copy_(self.scale * total_factor)
        self.bias.set_strengths(strengths)


def balance_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product whose ranks are alike, so that a backend may round them to INT8.

    In the factors of a file a few strong ranks set the scale of all others. From the SVD `lora_B lora_A = U S
    V` and a random orthogonal Q come `Qᵀ S V` and `U Q`, in which each rank is a mixture of all.

    Args:
        lora_A: [r, K].
        lora_B: [N, r].

    Returns:
        The new [r, K] and [N, r].
    """
    q, triangle = torch.linalg.qr(lora_A.T)  # A = triangleᵀ qᵀ, so that the SVD is one of r columns
    u, s, v = torch.linalg.svd(lora_B @ triangle.T, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(len(s), len(s), generator=generator)).Q.to(u.device)
    return rotation.T @ (s[:, None] * v) @ q.T, u @ rotation


class MergedLayer(ABC):
    """LoRAs written into the weight of one INT8 layer; every strength starts from the weight as it was."""

    def __init__(self, layer: Int8Linear, changes: IndexedChanges):
        self.layer, self.deltas = layer, get_weight_deltas(changes)
        self.bias = Int8BiasMerge(layer, changes)
        self.original = layer.read_quantized_weight()
        self.written_strengths: list[float] = [0.0 for _ in self.deltas]
        self.clipped_share = 0.0

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the weight for these strengths, unless the layer has it; at 0 it is the original exactly."""
        own_strengths = [strengths[index] for index, _ in self.deltas]
        if own_strengths != self.written_strengths:
            weight = self.compute_weight(strengths) if any(own_strengths) else self.original
            self.layer.set_weight(weight)
            self.written_strengths = own_strengths
        if not any(own_strengths):
            self.clipped_share = 0.0
        self.bias.set_strengths(strengths)

    @abstractmethod
    def compute_weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        """The layer's weight with the LoRAs of the stack at these strengths."""


class BakedLayer(MergedLayer):
    """The sum in float, transformed and rounded like any weight: the error is that of a fresh quantization.

    Args:
        layer: is changed.
        changes: of the layer.
        float_weight: what the layer was quantized from.
        rounding: of the sum.
    """

    def __init__(self, layer: Int8Linear, changes: IndexedChanges, float_weight: Tensor, rounding: Rounding):
        super().__init__(layer, changes)
        self.float_weight, self.rounding = float_weight, rounding

    @torch.no_grad()
    def compute_weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        merged = add_deltas(self.float_weight, self.deltas, strengths, self.float_weight)
        return self.rounding.round_weight(self.layer.transform.transform_weight(merged), None)


class StochasticLayer(MergedLayer):
    """The sum of all changes, added to the integers with stochastic rounding; no float weight is needed.

    Args:
        layer: is changed.
        changes: of the layer.
        read_weight: the float weight or what the integers stand for.
        seed: what the generator is seeded with: the seed of the run, the layer's name, the LoRA files.
    """

    def __init__(
        self,
        layer: Int8Linear,
        changes: IndexedChanges,
        read_weight: Callable[[], Tensor],
        seed: Sequence[object],
    ):
        super().__init__(layer, changes)
        self.read_weight, self.seed = read_weight, tuple(seed)

    @torch.no_grad()
    def compute_weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        original = self.read_weight()
        zeros = torch.zeros(original.shape, device=original.device)
        change = add_deltas(zeros, self.deltas, strengths, original)
        rounded = add_with_stochastic_rounding(
            self.original, self.layer.transform.transform_weight(change), make_generator(*self.seed)
        )
        self.clipped_share = rounded.clipped_share
        return rounded.weight


Int8LoraLayer = DynamicLayer | BakedLayer | StochasticLayer
