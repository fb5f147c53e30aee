"""LoHa: the elementwise product of two low-rank matrices (arXiv 2108.06098; LyCORIS)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.lora.adapters.base import (
    LowRankPair,
    RuntimeBranch,
    describe_shape_mismatch,
    is_matrix,
)


@dataclass(frozen=True, eq=False)
class LoHa:
    """Hadamard product of two low-rank matrices: `scale * first * second`, elementwise."""

    first: LowRankPair
    second: LowRankPair
    scale: float = 1.0

    adapter_type = "LoHa"
    needs_weight = False

    @property
    def rank(self) -> int:
        return self.first.down.shape[0]

    @property
    def out_features(self) -> int:
        return self.first.shape[0]

    @property
    def has_branch(self) -> bool:
        rank = self.first.up.shape[1] * self.second.up.shape[1]
        return is_matrix(self.first.shape) and rank < min(self.first.shape[:2])

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(self.first.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        return (
            self.scale * self.first.to_dense(weight.device) * self.second.to_dense(weight.device)
        ).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """All products of a column of one factor with a column of the other: rank r²."""
        if not self.has_branch:
            return None
        (up_1, down_1), (up_2, down_2) = self.first.compute_factors(), self.second.compute_factors()
        lora_B = torch.einsum("ni,nj->nij", up_1, up_2).flatten(1)
        lora_A = torch.einsum("ik,jk->ijk", down_1, down_2).flatten(0, 1)
        return RuntimeBranch(lora_A, self.scale * lora_B)

    def select_rows(self, rows: Tensor) -> "LoHa":
        return replace(self, first=self.first.select_rows(rows), second=self.second.select_rows(rows))
