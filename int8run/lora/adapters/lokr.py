"""LoKr: the change is a Kronecker product of two factors (LyCORIS `modules/lokr.py`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.lora.adapters.base import RuntimeBranch, describe_shape_mismatch, is_matrix
from int8run.lora.adapters.low_rank import LowRankPair, factor_rank, factorize, to_dense
from int8run.lora.adapters.row_selection import SelectedRows


@dataclass(frozen=True, eq=False)
class LoKr:
    """`delta W = (alpha / r) * kron(w1, w2)` (LyCORIS, Yeh et al. 2023, arXiv 2309.14859).

    Each factor is full or low-rank. Alpha belongs to the low-rank ones; two full factors have scale 1 in
    LyCORIS, and alpha / r in PEFT.

    Args:
        w1: [a, c].
        w2: [b, d, *kernel].
        scale: alpha / r.
    """

    w1: Tensor | LowRankPair
    w2: Tensor | LowRankPair
    scale: float = 1.0

    adapter_type = "LoKr"
    needs_weight = False

    @property
    def rank(self) -> int | None:
        for factor in (self.w2, self.w1):
            if isinstance(factor, LowRankPair):
                return factor.down.shape[0]
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product: [a * b, c * d, *kernel]."""
        (a, c), (b, d, *kernel) = self.w1.shape, self.w2.shape
        return a * b, c * d, *kernel

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def has_branch(self) -> bool:
        branch_rank = factor_rank(self.w1) * factor_rank(self.w2)
        return is_matrix(self.shape) and branch_rank < min(self.shape[:2])

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(self.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        w1, w2 = to_dense(self.w1, weight.device), to_dense(self.w2, weight.device)
        kernel_dims = w2.dim() - w1.dim()
        w1 = w1.reshape(*w1.shape, *[1] * kernel_dims)  # [a, c] -> [a, c, 1, 1]
        return (self.scale * torch.kron(w1, w2)).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`, so that the ranks multiply."""
        if not self.has_branch:
            return None
        up_1, down_1 = factorize(self.w1)
        up_2, down_2 = factorize(self.w2)
        return RuntimeBranch(lora_A=torch.kron(down_1, down_2), lora_B=self.scale * torch.kron(up_1, up_2))

    def select_rows(self, index: Tensor) -> SelectedRows:
        return SelectedRows(self, index)
