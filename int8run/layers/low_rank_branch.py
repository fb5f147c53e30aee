"""The low-rank branch of LoRAs beside an INT8 layer.

`int8run.lora` makes one for each layer that it changes at run time; `Int8Linear` adds it to its product, or
lets its backend compute it there.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8run.backends.base import Backend, FusedBranch, FusesBranch
from int8run.outlier.base import OutlierTransform

# the tensors of a fused branch
FUSED_OPERANDS = ("down", "up", "down_scale", "up_scale")


class BranchStrengths(nn.Module):
    """What branches of all kinds of layers have: the strengths of their LoRAs, one number for each rank.

    A change of strength writes that vector and nothing else, so that a compiled model stays compiled.

    Args:
        ranks: of each LoRA.
        device: where the layer runs.
    """

    strengths: Tensor

    def __init__(self, ranks: Sequence[int], device: torch.device):
        super().__init__()
        self.ranks = tuple(ranks)
        self.is_idle = True
        self.register_buffer("strengths", torch.zeros(sum(self.ranks), device=device), persistent=False)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Set the strength of each LoRA, in their order."""
        per_rank: list[float] = []
        for strength, rank in zip(strengths, self.ranks, strict=True):
            per_rank += [strength] * rank
        self.strengths.copy_(torch.tensor(per_rank))
        self.is_idle = not any(strengths)


class LowRankBranch(BranchStrengths):
    """The low-rank changes of one layer at run time: `y += ((x Aᵀ) * strengths) Bᵀ`.

    The ranks of all LoRAs are concatenated. The strengths are one vector on the device with an entry per
    rank. A change of strength writes that vector and nothing else, so that a compiled model stays compiled.
    With all strengths at 0 the branch is skipped, except in compiled code.

    Args:
        parts: (lora_A [r, K], lora_B [N, r]) of each LoRA, its alpha / r multiplied in.
        dtype: dtype of the float model.
        device: where the layer runs.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, device: torch.device):
        super().__init__([lora_A.shape[0] for lora_A, _ in parts], device)
        lora_A = torch.cat([lora_A.float() for lora_A, _ in parts])  # [R, K], R the sum of all ranks
        lora_B = torch.cat([lora_B.float() for _, lora_B in parts], dim=1)  # [N, R]
        self.register_buffer("lora_A", lora_A.to(device, dtype), persistent=False)
        self.register_buffer("lora_B", lora_B.to(device, dtype), persistent=False)
        self.fused: FusedBranch | None = None

    def fuse_into_backend(self, backend: Backend, transform: OutlierTransform) -> None:
        """Let the backend compute the branch inside its product, if it can.

        A fused branch reads the transformed input.
        """
        if not isinstance(backend, FusesBranch):
            return
        lora_A = transform.transform_weight(self.lora_A.float())
        self.fused = backend.fuse_branch(lora_A, self.lora_B.float(), self.lora_A.dtype)
        if self.fused is None:
            return
        # as buffers, the factors and scales count as the model's memory
        for name in FUSED_OPERANDS:
            operand = getattr(self.fused, name)
            if operand is not None:
                self.register_buffer(f"fused_{name}", operand, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Move the branch, and let the backend's operands be the tensors that were moved."""
        branch: Self = super()._apply(fn, recurse)
        if self.fused is not None:
            operands = {name: getattr(self, f"fused_{name}", None) for name in FUSED_OPERANDS}
            self.fused = self.fused._replace(**operands)  # type: ignore[arg-type]
        return branch

    def drop_float_factors(self) -> None:
        """Free the float factors of a fused branch.

        Only a layer's float fallback needs them beside the fused ones.
        """
        assert self.fused is not None
        self.lora_A = self.lora_A[:0].clone()
        self.lora_B = self.lora_B[:, :0].clone()

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus the low-rank product of x. x: [M, K], y: [M, N]; y may be overwritten."""
        assert self.lora_A.shape[0] == sum(self.ranks), "the float factors were dropped"
        hidden = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # [M, R]
        hidden = hidden * self.strengths.to(self.lora_A.dtype)
        return y.addmm_(hidden.to(y.dtype), self.lora_B.T.to(y.dtype))
