"""What a file does to one module: an adapter of its weight, a change of its bias, or both.

`int8run.lora.load` makes one `LoraChange` for each module of a file; `int8run.lora.match` cuts it to the rows
of the model's own modules, which may be fused or split where the file's are not.
"""

from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, format_shape
from int8run.lora.adapters.row_selection import select_rows


def is_same(first: object, second: object) -> bool:
    """Whether two changes, adapters or parts of them hold the same values, in dtypes of any precision."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first.float(), second.float())
    if type(first) is not type(second):
        return False
    if not is_dataclass(first):
        return bool(first == second)
    names = [field.name for field in fields(first)]
    return all(is_same(getattr(first, name), getattr(second, name)) for name in names)


@dataclass(frozen=True, eq=False)
class LoraChange:
    """What a file does to one module: to its weight, its bias, or both.

    Args:
        weight_delta: the change of the weight.
        bias_delta: the change of the bias at strength 1, [N], with alpha / r multiplied in where it applies.
    """

    weight_delta: LoraDelta | None
    bias_delta: Tensor | None = None

    @property
    def adapter_type(self) -> str:
        """That of the weight's change; `bias` without one."""
        if self.weight_delta is None:
            return "bias"
        return self.weight_delta.adapter_type

    @property
    def out_features(self) -> int | None:
        """Output rows of the module; None: any number."""
        if self.weight_delta is not None and self.weight_delta.out_features is not None:
            return self.weight_delta.out_features
        if self.bias_delta is not None:
            return self.bias_delta.shape[0]
        return None

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a module whose weight has this shape; None: it fits."""
        if self.weight_delta is not None:
            weight_mismatch = self.weight_delta.shape_mismatch(shape)
            if weight_mismatch is not None:
                return weight_mismatch
        if self.bias_delta is not None and self.bias_delta.shape != shape[:1]:
            num_biases = self.bias_delta.shape[0]
            return f"changes a bias of {num_biases}, the model's weight is {format_shape(shape)}"
        return None

    def select_rows(self, index: Tensor) -> "LoraChange":
        """The change with these rows of this one, see `LoraDelta.select_rows`."""
        weight_delta, bias_delta = self.weight_delta, self.bias_delta
        if weight_delta is not None:
            weight_delta = weight_delta.select_rows(index)
        if bias_delta is not None:
            bias_delta = select_rows(bias_delta, index)
        return LoraChange(weight_delta, bias_delta)

    def take_rows(self, rows: slice) -> "LoraChange":
        """The part that changes these output rows of a fused matrix.

        Raises:
            LoraError: when it does not have these rows, or its adapter type cannot be cut.
        """
        num_rows = self.out_features
        if num_rows is not None and not 0 <= rows.start < rows.stop <= num_rows:
            raise LoraError(
                f"has {num_rows} rows, the model's layers take rows {rows.start} to {rows.stop} of them"
            )
        return self.select_rows(torch.arange(rows.start, rows.stop))

    def place_rows(self, start: int, total: int) -> "LoraChange":
        """The same change as rows of a taller fused matrix, which it leaves alone elsewhere.

        Args:
            start: the first row of the fused matrix that it changes.
            total: rows of the fused matrix.

        Raises:
            LoraError: when the rows do not fit in, or the adapter type cannot be placed.
        """
        num_rows = self.out_features
        if num_rows is None:
            raise LoraError(
                f"is an {self.adapter_type} on inputs, which does not say how many rows of the model's fused "
                "matrix it changes; load the model without fused projections"
            )
        if start < 0 or start + num_rows > total:
            raise LoraError(
                f"has {num_rows} rows, which do not fit from row {start} on "
                f"into the model's matrix of {total}"
            )
        index = torch.full((total,), -1)  # [total]; -1: a row that is left alone
        index[start : start + num_rows] = torch.arange(num_rows)
        return self.select_rows(index)

    def swap_halves(self) -> "LoraChange":
        """The first half of the output rows exchanged with the second.

        Raises:
            LoraError: for an odd number of rows, or an adapter type that cannot be cut.
        """
        num_rows = self.out_features
        if num_rows is None:
            return self
        if num_rows % 2:
            raise LoraError(f"has {num_rows} rows, the model exchanges their halves: the number must be even")
        return self.select_rows(torch.arange(num_rows).roll(num_rows // 2))
