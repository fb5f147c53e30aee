"""The INT8 layer that takes the place of an `nn.Linear`, and the low-rank branch beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8run.backends.base import Backend, FusedBranch, FusesBranch, QuantizedInput
from int8run.kernels.quantize_rowwise.reference import apply_gelu_to_columns
from int8run.outlier.base import OutlierTransform
from int8run.quant.weight import QuantizedWeight

# unit vectors that are multiplied at a time to read a weight back
UNIT_VECTORS_AT_ONCE = 1024


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name.

    Raises:
        TypeError: when the module is another kind.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer after quantization and before it is bound to a backend."""

    weight: QuantizedWeight
    transform: OutlierTransform
    bias: Tensor | None


class LowRankBranch(nn.Module):
    """The low-rank changes of one layer at run time, their ranks concatenated: `y += ((x Aᵀ) * strengths) Bᵀ`.

    The strengths are one vector on the device, an entry per rank. A change of strength writes that vector and nothing else, so
    that a compiled model stays compiled. With all of them 0 the branch is skipped, except in compiled code.

    Args:
        parts: (lora_A [r, K], lora_B [N, r]) of each LoRA, its alpha / r multiplied in.
        dtype: dtype of the float model.
    """

    lora_A: Tensor
    lora_B: Tensor
    strengths: Tensor

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.ranks = tuple(lora_A.shape[0] for lora_A, _ in parts)
        self.is_idle = True
        lora_A = torch.cat([lora_A.float() for lora_A, _ in parts])
        lora_B = torch.cat([lora_B.float() for _, lora_B in parts], dim=1)
        self.register_buffer("lora_A", lora_A.to(device, dtype), persistent=False)
        self.register_buffer("lora_B", lora_B.to(device, dtype), persistent=False)
        self.register_buffer("strengths", torch.zeros(sum(self.ranks), device=device), persistent=False)
        self.fused: FusedBranch | None = None

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One strength per part, in their order."""
        per_rank = [s for s, rank in zip(strengths, self.ranks, strict=True) for _ in range(rank)]
        self.strengths.copy_(torch.tensor(per_rank))
        self.is_idle = not any(strengths)

    def fuse_into_backend(self, backend: Backend, transform: OutlierTransform) -> None:
        """Let the backend compute the branch inside its own product, where it can. It then sees the transformed input."""
        if isinstance(backend, FusesBranch):
            self.fused = backend.fuse_branch(
                transform.transform_weight(self.lora_A.float()), self.lora_B.float(), self.lora_A.dtype
            )
            for name, operand in (self.fused._asdict() if self.fused else {}).items():
                if isinstance(operand, Tensor):  # as a buffer it counts as the model's memory
                    self.register_buffer(f"fused_{name}", operand, persistent=False)

    def drop_float_factors(self) -> None:
        """Give up the float factors of a fused branch whose layer has no float fallback, which alone would use them."""
        assert self.fused is not None
        self.lora_A, self.lora_B = self.lora_A[:0].clone(), self.lora_B[:, :0].clone()

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """y + low-rank product of x. x: [M, K], y: [M, N]; y may be overwritten."""
        assert self.lora_A.shape[0] or not self.ranks, "released"
        t = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.strengths.to(self.lora_A.dtype)
        return y.addmm_(t.to(y.dtype), self.lora_B.T.to(y.dtype))


class SharedInput:
    """One quantization for layers that read the same tensor, such as q, k and v of an attention.

    Holds the last input and what became of it until every layer of the group has come for it. An input that changed in
    between, or is another tensor, is quantized anew: sharing never depends on the order in which a model calls its layers.
    Compiled code cannot ask for a tensor's version and goes by identity alone: a model that changes a tensor in place between
    two layers that read it must not share there. None of the families in `conf/model_type/` does.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self.left = 0
        self.x: Tensor | None = None
        self.version = 0
        self.quantized: QuantizedInput | None = None

    def get(self, x: Tensor, quantize: Callable[[], QuantizedInput]) -> QuantizedInput:
        """What `quantize()` returns for x, computed by the first layer that asks."""
        # a graph has no versions, and a tensor of inference mode none either: the latter cannot be shared safely
        version = 0 if torch.compiler.is_compiling() else -1 if x.is_inference() else x._version
        if self.x is x and self.quantized is not None and version == self.version:
            found = self.quantized
            self.left -= 1
        else:
            found = quantize()
            if version < 0:
                return found
            self.x, self.version, self.quantized, self.left = x, version, found, self.layers - 1
        if self.left == 0:
            self.x = self.quantized = None
        return found


def center_rows(x: Tensor) -> Tensor:
    """Every token without the mean over its picture's tokens, and then the means. x: [..., T, K] -> float32 [B T + B, K]."""
    x = x.float()  # in half precision the difference would be rounded once more
    mean = x.mean(-2, keepdim=True)
    return torch.cat([(x - mean).flatten(0, -2), mean.flatten(0, -2)])


