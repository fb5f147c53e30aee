"""The change of a weight as it is (LyCORIS `modules/full.py`, ComfyUI's `.diff` keys), or its new value."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import LoraDelta, WholeWeightDelta, describe_shape_mismatch
from int8run.lora.adapters.row_selection import SelectedRows, select_rows


@dataclass(frozen=True, eq=False)
class WholeValue(WholeWeightDelta):
    """A tensor of the weight's own size; `Diff` adds it, `Replacement` puts it there.

    Args:
        value: of a Linear [N, K], of a convolution [N, K, kh, kw], or of a norm [N].
    """

    value: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.value.shape[0]

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has the shape of the value, see `describe_shape_mismatch`."""
        return describe_shape_mismatch(tuple(self.value.shape), shape)

    def get_value_like(self, weight: Tensor) -> Tensor:
        """The value in the shape and on the device of a weight, float32."""
        return self.value.to(weight.device).float().reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Diff(WholeValue):
    """`delta W = value`.

    Args:
        value: see `WholeValue`.
        adapter_type: `diff`, or `norm` for the weight of a norm.
    """

    adapter_type: str = "diff"

    needs_weight = False

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`value`."""
        return self.get_value_like(weight)

    def select_rows(self, index: Tensor) -> "Diff":
        """Rows of the value."""
        return replace(self, value=select_rows(self.value, index))


@dataclass(frozen=True, eq=False)
class Replacement(WholeValue):
    """`delta W = value - W0`: the trained value of a norm, as control LoRAs of BFL hold it."""

    adapter_type = "norm"
    needs_weight = True

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`value - W0`."""
        return self.get_value_like(weight) - weight.float()

    def select_rows(self, index: Tensor) -> LoraDelta:
        """Rows of the value; where the index is -1, a row is not replaced, which is not a value of 0."""
        if (index < 0).any():
            return SelectedRows(self, index)
        return replace(self, value=select_rows(self.value, index))
