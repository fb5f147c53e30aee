"""(IA)3: a learned factor for each input or output feature (arXiv 2205.05638)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    LoraDelta,
    RuntimeBranch,
    SelectedRows,
    broadcast_to_dim,
    format_shape,
    select_rows,
)


@dataclass(frozen=True, eq=False)
class IA3:
    """Rows of the weight, or with `on_input` its columns, multiplied by `1 + factor`. The bias is left as it is, as LyCORIS merges."""

    factor: Tensor  # [N] or [K]
    on_input: bool = False

    adapter_type = "IA3"
    rank = None
    scale = 1.0
    needs_weight = True

    @property
    def out_features(self) -> int | None:
        return None if self.on_input else self.factor.shape[0]

    @property
    def has_branch(self) -> bool:
        return not self.on_input

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        axis, word = (1, "columns") if self.on_input else (0, "rows")
        if len(shape) > axis and shape[axis] == self.factor.shape[0]:
            return None
        return f"scales the {self.factor.shape[0]} {word} of a weight, the model's is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        return weight.float() * broadcast_to_dim(self.factor.float().to(weight.device), axis, weight.dim())

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        return RuntimeBranch(row_factor=self.factor.float()) if self.has_branch else None

    def select_rows(self, rows: Tensor) -> LoraDelta:
        if not self.on_input:
            return replace(self, factor=select_rows(self.factor, rows))
        return SelectedRows(self, rows) if (rows < 0).any() else self