class KeepsDtypes(nn.Module):
    """A layer whose tensors `model.to(dtype)` moves and does not convert: as other numbers, codes and scales mean nothing."""

    # transformers asks some layers for the dtype of their weight, and passes over those that have none
    weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Int8Linear(KeepsDtypes):
    """`nn.Linear` in W8A8 on one backend, chosen when the layer is built and held by it.

    Args:
        layer: quantized weight, outlier transform and bias.
        backend: runs the product.
        dtype: dtype of the float model; the float fallback computes in it.
        float_rows: with at most this many rows, compute with the dequantized weight instead; 0: never.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    float_weight: Tensor | None

    def __init__(self, layer: QuantizedLayer, backend: Backend, dtype: torch.dtype, float_rows: int = 0):
        super().__init__()
        self.out_features, self.in_features = layer.weight.qdata.shape
        self.backend, self.transform, self.dtype, self.float_rows = (
            backend,
            layer.transform,
            dtype,
            float_rows,
        )
        self.adapter: LowRankBranch | None = None
        self.shared: SharedInput | None = None
        self.gelu_from = (
            -1
        )  # columns from here on arrive before their GELU, which the quantization computes on the way
        self.register_buffer("packed", backend.pack_weight(layer.weight), persistent=False)
        self.register_buffer("scale", layer.weight.scale[:, 0].contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        # dequantized once: a fallback that did it at every call would cost more than it saves
        self.register_buffer(
            "float_weight", layer.weight.dequantize(dtype) if float_rows else None, persistent=False
        )

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Put another weight of the same shape in place, in the transform's basis; a compiled model stays compiled."""
        self.packed, self.scale = self.backend.pack_weight(weight), weight.scale[:, 0].contiguous()
        if self.float_weight is not None:
            self.float_weight = weight.dequantize(self.dtype)

    @torch.no_grad()
    def read_qdata(self) -> Tensor:
        """The weight's integers out of the backend's own layout: its products with the unit vectors, exact. Returns int8 [N, K]."""
        ones = torch.ones_like(self.scale)
        columns = []
        for start in range(0, self.in_features, UNIT_VECTORS_AT_ONCE):
            unit = torch.zeros(
                min(UNIT_VECTORS_AT_ONCE, self.in_features - start),
                self.in_features,
                device=self.scale.device,
            )
            unit[:, start:].fill_diagonal_(1.0)
            quantized = self.backend.quantize(unit, None, None, -1, None)
            columns.append(
                self.backend.linear(quantized, self.packed, ones, None, torch.float32, None, None)
                .round()
                .to(torch.int8)
            )
        return torch.cat(columns).T.contiguous()

    def read_quantized_weight(self) -> QuantizedWeight:
        """Integers and scales of the weight, in the transform's basis."""
        return QuantizedWeight(self.read_qdata(), self.scale[:, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        return self.compute(x, self.gelu_from, self.shared)

    def compute(self, x: Tensor, gelu_from: int, shared: SharedInput | None) -> Tensor:
        """`forward` with the GELU and the sharing named, so that a measurement can leave them out."""
        rows = x.reshape(-1, self.in_features)
        # idle is asked for outside compiled code only: a graph that knew it would be built again when it changes
        branch = (
            None
            if self.adapter is None or (not torch.compiler.is_compiling() and self.adapter.is_idle)
            else self.adapter
        )
        fused = None
        if self.float_weight is not None and rows.shape[0] <= self.float_rows:
            h = self.transform.transform_input(apply_gelu_to_columns(rows, gelu_from))
            y = F.linear(
                h.to(self.dtype), self.float_weight, None if self.bias is None else self.bias.to(self.dtype)
            ).to(x.dtype)
        else:
            fused = None if branch is None else branch.fused
            down = None if fused is None else fused.down_with_input
            # without a token axis there is no mean over tokens; one over a batch would mix pictures
            centered = self.transform.centered and x.dim() > 2
            quantize = lambda: self.backend.quantize(  # noqa: E731
                center_rows(x) if centered else rows,
                self.transform.factor,
                self.transform.rotation,
                gelu_from,
                down,
            )
            quantized = quantize() if shared is None or down is not None else shared.get(x, quantize)
            strengths = None if fused is None or branch is None else branch.strengths
            bias = None if centered else self.bias
            y = self.backend.linear(quantized, self.packed, self.scale, bias, x.dtype, fused, strengths)
            y = self.with_mean(y, x.shape) if centered else y
        if branch is not None and fused is None:  # two products of its own, from the untransformed input
            y = branch.add_product(y, apply_gelu_to_columns(rows, gelu_from))
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    def with_mean(self, y: Tensor, shape: torch.Size) -> Tensor:
        """The products of `centered_rows`, put together. y: [B T + B, N] -> [B T, N]; shape: [..., T, K], where B counts `...`."""
        rows, tokens = shape[:-1].numel(), shape[-2]
        mean = y[rows:] if self.bias is None else y[rows:] + self.bias.to(y.dtype)
        return y[:rows].add_(mean.repeat_interleave(tokens, dim=0))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend.name}"
        )
