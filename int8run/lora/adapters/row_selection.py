"""Rows of a change: what a model needs that fuses, splits or swaps the matrices of a LoRA file.

An index of rows is int64 [N]: row i of the result is row `index[i]` of the source, or zeros where the index
is -1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.lora.adapters.base import LoraDelta, RuntimeBranch, format_shape


def select_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Row i is `tensor[index[i]]`, or zeros where the index is -1."""
    index = index.to(tensor.device)
    selected = tensor[index.clamp_min(0)]
    selected[index < 0] = 0
    return selected


@dataclass(frozen=True, eq=False)
class WrappedDelta:
    """An adapter around another one, whose rank and scale it keeps."""

    inner: LoraDelta

    @property
    def rank(self) -> int | None:
        """That of the inner adapter."""
        return self.inner.rank

    @property
    def scale(self) -> float:
        """That of the inner adapter."""
        return self.inner.scale


@dataclass(frozen=True, eq=False)
class SelectedRows(WrappedDelta):
    """Rows of a change whose factors cannot be cut themselves, such as a Kronecker product.

    Args:
        inner: the whole change.
        index: int64 [N], see above.
    """

    index: Tensor

    @property
    def adapter_type(self) -> str:
        """That of the whole change."""
        return self.inner.adapter_type

    @property
    def out_features(self) -> int:
        """N of the index."""
        return self.index.shape[0]

    @property
    def needs_weight(self) -> bool:
        """Whether the whole change does."""
        return self.inner.needs_weight

    @property
    def has_branch(self) -> bool:
        """Whether the whole change has one: its rows can be selected."""
        return self.inner.has_branch

    @property
    def inner_rows(self) -> int:
        """Rows of the matrix that the whole change was made for; at least those that are selected."""
        return self.inner.out_features or int(self.index.max()) + 1

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has the selected rows, and the columns that the whole change fits."""
        if shape[0] != self.out_features:
            return f"changes {self.out_features} rows, the model's weight is {format_shape(shape)}"
        return self.inner.shape_mismatch((self.inner_rows, *shape[1:]))

    def restore_inner_weight(self, weight: Tensor) -> Tensor:
        """The weight that the whole change was made for, as far as `weight` has its rows; zeros elsewhere."""
        shape = self.inner_rows, *weight.shape[1:]
        if not self.needs_weight:
            return weight.new_zeros(()).expand(shape)  # only its shape is used

        index = self.index.to(weight.device)  # [N]
        is_selected = index >= 0
        inner_weight = weight.new_zeros(shape)
        inner_weight[index[is_selected]] = weight[is_selected]
        return inner_weight

    def compute_delta(self, weight: Tensor) -> Tensor:
        """Rows of the whole change: [N, K, *kernel]."""
        inner_delta = self.inner.compute_delta(self.restore_inner_weight(weight))
        return select_rows(inner_delta, self.index)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """The branch of the whole change, with rows of its left factor: `(B A)[index] = B[index] A`."""
        inner_weight = None
        if weight is not None:
            inner_weight = self.restore_inner_weight(weight)
        branch = self.inner.make_branch(inner_weight)
        if branch is None:
            return None
        return RuntimeBranch(
            lora_A=branch.lora_A,
            lora_B=self.select_if_present(branch.lora_B),
            row_factor=self.select_if_present(branch.row_factor),
        )

    def select_if_present(self, tensor: Tensor | None) -> Tensor | None:
        """The selected rows of a part that a branch may lack."""
        if tensor is None:
            return None
        return select_rows(tensor, self.index)

    def select_rows(self, index: Tensor) -> "SelectedRows":
        """One index after the other: rows that either leaves out are left out."""
        rows_of_whole = self.index[index.clamp_min(0)]
        return replace(self, index=torch.where(index < 0, -1, rows_of_whole))
