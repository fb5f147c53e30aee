"""Kinds of LoRA: what each does to one weight. Dense, as a low-rank pair beside the layer, and cut to rows of a fused matrix.

A change is linear in its strength t: `W' = W + t * delta(W0)`, with W0 the weight without any LoRA, so that the order of a stack
says nothing. All sums are float32, whatever the file holds: products of float16 factors can overflow in their own dtype.
The formulas are those of LyCORIS (`lycoris/modules`) and PEFT (`peft/tuners/lora`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, format_shape, select_rows


@dataclass(frozen=True, eq=False)
class LoraChange:
    """What a file does to one module: to its weight, its bias, or both.

    Args:
        core: the change of the weight.
        bias: the change of the bias at strength 1, [N]; alpha / r is in it where it belongs there.
    """

    weight_delta: LoraDelta | None
    bias_delta: Tensor | None = None

    @property
    def adapter_type(self) -> str:
        """The core's kind; `bias` without one."""
        return "bias" if self.weight_delta is None else self.weight_delta.adapter_type

    @property
    def out_features(self) -> int | None:
        """Output rows of the module; None: any number."""
        rows = None if self.weight_delta is None else self.weight_delta.out_features
        return rows if rows is not None or self.bias_delta is None else self.bias_delta.shape[0]

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a module whose weight has this shape; None: it fits."""
        if self.weight_delta is not None and (misfit := self.weight_delta.shape_mismatch(shape)):
            return misfit
        if self.bias_delta is not None and self.bias_delta.shape != shape[:1]:
            return (
                f"changes a bias of {self.bias_delta.shape[0]}, the model's weight is {format_shape(shape)}"
            )
        return None

    def select_rows(self, rows: Tensor) -> "LoraChange":
        """Row i is this change's row `rows[i]`, or 0 where that is -1. rows: int64 [N]."""
        return LoraChange(
            None if self.weight_delta is None else self.weight_delta.select_rows(rows),
            None if self.bias_delta is None else select_rows(self.bias_delta, rows),
        )

    def take_rows(self, rows: slice) -> "LoraChange":
        """The part that changes these output rows of a fused matrix.

        Raises:
            LoraError: rows that are not there, or a kind that cannot be cut.
        """
        if self.out_features is not None and not 0 <= rows.start < rows.stop <= self.out_features:
            raise LoraError(
                f"has {self.out_features} rows, the model's layers take rows {rows.start} to {rows.stop} of them"
            )
        return self.select_rows(torch.arange(rows.start, rows.stop))

    def place_rows(self, start: int, total: int) -> "LoraChange":
        """The same change as rows `start`... of a taller fused matrix with `total` rows, and 0 elsewhere.

        Raises:
            LoraError: rows that do not fit in, or a kind that cannot be placed.
        """
        if self.out_features is None:
            raise LoraError(
                "is an IA3 on inputs, which does not say how many rows of the model's joined matrix are its own; "
                "load the model without fused projections"
            )
        if start < 0 or start + self.out_features > total:
            raise LoraError(
                f"has {self.out_features} rows, which do not fit from row {start} on into the model's matrix of {total}"
            )
        rows = torch.full((total,), -1)
        rows[start : start + self.out_features] = torch.arange(self.out_features)
        return self.select_rows(rows)

    def swap_halves(self) -> "LoraChange":
        """The first half of the output rows exchanged with the second.

        Raises:
            LoraError: an odd number of rows, or a kind that cannot be cut.
        """
        if self.out_features is None:
            return self
        if self.out_features % 2:
            raise LoraError(
                f"has {self.out_features} rows, the model exchanges their halves: the number must be even"
            )
        return self.select_rows(torch.arange(self.out_features).roll(self.out_features // 2))
