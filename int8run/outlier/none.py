"""No outlier method: the weight and its input are rounded as they are. The shortest example of a method."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.outlier.base import NONE, LayerStatistics, OutlierTransform


@dataclass(frozen=True)
class NoOutlier:
    """Plain W8A8."""

    name: ClassVar[str] = NONE
    needs_calibration: ClassVar[bool] = False
    takes_convolutions: ClassVar[bool] = True

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes every layer."""
        return None

    def get_settings(self, in_features: int) -> dict[str, float]:
        """None."""
        return {}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """The identity."""
        return OutlierTransform()
