"""No outlier method: the weight and its input are rounded as they are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.outlier.base import OutlierTransform


@dataclass(frozen=True)
class NoOutlier:
    """Plain W8A8."""

    name: ClassVar[str] = "none"

    def fit(self, weight: Tensor) -> OutlierTransform:
        """The identity."""
        return OutlierTransform()
