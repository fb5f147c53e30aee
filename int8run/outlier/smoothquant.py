"""SmoothQuant: move a part of each input feature's range into the weight.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv:2211.10438, equation 4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.errors import check_range
from int8run.outlier.base import LayerStatistics, OutlierTransform

# the least maximum of a column; keeps the factors finite for a column of zeros
SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant:
    """`s = max|x|^alpha / max|W|^(1 - alpha)` per column; x is divided by s, W multiplied.

    max|x| comes from a calibration. Layers that read the same tensor get the same s, so that they can still
    share its quantization.

    Args:
        alpha: share of the range that moves into the weight.
    """

    alpha: float = 0.5
    name: ClassVar[str] = "smoothquant"
    needs_calibration: ClassVar[bool] = True
    takes_convolutions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("outlier.alpha", self.alpha, 0, 1)

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes every layer."""
        return None

    def get_settings(self, in_features: int) -> dict[str, float]:
        """Alpha, at every width."""
        return {"alpha": self.alpha}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """The factors. weight: [N, K]."""
        assert statistics is not None, "smoothquant is fitted to calibration statistics"
        x_max = statistics.input_absmax.to(weight.device)  # float32 [K]
        w_max = statistics.weight_absmax.to(weight.device)  # float32 [K]
        s = x_max.clamp(min=SMALLEST).pow(self.alpha) / w_max.clamp(min=SMALLEST).pow(1 - self.alpha)
        # a column that was always 0 in the calibration says nothing about its range
        s = torch.where(x_max > 0, s, 1.0)
        return OutlierTransform(self.name, self.get_settings(weight.shape[1]), factor=1 / s)
