"""What an outlier method is: something done to the weight once and to the input at every call.

Before rounding, `transform_input(x) @ transform_weight(W).T` equals `x @ W.T` (`tests/outlier/test_exact.py`).
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from int8run.kernels.quantize_rowwise.reference import transform_rows


class OutlierTransform(nn.Module):
    """The two sides of one layer's transform; this one changes nothing. Buffers move with the layer.

    The input's side is data, so that a backend can compute it inside its quantization: a factor per column, then a rotation.
    """

    factor: Tensor | None  # float32 [K]
    matrix: Tensor | None  # float32 [g, g]: regular Hadamard matrix of a group

    def __init__(self, factor: Tensor | None = None, matrix: Tensor | None = None):
        super().__init__()
        self.register_buffer("factor", factor)
        self.register_buffer("matrix", matrix, persistent=False)  # rebuilt from its size

    @property
    def group_size(self) -> int:
        """Columns that are rotated together; 0 without a rotation."""
        return 0 if self.matrix is None else self.matrix.shape[0]

    def transform_weight(self, weight: Tensor) -> Tensor:
        """Offline, once, in float32. weight: [N, K] -> [N, K]."""
        # the matrix is symmetric and its own inverse
        return transform_rows(weight if self.factor is None else weight / self.factor, None, self.matrix, -1)

    def transform_input(self, x: Tensor) -> Tensor:
        """Online, at every call; the definition of what backends do on the way. x: [..., K] -> [..., K]."""
        return transform_rows(x, self.factor, self.matrix, -1)

    def same_input_as(self, other: "OutlierTransform") -> bool:
        """Whether both do the same to their input, so that one quantization can serve both layers."""
        return (
            (self.factor is None) == (other.factor is None)
            and (self.factor is None or other.factor is None or torch.equal(self.factor, other.factor))
            and self.group_size == other.group_size
        )

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}" if self.group_size else ""


class OutlierMethod(Protocol):
    """A frozen dataclass with the method's settings."""

    name: ClassVar[str]

    def fit(self, weight: Tensor) -> OutlierTransform | None:
        """The transform for one layer, or None when the method cannot take a layer of this shape. weight: [N, K]."""
        ...
