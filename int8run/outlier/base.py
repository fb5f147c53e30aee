"""What an outlier method is: something done to the weight once and to the input at every call.

Before rounding, `transform_input(x) @ transform_weight(W).T` equals `x @ W.T` (`tests/outlier/test_exact.py`).
"""

from typing import ClassVar, Protocol

from torch import Tensor, nn


class OutlierTransform(nn.Module):
    """The two sides of one layer's transform; this one changes nothing. Buffers move and are saved with the layer."""

    def transform_weight(self, weight: Tensor) -> Tensor:
        """Offline, once, in float32. weight: [N, K] -> [N, K]."""
        return weight

    def transform_input(self, x: Tensor) -> Tensor:
        """Online, at every call. x: [..., K] -> [..., K]."""
        return x


class OutlierMethod(Protocol):
    """A frozen dataclass with the method's settings."""

    name: ClassVar[str]

    def fit(self, weight: Tensor) -> OutlierTransform | None:
        """The transform for one layer, or None when the method cannot take a layer of this shape. weight: [N, K]."""
        ...
