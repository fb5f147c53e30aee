"""SignFlip: multiply every second input column by -1. It changes nothing but shows where a method stands."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.outlier.base import LayerStatistics, OutlierTransform


@dataclass(frozen=True)
class SignFlip:
    """Each weight column and its input times 1, -1, 1, -1 and so on.

    Args:
        start: the sign of the first column.
    """

    start: int = 1
    name: ClassVar[str] = "sign_flip"
    needs_calibration: ClassVar[bool] = False
    takes_convolutions: ClassVar[bool] = False

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes every layer."""
        return None

    def get_settings(self, in_features: int) -> dict[str, float]:
        """The first sign."""
        return {"start": self.start}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """The factors of one layer. weight: [N, K]."""
        factor = torch.ones(weight.shape[1])
        factor[self.start == 1 :: 2] = -1
        return OutlierTransform(self.name, self.get_settings(weight.shape[1]), factor=factor)
