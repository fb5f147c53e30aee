"""LoKr: a Kronecker product of two factors (LyCORIS, arXiv 2309.14859)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.lora.adapters.base import (
    LowRankPair,
    RuntimeBranch,
    SelectedRows,
    describe_shape_mismatch,
    factor_rank,
    factorize,
    is_matrix,
    to_dense,
)


@dataclass(frozen=True, eq=False)
class LoKr:
    """Kronecker product `scale * kron(w1, w2)`; each of the two is full or low-rank. Only a low-rank one brings an alpha."""

    w1: Tensor | LowRankPair  # [a, c]
    w2: Tensor | LowRankPair  # [b, d, *kernel]
    scale: float = 1.0

    adapter_type = "LoKr"
    needs_weight = False

    @property
    def rank(self) -> int | None:
        return next((w.down.shape[0] for w in (self.w2, self.w1) if isinstance(w, LowRankPair)), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: [a b, c d, *kernel]."""
        (a, c), (b, d, *kernel) = self.w1.shape, self.w2.shape
        return a * b, c * d, *kernel

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def has_branch(self) -> bool:
        return is_matrix(self.shape) and factor_rank(self.w1) * factor_rank(self.w2) < min(self.shape[:2])

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(self.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        w1, w2 = to_dense(self.w1, weight.device), to_dense(self.w2, weight.device)
        w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim()))
        return (self.scale * torch.kron(w1, w2)).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`: the ranks multiply."""
        if not self.has_branch:
            return None
        (up_1, down_1), (up_2, down_2) = factorize(self.w1), factorize(self.w2)
        return RuntimeBranch(torch.kron(down_1, down_2), self.scale * torch.kron(up_1, up_2))

    def select_rows(self, rows: Tensor) -> "SelectedRows":
        return SelectedRows(self, rows)
