"""LoHa: the change is the Hadamard product of two low-rank matrices (LyCORIS `modules/loha.py`)."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from int8run.lora.adapters.base import RuntimeBranch, describe_shape_mismatch
from int8run.lora.adapters.low_rank import LowRankPair


@dataclass(frozen=True, eq=False)
class LoHa:
    """`delta W = (alpha / r) * (w1_a @ w1_b) ⊙ (w2_a @ w2_b)`, ⊙ elementwise: of rank up to r * r.

    From FedPara (Hyeon-Woo et al. 2021, arXiv 2108.06098); for diffusion models in LyCORIS (arXiv
    2309.14859).

    Args:
        first, second: the two low-rank matrices or kernels, both [N, K, *kernel].
        scale: alpha / r.
    """

    first: LowRankPair
    second: LowRankPair
    scale: float = 1.0

    adapter_type = "LoHa"
    needs_weight = False

    @property
    def rank(self) -> int:
        """r, of each of the two."""
        return self.first.down.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.first.shape[0]

    @property
    def has_branch(self) -> bool:
        """Where r * r, the rank of a branch, is still smaller than both sides of the weight as a matrix."""
        branch_rank = self.first.up_rank * self.second.up_rank
        rows, *columns = self.first.shape
        return branch_rank < min(rows, prod(columns))

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has the shape of each product."""
        return describe_shape_mismatch(self.first.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`scale * first ⊙ second`, in the shape of the weight."""
        first = self.first.to_dense(weight.device)  # [N, K, *kernel]
        second = self.second.to_dense(weight.device)  # [N, K, *kernel]
        return (self.scale * first * second).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """All products of a column of one factor with a column of the other, so that the ranks multiply.

        Entry (n, k) of the change is `(Σᵢ u1[n,i] d1[i,k]) (Σⱼ u2[n,j] d2[j,k])`, which is one sum over the
        pairs (i, j) of `u1[n,i] u2[n,j]` times `d1[i,k] d2[j,k]`.
        """
        if not self.has_branch:
            return None
        up_1, down_1 = self.first.compute_factors()  # [N, r1], [r1, K]
        up_2, down_2 = self.second.compute_factors()  # [N, r2], [r2, K]
        lora_B = torch.einsum("ni,nj->nij", up_1, up_2).flatten(1)  # [N, r1 * r2]
        lora_A = torch.einsum("ik,jk->ijk", down_1, down_2).flatten(0, 1)  # [r1 * r2, K]
        return RuntimeBranch(lora_A=lora_A, lora_B=self.scale * lora_B)

    def select_rows(self, index: Tensor) -> "LoHa":
        """Rows of both products."""
        return replace(self, first=self.first.select_rows(index), second=self.second.select_rows(index))
