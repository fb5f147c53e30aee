"""DoRA: another change of the weight, whose rows or columns get learned norms (arXiv 2402.09353)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import (
    LoraDelta,
    RuntimeBranch,
    SelectedRows,
    broadcast_to_dim,
    compute_row_norms,
    format_shape,
    select_rows,
)


@dataclass(frozen=True, eq=False)
class DoRA:
    """Another kind with trained norms: `delta = g * (W + c) - W`, c the other kind's change, `g = magnitude / ||W + c||`.

    The norm is that of each row, or with `on_input` of each input column over all rows, as LyCORIS and PEFT divide. At other
    strengths than 1 the rule is `W + t (W_dora - W)`.
    """

    inner: LoraDelta
    magnitude: Tensor  # [N], or with on_input [K]
    on_input: bool = False

    adapter_type = "DoRA"
    needs_weight = True

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    @property
    def out_features(self) -> int | None:
        return self.inner.out_features

    @property
    def has_branch(self) -> bool:
        return self.inner.has_branch and not self.on_input

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        axis, word = (1, "columns") if self.on_input else (0, "rows")
        misfit = self.inner.shape_mismatch(shape)
        if misfit is None and self.magnitude.shape[0] != shape[axis]:
            misfit = f"has DoRA norms for {self.magnitude.shape[0]} {word}, the model's weight is {format_shape(shape)}"
        return misfit

    def compute_delta(self, weight: Tensor) -> Tensor:
        original = weight.float()
        changed = original + self.inner.compute_delta(weight)
        axis = 1 if self.on_input else 0
        norm = changed.transpose(0, axis).flatten(1).norm(dim=1)
        return changed * broadcast_to_dim(self.ratio(norm), axis, weight.dim()) - original

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """Row by row: `g * (W + BA) - W = (g B) A + (g - 1) W`."""
        form = self.inner.make_branch(weight) if self.has_branch else None
        if form is None:
            return None
        if weight is None or form.lora_A is None or form.lora_B is None:
            raise TypeError(
                "DoRA divides by the norms of the weight: it has no form without a weight and a low-rank pair"
            )
        ratio = self.ratio(compute_row_norms(weight, form.lora_A, form.lora_B))
        return RuntimeBranch(form.lora_A, ratio[:, None].to(form.lora_B.device) * form.lora_B, ratio - 1)

    def ratio(self, norm: Tensor) -> Tensor:
        """g, of the norms that are there; a row of zeros stays one."""
        return self.magnitude.float().to(norm.device) / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def select_rows(self, rows: Tensor) -> LoraDelta:
        if self.on_input:
            raise LoraError(
                "its DoRA norms (dora_scale [1, in]) run over all rows of a matrix that the model splits or joins, and cannot be cut; "
                "use a file with row norms (dora_scale [out, 1]), or one made for this model's own layers"
            )
        if (rows < 0).any():  # rows of zeros have no magnitude
            return SelectedRows(self, rows)
        return replace(self, inner=self.inner.select_rows(rows), magnitude=select_rows(self.magnitude, rows))
