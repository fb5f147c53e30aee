"""The change of a weight as it is (LyCORIS `modules/full.py`, ComfyUI's `.diff` keys), or its new value."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import LoraDelta, describe_shape_mismatch
from int8run.lora.adapters.row_selection import SelectedRows, select_rows


@dataclass(frozen=True, eq=False)
class Diff:
    """`delta W = value`, in the weight's own shape.

    Args:
        value: of a Linear [N, K], of a convolution [N, K, kh, kw], or of a norm [N].
        adapter_type: `diff`, or `norm` for the weight of a norm.
    """

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

    def select_rows(self, index: Tensor) -> "Diff":
        return replace(self, value=select_rows(self.value, index))


@dataclass(frozen=True, eq=False)
class Replacement:
    """`delta W = value - W`: the trained value of a norm, as control LoRAs of BFL hold it.

    Args:
        value: [N], in the weight's own shape.
    """

    value: Tensor

    adapter_type = "norm"
    rank = None
    scale = 1.0
    needs_weight = True
    has_branch = False

    @property
    def out_features(self) -> int:
        return self.value.shape[0]

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(tuple(self.value.shape), shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device).float().reshape(weight.shape) - weight.float()

    def make_branch(self, weight: Tensor | None) -> None:
        return None

    def select_rows(self, index: Tensor) -> LoraDelta:
        if (index < 0).any():  # rows that are not replaced
            return SelectedRows(self, index)
        return replace(self, value=select_rows(self.value, index))
