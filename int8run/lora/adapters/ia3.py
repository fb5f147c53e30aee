"""(IA)3: one learned factor for each output or input feature (LyCORIS `modules/ia3.py`)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import LoraDelta, RuntimeBranch, broadcast_to_dim, format_shape
from int8run.lora.adapters.row_selection import SelectedRows, select_rows


@dataclass(frozen=True, eq=False)
class IA3:
    """`delta W = diag(factor) @ W`, or with `on_input` `delta W = W @ diag(factor)`.

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
        return None if self.on_input else self.factor.shape[0]

    @property
    def has_branch(self) -> bool:
        return not self.on_input

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) > self.dim and shape[self.dim] == self.factor.shape[0]:
            return None
        scaled = "columns" if self.on_input else "rows"
        return f"scales the {self.factor.shape[0]} {scaled} of a weight, the model's is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        factor = self.factor.float().to(weight.device)
        return weight.float() * broadcast_to_dim(factor, self.dim, weight.dim())

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        return RuntimeBranch(row_factor=self.factor.float()) if self.has_branch else None

    def select_rows(self, index: Tensor) -> LoraDelta:
        if not self.on_input:
            return replace(self, factor=select_rows(self.factor, index))
        # factors of columns are the same for every row; only rows of zeros must be left alone
        has_empty_rows = bool((index < 0).any())
        return SelectedRows(self, index) if has_empty_rows else self
