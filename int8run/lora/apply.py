"""How LoRAs get to an INT8 layer: beside it, or written into its integers.

`LoraStack` makes one of these objects for each INT8 layer, attaches them all, and calls `set_strengths` on
all of them. Each keeps what it needs to come back to the untouched layer exactly. Float weights are changed
by `int8run.lora.float_merge`. Nothing here knows files or names.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from int8run.layers.grouped_int8_linear import GroupedInt8Linear
from int8run.layers.int8_conv import ConvBranch, Int8Conv, Int8Layer
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.lora.adapters.base import LoraDelta, RuntimeBranch
from int8run.lora.adapters.change import LoraChange
from int8run.lora.size_limits import check_fits
from int8run.quant.grouped_rounding import find_layout
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.rounding import Rounding, round_to_bits
from int8run.quant.stochastic_rounding import add_change, make_generator

# of one module: (index of the LoRA in the stack, what it does)
IndexedChanges = Sequence[tuple[int, LoraChange]]
IndexedDeltas = Sequence[tuple[int, LoraDelta]]
IndexedBranches = Sequence[tuple[int, RuntimeBranch]]


def get_weight_deltas(changes: IndexedChanges) -> list[tuple[int, LoraDelta]]:
    """The changes of the weight, each with the index of its LoRA."""
    deltas = []
    for index, change in changes:
        if change.weight_delta is not None:
            deltas.append((index, change.weight_delta))
    return deltas


def get_bias_deltas(changes: IndexedChanges) -> list[tuple[int, Tensor]]:
    """The changes of the bias, [N], each with the index of its LoRA."""
    deltas = []
    for index, change in changes:
        if change.bias_delta is not None:
            deltas.append((index, change.bias_delta))
    return deltas


def add_deltas(start: Tensor, deltas: IndexedDeltas, strengths: Sequence[float], original: Tensor) -> Tensor:
    """`start + sum of strength * delta(original)` in float32, so that the order of the LoRAs does not matter.

    Args:
        start: what the changes are added to, in the shape of the weight.
        deltas: by index of their LoRA.
        strengths: one for each LoRA of the stack.
        original: the weight without any LoRA, which the changes are computed from.
    """
    total = start.float()
    for index, delta in deltas:
        if strengths[index] != 0:
            total = total + strengths[index] * delta.compute_delta(original)
    return total


# -- INT8 layers -------------------------------------------------------------------------------------------


class Int8BiasMerge:
    """The bias of one INT8 layer, to which LoRAs are added in float, whatever the mode.

    Args:
        layer: only read here.
        changes: of the layer.
    """

    def __init__(self, layer: Int8Layer, changes: IndexedChanges):
        # in the dtype and on the device of the scale, as the layer keeps its bias
        self.deltas = [(index, delta.to(layer.scale)) for index, delta in get_bias_deltas(changes)]
        self.original = None if layer.bias is None else layer.bias.clone()

    def attach(self, layer: Int8Layer) -> None:
        """Give the layer a bias of zeros, where it has none and needs one."""
        if self.deltas and layer.bias is None:
            layer.bias = torch.zeros_like(layer.scale)

    def restore(self, layer: Int8Layer) -> None:
        """Bring back the bias as it was; a layer that had none has none again."""
        if not self.deltas or layer.bias is None:
            return
        if self.original is None:
            layer.bias = None
        else:
            layer.bias.copy_(self.original)

    def set_strengths(self, layer: Int8Layer, strengths: Sequence[float]) -> None:
        """Write the bias for these strengths."""
        if not self.deltas or layer.bias is None:
            return
        # asked anew each time: moving a model to another device gives its layers other tensors
        bias = layer.bias
        if self.original is None:
            bias.zero_()
        else:
            bias.copy_(self.original)
        for index, delta in self.deltas:
            bias.add_(delta.to(bias.device), alpha=strengths[index])


class Int8LoraLayer(ABC):
    """LoRAs on one INT8 layer. Nothing is changed before `attach`.

    Args:
        layer: the one to be changed.
        changes: of the layer.
    """

    def __init__(self, layer: Int8Layer, changes: IndexedChanges):
        # weak, because the layer's model holds this object: a circle would keep a dropped model in memory
        self._layer = weakref.ref(layer)
        self.bias = Int8BiasMerge(layer, changes)

    def find_layer(self) -> Int8Layer | None:
        """The layer; None where it does not exist any more."""
        return self._layer()

    @property
    def layer(self) -> Int8Layer:
        """The layer, which must still exist."""
        layer = self.find_layer()
        if layer is None:
            raise RuntimeError("the INT8 model of these LoRAs does not exist any more")
        return layer

    @abstractmethod
    def attach(self) -> None:
        """Make the layer ready for strengths; they are 0."""

    @abstractmethod
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Bring the layer to these strengths, one for each LoRA of the stack."""

    @abstractmethod
    def restore(self) -> None:
        """Leave the layer as it was found, to the bit."""


