"""Diff: the change of a weight, bias or norm as it is."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    describe_shape_mismatch,
    select_rows,
)


@dataclass(frozen=True, eq=False)
class Diff:
    """The change itself, in the weight's own shape: of a Linear or convolution (`diff`), or of a norm's weight (`norm`)."""

    value: Tensor
    adapter_type: str = "diff"

    rank = None
    scale = 1.0
    needs_weight = False
    has_branch = False

    @property
    def out_features(self) -> int:
        return self.value.shape[0]

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(tuple(self.value.shape), shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device).float().reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> None:
        return None

    def select_rows(self, rows: Tensor) -> "Diff":
        return replace(self, value=select_rows(self.value, rows))
