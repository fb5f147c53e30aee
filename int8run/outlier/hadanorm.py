"""HadaNorm as the INT8-Toolkit applies it: columns scaled by the weight's own maxima, rotated, tokens centered."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import check_range
from int8run.kernels.hadamard.reference import Rotation, sylvester_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform
from int8run.outlier.quarot import check_group_size, width_unsupported_reason

SMALLEST = 1e-6  # of a column's maximum and of sigma, as in the Toolkit


@dataclass(frozen=True)
class HadaNorm:
    """`sigma = max|W|^(alpha - 1)` per column, W times sigma and x over sigma, both rotated; the tokens' mean is taken out.

    x - mean(x) and mean(x) are quantized on their own and their products added, which is exact before rounding. Costs a pass over
    the input and a row per picture; layers that read the same tensor do not share their quantization, since sigma is the weight's.
    """

    group_size: int = 128
    alpha: float = 0.5
    name: ClassVar[str] = "hadanorm"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_range("outlier.alpha", self.alpha, 0, 1)

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes multiples of its group."""
        return width_unsupported_reason(self.group_size, in_features)

    def get_settings(self, in_features: int) -> dict[str, float]:
        """Group and alpha."""
        return {"group_size": self.group_size, "alpha": self.alpha}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """Sigma from the weight, and the rotation. weight: [N, K]."""
        sigma = (
            weight.detach().float().abs().amax(0).clamp(min=SMALLEST).pow(self.alpha - 1).clamp(min=SMALLEST)
        )
        rotation = Rotation(sylvester_hadamard(self.group_size).to(weight.device), sylvester=True)
        return OutlierTransform(
            self.name, self.get_settings(weight.shape[1]), 1 / sigma, rotation, centered=True
        )
