"""LoKr: a Kronecker product of two factors (LyCORIS, arXiv 2309.14859)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.lora.adapters.base import (
    Dynamic,
    Pair,
    PickedRows,
    dense,
    is_matrix,
    shape_misfit,
    thin_factors,
    thin_rank,
)


@dataclass(frozen=True, eq=False)
class LoKr:
    """Kronecker product `scale * kron(w1, w2)`; each of the two is full or low-rank. Only a low-rank one brings an alpha."""

    w1: Tensor | Pair  # [a, c]
    w2: Tensor | Pair  # [b, d, *kernel]
    scale: float = 1.0

    kind = "LoKr"
    reads_weight = False

    @property
    def rank(self) -> int | None:
        return next((w.down.shape[0] for w in (self.w2, self.w1) if isinstance(w, Pair)), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: [a b, c d, *kernel]."""
        (a, c), (b, d, *kernel) = self.w1.shape, self.w2.shape
        return a * b, c * d, *kernel

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        return is_matrix(self.shape) and thin_rank(self.w1) * thin_rank(self.w2) < min(self.shape[:2])

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = dense(self.w1, weight.device), dense(self.w2, weight.device)
        w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim()))
        return (self.scale * torch.kron(w1, w2)).reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`: the ranks multiply."""
        if not self.can_be_dynamic:
            return None
        (up_1, down_1), (up_2, down_2) = thin_factors(self.w1), thin_factors(self.w2)
        return Dynamic(torch.kron(down_1, down_2), self.scale * torch.kron(up_1, up_2))

    def pick(self, rows: Tensor) -> "PickedRows":
        return PickedRows(self, rows)
