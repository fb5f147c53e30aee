"""(IA)3: a learned factor for each input or output feature (arXiv 2205.05638)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    Core,
    Dynamic,
    PickedRows,
    along,
    pick_rows,
    times,
)


@dataclass(frozen=True, eq=False)
class IA3:
    """Rows of the weight, or with `on_input` its columns, multiplied by `1 + factor`. The bias is left as it is, as LyCORIS merges."""

    factor: Tensor  # [N] or [K]
    on_input: bool = False

    kind = "IA3"
    rank = None
    scale = 1.0
    reads_weight = True

    @property
    def rows(self) -> int | None:
        return None if self.on_input else self.factor.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        return not self.on_input

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        axis, word = (1, "columns") if self.on_input else (0, "rows")
        if len(shape) > axis and shape[axis] == self.factor.shape[0]:
            return None
        return f"scales the {self.factor.shape[0]} {word} of a weight, the model's is {times(shape)}"

    def delta(self, weight: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        return weight.float() * along(self.factor.float().to(weight.device), axis, weight.dim())

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        return Dynamic(row_factor=self.factor.float()) if self.can_be_dynamic else None

    def pick(self, rows: Tensor) -> Core:
        if not self.on_input:
            return replace(self, factor=pick_rows(self.factor, rows))
        return PickedRows(self, rows) if (rows < 0).any() else self
