"""Diff: the change of a weight, bias or norm as it is."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    pick_rows,
    shape_misfit,
)


@dataclass(frozen=True, eq=False)
class Diff:
    """The change itself, in the weight's own shape: of a Linear or convolution (`diff`), or of a norm's weight (`norm`)."""

    value: Tensor
    kind: str = "diff"

    rank = None
    scale = 1.0
    reads_weight = False
    can_be_dynamic = False

    @property
    def rows(self) -> int:
        return self.value.shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(tuple(self.value.shape), shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device).float().reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> None:
        return None

    def pick(self, rows: Tensor) -> "Diff":
        return replace(self, value=pick_rows(self.value, rows))
