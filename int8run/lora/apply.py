"""The ways of bringing LoRAs to weights: added in float, beside an INT8 layer, or into its integers. Each can be undone exactly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from int8run.layers.int8_linear import Int8Linear, LowRankBranch
from int8run.lora.adapters.base import LoraDelta, RuntimeBranch
from int8run.lora.adapters.change import LoraChange
from int8run.quant.rounding import Rounding
from int8run.quant.stochastic_rounding import add_with_stochastic_rounding, make_generator
from int8run.quant.weight import QuantizedWeight

# of one module: which LoRA of the stack brings which change
IndexedChanges = Sequence[tuple[int, LoraChange]]


def get_weight_deltas(changes: IndexedChanges) -> list[tuple[int, LoraDelta]]:
    """The changes of the weight, without those of the bias alone."""
    return [(index, change.weight_delta) for index, change in changes if change.weight_delta is not None]


def add_deltas(
    start: Tensor, cores: Sequence[tuple[int, LoraDelta]], strengths: Sequence[float], original: Tensor
) -> Tensor:
    """`start + sum of strength * delta(original)` in float32, so that the order of the LoRAs says nothing.

    Args:
        strengths: one per LoRA of the stack.
        original: the weight without any LoRA.
    """
    total = start.float()
    for index, core in cores:
        if strengths[index] != 0:
            total = total + strengths[index] * core.compute_delta(original)
    return total


class FloatMerge:
    """LoRAs added to float weights and biases, with the originals kept: changing a strength starts from them.

    Weights that are not in memory are left to `merged`, which adds to them when they are read.
    """

    def __init__(self, model: nn.Module, changes: Mapping[str, IndexedChanges]):
        self.strengths: list[float] | None = None
        self.weights: dict[str, tuple[nn.Parameter, Tensor, list[tuple[int, LoraDelta]]]] = {}
        self.biases: dict[str, tuple[nn.Parameter, Tensor, list[tuple[int, Tensor]]]] = {}
        self.deferred: dict[str, list[tuple[int, LoraDelta]]] = {}
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        for name, entries in changes.items():
            module = model.get_submodule(name)
            if isinstance(module, Int8Linear):
                continue
            cores = get_weight_deltas(entries)
            if cores and isinstance(module.weight, nn.Parameter) and module.weight.is_meta:
                self.deferred[name] = cores
            elif cores and isinstance(module.weight, nn.Parameter):
                self.weights[name] = (module.weight, module.weight.detach().clone(), cores)
            if biasing := [(i, c.bias_delta) for i, c in entries if c.bias_delta is not None]:
                bias = get_or_create_bias(module, device)
                self.biases[name] = (bias, bias.detach().clone(), biasing)

    def get_original(self, name: str) -> Tensor:
        """The weight of a module without any LoRA."""
        return self.weights[name][1]

    @torch.no_grad()
    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight that was just read, with the LoRAs at the strengths of now added."""
        cores, strengths = self.deferred.get(name, []), self.strengths or []
        return (
            add_deltas(weight, cores, strengths, weight).to(weight.dtype)
            if cores and any(strengths)
            else weight
        )

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """`W = W0 + sum of strength * delta(W0)`, summed in float32 and rounded once."""
        if list(strengths) == self.strengths:
            return
        self.strengths = list(strengths)
        for weight, original, cores in self.weights.values():
            weight.copy_(add_deltas(original, cores, strengths, original))
        for bias, original, added in self.biases.values():
            merged = original.float()
            for index, part in added:
                merged = merged + strengths[index] * part.to(merged)
            bias.copy_(merged)


def get_or_create_bias(module: nn.Module, device: torch.device) -> nn.Parameter:
    """The bias of a module, made of zeros on the device where it has none."""
    if module.bias is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        module.bias = nn.Parameter(
            torch.zeros(weight.shape[0], dtype=weight.dtype, device=device), requires_grad=False
        )
    assert isinstance(module.bias, nn.Parameter)
    return module.bias


class Int8BiasMerge:
    """Bias changes of one INT8 layer; biases are float in every mode."""

    def __init__(self, layer: Int8Linear, changes: IndexedChanges):
        self.parts = [
            (index, c.bias_delta.to(layer.scale)) for index, c in changes if c.bias_delta is not None
        ]
        self.original = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias.clone()
        if self.parts and layer.bias is None:
            layer.bias = self.original.clone()
        self.bias = layer.bias

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the bias anew."""
        if self.parts and self.bias is not None:
            self.bias.copy_(self.original)
            for index, part in self.parts:
                self.bias.add_(part, alpha=strengths[index])


def make_branches(
    changes: IndexedChanges, weight: Callable[[], Tensor]
) -> list[tuple[int, RuntimeBranch]] | str:
    """What each change is beside its layer, or the reason why one of them cannot be that.

    Args:
        weight: the layer's float weight; only kinds that read it (DoRA) ask for it.
    """
    forms = []
    for index, core in get_weight_deltas(changes):
        form = core.make_branch(weight() if core.needs_weight else None)
        if form is None:
            return f"a {core.adapter_type} that has no low-rank form"
        forms.append((index, form))
    return forms


def balance_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors whose ranks are alike, so that a backend may round them: of `lora_B A = U S V`, `U Q` and `Qᵀ S V`.

    As a file has them, a few strong ranks set the scale of all others; turned by an orthogonal Q, each is a mixture of all.
    """
    q, triangle = torch.linalg.qr(lora_A.T)  # A = triangleᵀ qᵀ, so that the SVD is one of r columns
    u, s, v = torch.linalg.svd(lora_B @ triangle.T, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(s), len(s), generator=generator)).Q.to(u.device)
    return turn.T @ (s[:, None] * v) @ q.T, u @ turn


