"""Kinds of LoRA: what each does to one weight. Dense, as a low-rank pair beside the layer, and cut to rows of a fused matrix.

A change is linear in its strength t: `W' = W + t * delta(W0)`, with W0 the weight without any LoRA, so that the order of a stack
says nothing. All sums are float32, whatever the file holds: products of float16 factors can overflow in their own dtype.
The formulas are those of LyCORIS (`lycoris/modules`) and PEFT (`peft/tuners/lora`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import Core, pick_rows, times


@dataclass(frozen=True, eq=False)
class Change:
    """What a file does to one module: to its weight, its bias, or both.

    Args:
        core: the change of the weight.
        bias: the change of the bias at strength 1, [N]; alpha / r is in it where it belongs there.
    """

    core: Core | None
    bias: Tensor | None = None

    @property
    def kind(self) -> str:
        """The core's kind; `bias` without one."""
        return "bias" if self.core is None else self.core.kind

    @property
    def rows(self) -> int | None:
        """Output rows of the module; None: any number."""
        rows = None if self.core is None else self.core.rows
        return rows if rows is not None or self.bias is None else self.bias.shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a module whose weight has this shape; None: it fits."""
        if self.core is not None and (misfit := self.core.misfit(shape)):
            return misfit
        if self.bias is not None and self.bias.shape != shape[:1]:
            return f"changes a bias of {self.bias.shape[0]}, the model's weight is {times(shape)}"
        return None

    def pick(self, rows: Tensor) -> "Change":
        """Row i is this change's row `rows[i]`, or 0 where that is -1. rows: int64 [N]."""
        return Change(
            None if self.core is None else self.core.pick(rows),
            None if self.bias is None else pick_rows(self.bias, rows),
        )

    def take_rows(self, rows: slice) -> "Change":
        """The part that changes these output rows of a fused matrix.

        Raises:
            LoraError: rows that are not there, or a kind that cannot be cut.
        """
        if self.rows is not None and not 0 <= rows.start < rows.stop <= self.rows:
            raise LoraError(
                f"has {self.rows} rows, the model's layers take rows {rows.start} to {rows.stop} of them"
            )
        return self.pick(torch.arange(rows.start, rows.stop))

    def place_rows(self, start: int, total: int) -> "Change":
        """The same change as rows `start`... of a taller fused matrix with `total` rows, and 0 elsewhere.

        Raises:
            LoraError: rows that do not fit in, or a kind that cannot be placed.
        """
        if self.rows is None:
            raise LoraError(
                "is an IA3 on inputs, which does not say how many rows of the model's joined matrix are its own; "
                "load the model without fused projections"
            )
        if start < 0 or start + self.rows > total:
            raise LoraError(
                f"has {self.rows} rows, which do not fit from row {start} on into the model's matrix of {total}"
            )
        rows = torch.full((total,), -1)
        rows[start : start + self.rows] = torch.arange(self.rows)
        return self.pick(rows)

    def swap_halves(self) -> "Change":
        """The first half of the output rows exchanged with the second.

        Raises:
            LoraError: an odd number of rows, or a kind that cannot be cut.
        """
        if self.rows is None:
            return self
        if self.rows % 2:
            raise LoraError(
                f"has {self.rows} rows, the model exchanges their halves: the number must be even"
            )
        return self.pick(torch.arange(self.rows).roll(self.rows // 2))
