"""Whether a difference of two weights has a low rank, as a baked LoRA's, or is the noise of rounding.

The rows of a difference R come in blocks and are not kept. The Gram matrix `RᵀR` of noise is diagonal but for
fluctuations of a known size; a direction in which rows agree adds an eigenvalue to it. What is kept is the
product of the Gram matrix with a few random columns (a randomized range finder with half a power iteration,
Halko, Martinsson and Tropp 2011, arXiv:0909.4061), which costs 4 K columns multiplications a row.
`residue.ResidueSums` feeds it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

COLUMNS = 64  # of the random matrix: more directions than this are no low rank
SEED = 24
# a direction counts when it is this many times stronger than noise can be
MIN_STRENGTH = 1.6
# of the random columns; where more directions stand out, the change has no low rank
MAX_SHARE = 0.75
MIN_COLUMNS = 8  # of a weight: narrower ones have nothing that is low


@dataclass(frozen=True)
class LowRank:
    """The directions that stand out of a difference.

    Args:
        rank: how many.
        is_complete: whether all stand out that were looked at, so that the true rank is higher.
        share: of the difference's energy that they hold, about.
    """

    rank: int = 0
    is_complete: bool = True
    share: float = 0.0


class LowRankSketch:
    """Sums over the rows of a difference.

    Args:
        columns: K of the weight.
    """

    def __init__(self, columns: int):
        self.random = draw_columns(columns)  # [K, C]
        self.gram = torch.zeros_like(self.random)  # RᵀR times the random columns
        self.column_energy = torch.zeros(columns, dtype=torch.float64)
        self.squared_row_energy = self.largest_row = 0.0

    def add(self, difference: Tensor, row_energy: Tensor) -> None:
        """Add some rows.

        Args:
            difference: float32 [n, K].
            row_energy: sums of its squares, float64 [n].
        """
        self.column_energy += difference.square().sum(0)
        self.squared_row_energy += float(row_energy.square().sum())
        self.largest_row = max(self.largest_row, float(row_energy.max()))
        self.gram += difference.T @ (difference @ self.random)

    def find_low_rank(self) -> LowRank:
        """The directions that stand out of the noise of all rows so far."""
        energy = float(self.column_energy.sum())
        num_columns = self.random.shape[1]
        if energy == 0 or num_columns == 0:
            return LowRank()
        # without its diagonal nothing of noise is left but fluctuations
        mixed = self.gram.double() - self.column_energy[:, None] * self.random.double()  # [K, C]
        left, values, right = torch.linalg.svd(mixed, full_matrices=False)
        # RᵀR has no negative eigenvalue: below 0 are directions that rounding avoids, as GPTQ does
        signs = (left * (self.random.double() @ right.T)).sum(0)
        strengths = torch.where(signs > 0, values / self.compute_noise_edge(energy), 0)
        rank = int((strengths > MIN_STRENGTH).sum())
        found = strengths.argsort(descending=True)[:rank]
        found_energy = float(values[found].sum()) / num_columns**0.5
        return LowRank(
            rank=rank,
            is_complete=rank <= MAX_SHARE * num_columns,
            share=min(1.0, found_energy / energy),
        )

    def compute_noise_edge(self, energy: float) -> float:
        """The largest singular value of the kept product that independent noise gives.

        Rows and columns of the noise may each have sizes of their own.

        Args:
            energy: of the whole difference.
        """
        num_columns = self.random.shape[1]
        row_spread = self.squared_row_energy**0.5 / energy  # 1 / sqrt(rows) where all are alike
        largest_row = self.largest_row / energy
        largest_column = float(self.column_energy.max()) / energy
        edges = (1 + (num_columns * largest_row) ** 0.5) * (1 + (num_columns * largest_column) ** 0.5)
        edge: float = energy * row_spread * edges
        return edge


@lru_cache(maxsize=8)
def draw_columns(columns: int) -> Tensor:
    """Normal random columns, the same for every weight of a width. Returns float32 [K, C]."""
    count = min(COLUMNS, columns // 4)
    if columns < MIN_COLUMNS:
        count = 0
    return torch.randn(columns, count, generator=torch.Generator().manual_seed(SEED))
