"""The INT8 layer that takes the place of an `nn.Linear`, and the low-rank branch beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.outlier.base import OutlierTransform
from int8run.quant.weight import QuantizedWeight


def linear_at(model: nn.Module, name: str) -> nn.Linear:
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


@dataclass(frozen=True)
class LowRank:
    """One low-rank change of a layer: `delta W = strength * scale * lora_B @ lora_A`."""

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r

    def delta(self) -> Tensor:
        """The change at strength 1, in float32. Returns [N, K]."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())


class LowRankBranch(nn.Module):
    """The low-rank changes of one layer at run time, their ranks concatenated: `y += (x Aᵀ) Bᵀ`.

    Strengths are folded into B; a part at strength 0 is left out, and with nothing left the branch is inactive.
    """

    def __init__(self, parts: Sequence[LowRank], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.parts, self.dtype, self.device = tuple(parts), dtype, device
        self.lora_A: Tensor | None
        self.lora_B: Tensor | None
        self.register_buffer("lora_A", None, persistent=False)
        self.register_buffer("lora_B", None, persistent=False)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One strength per part, in their order."""
        active = [(p, s) for p, s in zip(self.parts, strengths, strict=True) if s != 0]
        if not active:
            self.lora_A = self.lora_B = None
            return
        self.lora_A = torch.cat([p.lora_A.float() for p, _ in active]).to(self.device, self.dtype)
        self.lora_B = torch.cat([p.lora_B.float() * (s * p.scale) for p, s in active], dim=1).to(self.device, self.dtype)

    @property
    def rank(self) -> int:
        """Ranks at work; 0 when inactive."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + low-rank product of x. x: [M, K], y: [M, N]; y may be overwritten."""
        if self.lora_A is None or self.lora_B is None:
            return y
        return y.addmm_(F.linear(x, self.lora_A), self.lora_B.T)


class Int8Linear(nn.Module):
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
    qdata: Tensor | None

    def __init__(self, layer: QuantizedLayer, backend: Backend, dtype: torch.dtype, float_rows: int = 0):
        super().__init__()
        self.out_features, self.in_features = layer.weight.qdata.shape
        self.backend, self.transform, self.dtype, self.float_rows = backend, layer.transform, dtype, float_rows
        self.adapter: LowRankBranch | None = None
        self.register_buffer("packed", backend.pack(layer.weight), persistent=False)
        self.register_buffer("scale", layer.weight.scale[:, 0].contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        # the packed layout may be opaque, so the integers stay only where the fallback needs them
        self.register_buffer("qdata", layer.weight.qdata if float_rows else None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        h = self.transform.transform_input(rows)
        if self.qdata is not None and rows.shape[0] <= self.float_rows:
            y = F.linear(h.to(self.dtype), QuantizedWeight(self.qdata, self.scale[:, None]).dequantize(self.dtype), self.bias)
            y = y.to(x.dtype)
        else:
            y = self.backend.linear(h, self.packed, self.scale, self.bias)
        if self.adapter is not None:  # the branch sees the untransformed input
            y = self.adapter.add_to(y, rows)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend.name}"