def sum_ranks(forms: Sequence[tuple[int, RuntimeBranch]]) -> int:
    """Ranks of all of them, one after the other."""
    return sum(form.lora_A.shape[0] for _, form in forms if form.lora_A is not None)


class DynamicLayer:
    """LoRAs beside one INT8 layer: a low-rank branch, and a factor per row where the kind has one (DoRA, IA3)."""

    def __init__(
        self, layer: Int8Linear, changes: IndexedChanges, forms: Sequence[tuple[int, RuntimeBranch]]
    ):
        self.layer, self.float_weight = layer, layer.float_weight
        self.bias = Int8BiasMerge(layer, changes)
        self.scale = layer.scale.clone()
        self.factors = [
            (index, f.row_factor.to(layer.scale)) for index, f in forms if f.row_factor is not None
        ]
        parts = [
            (index, (f.lora_A, f.lora_B))
            for index, f in forms
            if f.lora_A is not None and f.lora_B is not None
        ]
        self.indices = [index for index, _ in parts]
        self.branch = None
        if parts:
            self.branch = LowRankBranch(
                [balance_factors(*pair) for _, pair in parts], layer.dtype, layer.scale.device
            )
            self.branch.fuse_into_backend(layer.backend, layer.transform)
        self.attach(True)
        if self.branch is not None and self.branch.fused is not None and layer.float_weight is None:
            self.branch.drop_float_factors()

    def attach(self, on: bool) -> None:
        """Put the branch beside its layer, or take it off."""
        self.layer.adapter = self.branch if on else None
        # a second copy of the weight would have to follow every strength of a kind that scales rows
        self.layer.float_weight = None if on and self.factors else self.float_weight

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the strengths; where a kind scales rows, those scales, and biases."""
        if self.branch is not None:
            self.branch.set_strengths([strengths[i] for i in self.indices])
        if self.factors:
            factors = torch.ones_like(self.scale)
            for index, factor in self.factors:
                factors.add_(factor, alpha=strengths[index])
            self.layer.scale.copy_(self.scale * factors)
        self.bias.set_strengths(strengths)


class MergedLayer(ABC):
    """LoRAs written into one INT8 layer's weight; the layer as it was is kept, so that every strength starts from it."""

    def __init__(self, layer: Int8Linear, changes: IndexedChanges):
        self.layer, self.cores = layer, get_weight_deltas(changes)
        self.bias = Int8BiasMerge(layer, changes)
        self.original = layer.read_quantized_weight()
        self.written: list[float] = [0.0 for _ in self.cores]
        self.clipped_share = 0.0

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write the weight for these strengths, unless it is there already; without any, the original comes back bit for bit."""
        wanted = [strengths[index] for index, _ in self.cores]
        if wanted != self.written:
            self.layer.set_weight(self.weight(strengths) if any(wanted) else self.original)
            self.written = wanted
        self.clipped_share = self.clipped_share if any(wanted) else 0.0
        self.bias.set_strengths(strengths)

    @abstractmethod
    def weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        """The layer's weight with the stack's LoRAs at these strengths."""


class BakedLayer(MergedLayer):
    """The sum in float, transformed and rounded like any weight: the error is that of a fresh quantization."""

    def __init__(self, layer: Int8Linear, changes: IndexedChanges, original: Tensor, rounding: Rounding):
        super().__init__(layer, changes)
        self.float_weight, self.rounding = original, rounding

    @torch.no_grad()
    def weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        merged = add_deltas(self.float_weight, self.cores, strengths, self.float_weight)
        return self.rounding.round_weight(self.layer.transform.transform_weight(merged), None)


class StochasticLayer(MergedLayer):
    """The sum of all changes added to the integers with random rounding; no float weight is needed.

    Args:
        weight: the float weight or what the integers stand for; kinds that read it (DoRA, IA3) ask for it.
        seed: words of the generator's seed: the run's, the layer's name, the LoRA files.
    """

    def __init__(
        self, layer: Int8Linear, changes: IndexedChanges, weight: Callable[[], Tensor], seed: Sequence[object]
    ):
        super().__init__(layer, changes)
        self.read, self.seed = weight, tuple(seed)

    @torch.no_grad()
    def weight(self, strengths: Sequence[float]) -> QuantizedWeight:
        original = self.read()
        change = add_deltas(
            torch.zeros(original.shape, device=original.device), self.cores, strengths, original
        )
        rounded = add_with_stochastic_rounding(
            self.original, self.layer.transform.transform_weight(change), make_generator(*self.seed)
        )
        self.clipped_share = rounded.clipped_share
        return rounded.weight


Int8LoraLayer = DynamicLayer | BakedLayer | StochasticLayer
