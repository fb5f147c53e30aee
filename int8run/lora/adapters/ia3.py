"""(IA)3: one learned factor for each output or input feature (LyCORIS `modules/ia3.py`)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import LoraDelta, RuntimeBranch, broadcast_to_dim, format_shape
from int8run.lora.adapters.row_selection import SelectedRows, select_rows


@dataclass(frozen=True, eq=False)
class IA3:
    """`delta W = diag(factor) @ W0`, or with `on_input` `delta W = W0 @ diag(factor)`.

    From Liu et al. 2022, arXiv 2205.05638. The bias is left as it is, as LyCORIS merges it.

    Args:
        factor: [N], or [K] with `on_input`.
        on_input: the columns of the weight are scaled, and not its rows.
    """

    factor: Tensor
    on_input: bool = False

    adapter_type = "IA3"
    rank = None
    scale = 1.0
    needs_weight = True

    @property
    def dim(self) -> int:
        """The dimension of the weight that is scaled."""
        return 1 if self.on_input else 0

    @property
    def out_features(self) -> int | None:
        """N; factors of columns fit any number of rows."""
        return None if self.on_input else self.factor.shape[0]

    @property
    def has_branch(self) -> bool:
        """Row factors go into the scales of the layer's rows; for columns there is no such place."""
        return not self.on_input

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has as many rows, or columns, as there are factors."""
        num_factors = self.factor.shape[0]
        if len(shape) > self.dim and shape[self.dim] == num_factors:
            return None
        scaled = "columns" if self.on_input else "rows"
        return f"scales the {num_factors} {scaled} of a weight, the model's is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`diag(factor) @ W0` or `W0 @ diag(factor)`."""
        factor = self.factor.float().to(weight.device)
        return weight.float() * broadcast_to_dim(factor, self.dim, weight.dim())

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """The row factors alone."""
        if not self.has_branch:
            return None
        return RuntimeBranch(row_factor=self.factor.float())

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The factors of the rows; those of columns hold for every row."""
        if not self.on_input:
            return replace(self, factor=select_rows(self.factor, index))
        has_untouched_rows = bool((index < 0).any())
        if has_untouched_rows:
            return SelectedRows(self, index)
        return self
