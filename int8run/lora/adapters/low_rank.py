"""Low-rank matrices and kernels, of which LoRA, LoHa and LoKr are made, and exact factors of matrices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.lora.adapters.row_selection import select_rows


@dataclass(frozen=True, eq=False)
class LowRankPair:
    """A matrix or kernel as `up @ down`, with a Tucker core `mid` between the two where the file has one.

    Args:
        up: [N, r] or [N, r, 1, 1].
        down: [r, K, *kernel]; with a core [r, K] or [r, K, 1, 1].
        mid: [r, r, *kernel].
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product: [N, K, *kernel]."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    @property
    def up_rank(self) -> int:
        """The inner width of the two factors that `compute_factors` returns."""
        return self.up.shape[1]

    def compute_factors(self) -> tuple[Tensor, Tensor]:
        """Two factors in float32, with the core multiplied into the second one.

        Returns:
            [N, r] and [r, K * kernel].
        """
        up = self.up.float().flatten(1)  # [N, r]
        down = self.down.float().flatten(1)  # [r, K * kernel], with a core [r, K]
        if self.mid is not None:
            core = self.mid.float()  # [r, r, *kernel]
            down = torch.einsum("mn...,nk->mk...", core, down).flatten(1)  # [r, K * kernel]
        return up, down

    def to_dense(self, device: torch.device) -> Tensor:
        """The product in float32, [N, K, *kernel], computed on a device."""
        up, down = self.compute_factors()
        product = up.to(device) @ down.to(device)  # [N, K * kernel]
        return product.reshape(self.shape)

    def select_rows(self, index: Tensor) -> "LowRankPair":
        """The pair whose product has these rows, see `LoraDelta.select_rows`."""
        return replace(self, up=select_rows(self.up, index))


def to_dense(matrix: Tensor | LowRankPair, device: torch.device) -> Tensor:
    """A matrix or kernel in float32 on a device, multiplied out."""
    if isinstance(matrix, LowRankPair):
        return matrix.to_dense(device)
    return matrix.to(device).float()


def factor_rank(matrix: Tensor | LowRankPair) -> int:
    """The inner width of what `factorize` returns, without computing it."""
    shorter_side = min(matrix.shape[:2])
    if isinstance(matrix, LowRankPair):
        return min(shorter_side, matrix.up_rank)
    return shorter_side


def factorize(matrix: Tensor | LowRankPair) -> tuple[Tensor, Tensor]:
    """The narrowest exact factors at hand: those of the pair, or the matrix itself and an identity.

    Args:
        matrix: [N, K] or [N, K, 1, 1].

    Returns:
        [N, r] and [r, K], float32, whose product is the matrix.
    """
    if isinstance(matrix, LowRankPair):
        if factor_rank(matrix) == matrix.up_rank:
            return matrix.compute_factors()
        dense = matrix.to_dense(matrix.up.device).flatten(1)  # [N, K]
    else:
        dense = matrix.float().flatten(1)  # [N, K]
    num_rows, num_columns = dense.shape
    if num_rows < num_columns:
        return torch.eye(num_rows).to(dense), dense
    return dense, torch.eye(num_columns).to(dense)
