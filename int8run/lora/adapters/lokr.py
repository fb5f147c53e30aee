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
        """r of the second factor, else of the first; None where both are full."""
        for factor in (self.w2, self.w1):
            if isinstance(factor, LowRankPair):
                return factor.down.shape[0]
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product: [a * b, c * d, *kernel]."""
        a, c = self.w1.shape
        b, d, *kernel = self.w2.shape
        return a * b, c * d, *kernel

    @property
    def out_features(self) -> int:
        """a * b."""
        return self.shape[0]

    @property
    def has_branch(self) -> bool:
        """Where the rank of a branch is smaller than both sides of the matrix."""
        branch_rank = factor_rank(self.w1) * factor_rank(self.w2)
        return is_matrix(self.shape) and branch_rank < min(self.shape[:2])

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has the shape of the product."""
        return describe_shape_mismatch(self.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`scale * kron(w1, w2)`, in the shape of the weight."""
        w1 = to_dense(self.w1, weight.device)  # [a, c]
        w2 = to_dense(self.w2, weight.device)  # [b, d, *kernel]
        kernel_ones = [1] * (w2.dim() - w1.dim())
        w1 = w1.reshape(*w1.shape, *kernel_ones)  # [a, c] -> [a, c, 1, 1]
        product = torch.kron(w1, w2)  # [a * b, c * d, *kernel]
        return (self.scale * product).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`, so that the ranks multiply."""
        if not self.has_branch:
            return None
        up_1, down_1 = factorize(self.w1)  # [a, r1], [r1, c]
        up_2, down_2 = factorize(self.w2)  # [b, r2], [r2, d]
        lora_B = torch.kron(up_1, up_2)  # [a * b, r1 * r2]
        lora_A = torch.kron(down_1, down_2)  # [r1 * r2, c * d]
        return RuntimeBranch(lora_A=lora_A, lora_B=self.scale * lora_B)

    def select_rows(self, index: Tensor) -> SelectedRows:
        """A wrapper: rows of a Kronecker product are in general no Kronecker product."""
        return SelectedRows(self, index)