class DynamicLayer(Int8LoraLayer):
    """LoRAs beside one INT8 layer: a low-rank branch, and row factors of adapters that have them (DoRA, IA3).

    Args:
        layer: keeps its integers.
        changes: of the layer.
        branches: the branch of each change of the weight.

    Raises:
        LoraError: for factors that the layer's dtype cannot hold; a sentence without its subject.
    """

    def __init__(self, layer: Int8Layer, changes: IndexedChanges, branches: IndexedBranches):
        super().__init__(layer, changes)
        self.float_weight = layer.float_weight
        self.scale = layer.scale.clone()  # [N, 1], without any LoRA
        correction = find_correction(layer)
        self.correction = None if correction is None else correction.clone()  # [K / g, N], the same
        self.row_factors: list[tuple[int, Tensor]] = []
        self.indices: list[int] = []  # of the LoRAs that have a low-rank part
        pairs: list[tuple[Tensor, Tensor]] = []  # lora_A [r, K], lora_B [N, r]
        for index, branch in branches:
            if branch.row_factor is not None:
                self.row_factors.append((index, branch.row_factor.to(layer.scale)))
            if branch.lora_A is not None and branch.lora_B is not None:
                lora_A, lora_B = balance_factors(branch.lora_A, branch.lora_B)
                check_fits(lora_A, layer.dtype)
                self.indices.append(index)
                pairs.append((lora_A, lora_B))
        self.branch = self.make_branch(layer, pairs) if pairs else None

    def make_branch(
        self, layer: Int8Layer, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> LowRankBranch | ConvBranch:
        """One branch for all low-rank parts, inside the backend's product where that can be."""
        if isinstance(layer, Int8Conv):
            return layer.make_branch(pairs)
        branch = LowRankBranch(pairs, layer.dtype, layer.scale.device)
        if layer.can_fuse_branch:
            branch.fuse_into_backend(layer.backend, layer.transform)
        # a layer that may run in float needs the branch in float as well
        has_float_fallback = layer.float_weight is not None and not self.row_factors
        if branch.fused is not None and not has_float_fallback:
            branch.drop_float_factors()
        return branch

    def attach(self) -> None:
        """Put the branch beside the layer."""
        layer = self.layer
        self.bias.attach(layer)
        set_adapter(layer, self.branch)
        if self.row_factors:
            # a float copy of the weight would have to follow every strength of an adapter that scales rows
            layer.float_weight = None

    def switch_branch(self, *, on: bool) -> None:
        """Put the branch beside its layer, or take it off for as long as the layer's own time is measured."""
        layer = self.layer
        branch = self.branch if on else None
        set_adapter(layer, branch)
        if self.row_factors and self.float_weight is not None:
            layer.float_weight = None if on else self.float_weight.to(layer.scale.device)

    @torch.no_grad()
    def restore(self) -> None:
        """Take the branch off, and bring back the scales and the float copy of the weight."""
        layer = self.layer
        if self.branch is not None:
            self.branch.set_strengths([0.0] * len(self.indices))
        set_adapter(layer, None)
        if self.row_factors:
            self.write_row_factors(layer, torch.ones_like(self.scale))
            if self.float_weight is not None:
                layer.float_weight = self.float_weight.to(layer.scale.device)
        self.bias.restore(layer)

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the strengths into the branch, and the rows' scales times `1 + sum of strength * factor`."""
        layer = self.layer
        if self.branch is not None:
            self.branch.set_strengths([strengths[index] for index in self.indices])
        if self.row_factors:
            total_factor = torch.ones_like(self.scale)  # [N, 1]
            for index, factor in self.row_factors:
                total_factor.add_(factor, alpha=strengths[index])
            self.write_row_factors(layer, total_factor)
        self.bias.set_strengths(layer, strengths)

    def write_row_factors(self, layer: Int8Layer, factor: Tensor) -> None:
        """Multiply the rows of the weight, all that a correction adds to them included. factor: as scale."""
        layer.scale.copy_(self.scale * factor)
        correction = find_correction(layer)
        if correction is not None and self.correction is not None:
            correction.copy_(self.correction * factor)


def find_correction(layer: Int8Layer) -> Tensor | None:
    """What is added to each group of a weight with 4 bits, [K / g, N]; None: nothing is."""
    return layer.correction if isinstance(layer, GroupedInt8Linear) else None


def set_adapter(layer: Int8Layer, branch: LowRankBranch | ConvBranch | None) -> None:
    """Put the branch that `DynamicLayer.make_branch` made for a layer beside it; None: take it off."""
    if isinstance(layer, Int8Conv):
        assert not isinstance(branch, LowRankBranch)
        layer.set_adapter(branch)
    else:
        assert not isinstance(branch, ConvBranch)
        layer.set_adapter(branch)


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
    # A = triangleᵀ qᵀ, so that the SVD is one of r columns
    q, triangle = torch.linalg.qr(lora_A.T)  # [K, r], [r, r]
    u, s, v = torch.linalg.svd(lora_B @ triangle.T, full_matrices=False)  # [N, r], [r], [r, r]
    generator = torch.Generator().manual_seed(0)
    random_matrix = torch.randn(len(s), len(s), generator=generator)
    rotation = torch.linalg.qr(random_matrix).Q.to(u.device)  # [r, r]
    return rotation.T @ (s[:, None] * v) @ q.T, u @ rotation


class MergedLayer(Int8LoraLayer):
    """LoRAs written into the weight of one INT8 layer; every strength starts from the weight as it was."""

    def __init__(self, layer: Int8Layer, changes: IndexedChanges):
        super().__init__(layer, changes)
        self.deltas = get_weight_deltas(changes)
        self.original = layer.read_stored_weight()
        # None while the weight is being written: whatever stops that half-way, it is written anew
        self.written_strengths: list[float] | None = [0.0 for _ in self.deltas]
        self.clipped_share = 0.0

    def attach(self) -> None:
        """Give the layer a bias where LoRAs need one; its weight stays until there are strengths."""
        self.bias.attach(self.layer)

    def restore(self) -> None:
        """Write the integers as they were, and the bias."""
        self.write_weight([0.0 for _ in self.deltas], self.original)
        self.bias.restore(self.layer)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the weight for these strengths, unless the layer has it; at 0 it is the original exactly."""
        own_strengths = [strengths[index] for index, _ in self.deltas]
        if own_strengths != self.written_strengths:
            weight = self.original
            if any(own_strengths):
                weight = self.compute_weight(strengths)
            self.write_weight(own_strengths, weight)
        self.bias.set_strengths(self.layer, strengths)

    def write_weight(self, own_strengths: list[float], weight: LayerWeight) -> None:
        """Give the layer the weight of these strengths, unless it has it."""
        if own_strengths != self.written_strengths:
            device = self.layer.scale.device
            self.written_strengths = None
            self.layer.set_weight(weight.to(device))
            self.written_strengths = own_strengths
        if not any(own_strengths):
            self.clipped_share = 0.0

    @abstractmethod
    def compute_weight(self, strengths: Sequence[float]) -> LayerWeight:
        """The layer's weight with the LoRAs of the stack at these strengths."""


class BakedLayer(MergedLayer):
    """The sum in float, transformed and rounded like any weight: the error is that of a fresh quantization.

    Args:
        layer: is changed.
        changes: of the layer.
        float_weight: what the layer was quantized from.
        rounding: of the sum.
    """

    def __init__(self, layer: Int8Layer, changes: IndexedChanges, float_weight: Tensor, rounding: Rounding):
        super().__init__(layer, changes)
        self.float_weight, self.rounding = float_weight, rounding

    @torch.no_grad()
    def compute_weight(self, strengths: Sequence[float]) -> LayerWeight:
        """`round(transform(W0 + sum of strength * delta))`."""
        merged = add_deltas(self.float_weight, self.deltas, strengths, self.float_weight)
        matrix = merged.flatten(1)  # of a convolution [N, C / groups, *kernel] -> [N, K]
        layout = find_layout(self.original)
        return round_to_bits(self.rounding, self.layer.transform.transform_weight(matrix), None, layout)


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
        layer: Int8Layer,
        changes: IndexedChanges,
        read_weight: Callable[[], Tensor],
        seed: Sequence[object],
    ):
        super().__init__(layer, changes)
        self.read_weight, self.seed = read_weight, tuple(seed)

    @torch.no_grad()
    def compute_weight(self, strengths: Sequence[float]) -> LayerWeight:
        """`integers + stochastic_round(transform(sum of strength * delta) / scale)`."""
        original = self.read_weight()  # [N, K]
        zeros = torch.zeros(original.shape, device=original.device)
        change = add_deltas(zeros, self.deltas, strengths, original)
        transformed_change = self.layer.transform.transform_weight(change.flatten(1))  # [N, K]
        rounded = add_change(self.original, transformed_change, make_generator(*self.seed))
        self.clipped_share = rounded.clipped_share
        return rounded.weight
