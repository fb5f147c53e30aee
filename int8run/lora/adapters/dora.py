"""DoRA: another adapter's weight, whose rows or columns get learned norms (PEFT `tuners/lora/dora.py`)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, RuntimeBranch, broadcast_to_dim, format_shape
from int8run.lora.adapters.joined_columns import JoinedColumns
from int8run.lora.adapters.row_selection import SelectedRows, WrappedDelta, select_rows

# rows of a weight that are converted to float32 at a time when their norms are computed
NORM_CHUNK_ROWS = 1024
# rows with a smaller norm count as zeros; what is divided by it stays finite
SMALLEST_NORM = 1e-30


@dataclass(frozen=True, eq=False)
class DoRA(WrappedDelta):
    """`delta W = g * (W0 + dW) - W0` with `g = magnitude / ||W0 + dW||` and dW the inner adapter's change.

    From Liu et al. 2024, arXiv 2402.09353. The norm is that of each row, or with `on_input` that of each
    input column over all rows; LyCORIS writes either, PEFT rows only. At a strength t other than 1 the rule
    is `W0 + t * delta W`.

    Args:
        inner: a low-rank adapter.
        magnitude: [N], or [K] with `on_input`.
        on_input: the norms belong to input columns.
        joined: the modules over whose rows the columns run, where the file has them in one matrix; None:
            those of the weight itself.
    """

    magnitude: Tensor
    on_input: bool = False
    joined: JoinedColumns | None = None

    adapter_type = "DoRA"
    needs_weight = True

    @property
    def dim(self) -> int:
        """The dimension of the weight along which the norms are listed: 0 for rows, 1 for columns."""
        return 1 if self.on_input else 0

    @property
    def out_features(self) -> int | None:
        """Those of the inner adapter."""
        return self.inner.out_features

    @property
    def has_branch(self) -> bool:
        """With a norm for each row, which scales a row of `lora_B` as well as one of the weight."""
        return self.inner.has_branch and not self.on_input

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The inner adapter fits, and the weight has a row, or a column, for each magnitude."""
        inner_mismatch = self.inner.shape_mismatch(shape)
        if inner_mismatch is not None:
            return inner_mismatch
        num_norms = self.magnitude.shape[0]
        if num_norms == shape[self.dim]:
            return None
        normed = "columns" if self.on_input else "rows"
        return f"has DoRA norms for {num_norms} {normed}, the model's weight is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`g * (W0 + dW) - W0`.

        Raises:
            LoraError: where the norms run over several modules, and were not read.
        """
        original = weight.float()
        changed = original + self.inner.compute_delta(weight)  # [N, K, *kernel]
        if self.joined is None:
            norms = changed.transpose(0, self.dim).flatten(1).norm(dim=1)  # [N] or [K]
        else:
            norms = self.joined.get_norms().to(changed.device)  # [K]
        ratio = broadcast_to_dim(self.compute_ratio(norms), self.dim, weight.dim())
        return changed * ratio - original

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """Row by row: `g * (W0 + BA) - W0 = (g B) A + (g - 1) W0`."""
        branch = self.inner.make_branch(weight) if self.has_branch else None
        if branch is None:
            return None
        if weight is None or branch.lora_A is None or branch.lora_B is None:
            raise TypeError(
                "DoRA divides by the norms of the weight: a branch needs the weight and a low-rank pair"
            )
        ratio = self.compute_ratio(compute_row_norms(weight, branch.lora_A, branch.lora_B))  # [N]
        return RuntimeBranch(
            lora_A=branch.lora_A,
            lora_B=ratio[:, None].to(branch.lora_B.device) * branch.lora_B,
            row_factor=ratio - 1,
        )

    def compute_ratio(self, norms: Tensor) -> Tensor:
        """g for the norms of `W0 + dW`, [N] or [K]; a row of zeros stays zero."""
        ratio = self.magnitude.float().to(norms.device) / norms.clamp_min(SMALLEST_NORM)
        return torch.where(norms < SMALLEST_NORM, 0.0, ratio)

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The change with these rows of this one.

        Raises:
            LoraError: where a norm runs over rows that are left out.
        """
        if self.on_input and self.joined is None and not self.has_all_rows(index):
            raise LoraError(
                "its DoRA norms (dora_scale [1, in]) run over all rows of a matrix, and cannot be cut; use a "
                "file with row norms (dora_scale [out, 1]), or one made for this model's own layers"
            )
        if (index < 0).any():  # rows of zeros have no magnitude
            return SelectedRows(self, index)
        selected = replace(self, inner=self.inner.select_rows(index))
        if self.on_input:
            return selected
        return replace(selected, magnitude=select_rows(self.magnitude, index))

    def has_all_rows(self, index: Tensor) -> bool:
        """Whether each row is selected once, so that the norms of the columns stay."""
        selected = index[index >= 0].sort().values
        return selected.equal(torch.arange(self.out_features or 0))


def compute_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`||W0 + lora_B lora_A||` of each row, without a second matrix of the weight's size.

    With a row w of the weight and b of lora_B the square is `w·w + 2 b·(A w) + b·(A Aᵀ b)`: nothing in it is
    wider than the rank but w itself.

    Args:
        weight: [N, K] or [N, K, 1, 1].
        lora_A: [r, K], float32.
        lora_B: [N, r], float32.

    Returns:
        [N], float32.
    """
    lora_A, lora_B = lora_A.to(weight.device), lora_B.to(weight.device)
    gram = lora_A @ lora_A.T  # [r, r]
    matrix = weight.flatten(1)  # [N, K]
    norms = []
    for start in range(0, matrix.shape[0], NORM_CHUNK_ROWS):
        w = matrix[start : start + NORM_CHUNK_ROWS].float()  # [n, K]
        b = lora_B[start : start + NORM_CHUNK_ROWS]  # [n, r]
        squares_of_weight = w.pow(2).sum(1)  # [n]
        squares_of_change = (b * (2 * (w @ lora_A.T) + b @ gram)).sum(1)  # [n], the mixed term included
        squares = squares_of_weight + squares_of_change
        norms.append(squares.clamp_min(0).sqrt())  # rounding may leave a tiny negative number
    return torch.cat(norms)
