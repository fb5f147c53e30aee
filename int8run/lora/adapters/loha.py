"""LoHa: the elementwise product of two low-rank matrices (arXiv 2108.06098; LyCORIS)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.lora.adapters.base import (
    Dynamic,
    Pair,
    is_matrix,
    shape_misfit,
)


@dataclass(frozen=True, eq=False)
class LoHa:
    """Hadamard product of two low-rank matrices: `scale * first * second`, elementwise."""

    first: Pair
    second: Pair
    scale: float = 1.0

    kind = "LoHa"
    reads_weight = False

    @property
    def rank(self) -> int:
        return self.first.down.shape[0]

    @property
    def rows(self) -> int:
        return self.first.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        rank = self.first.up.shape[1] * self.second.up.shape[1]
        return is_matrix(self.first.shape) and rank < min(self.first.shape[:2])

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(self.first.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * self.first.dense(weight.device) * self.second.dense(weight.device)).reshape(
            weight.shape
        )

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """All products of a column of one factor with a column of the other: rank r²."""
        if not self.can_be_dynamic:
            return None
        (up_1, down_1), (up_2, down_2) = self.first.factors(), self.second.factors()
        lora_B = torch.einsum("ni,nj->nij", up_1, up_2).flatten(1)
        lora_A = torch.einsum("ik,jk->ijk", down_1, down_2).flatten(0, 1)
        return Dynamic(lora_A, self.scale * lora_B)

    def pick(self, rows: Tensor) -> "LoHa":
        return replace(self, first=self.first.pick(rows), second=self.second.pick(rows))
