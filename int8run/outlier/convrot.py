"""ConvRot: rotate groups of input features by a regular Hadamard matrix, so that no single feature sets the scale."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import regular_hadamard
from int8run.outlier.base import OutlierTransform


@dataclass(frozen=True)
class ConvRot:
    """Groups of `group_size`, or the largest power of 4 that divides the layer's input features."""

    group_size: int = 256
    name: ClassVar[str] = "convrot"

    def __post_init__(self) -> None:
        if self.group_size not in (4, 16, 64, 256, 1024):
            raise ConfigError(f"outlier.group_size is {self.group_size}; convrot takes 4, 16, 64, 256 or 1024")

    def fit(self, weight: Tensor) -> OutlierTransform | None:
        """A rotation for this width, or None when it is not a multiple of 4. weight: [N, K]."""
        group = self.group_size
        while group >= 4 and weight.shape[1] % group:
            group //= 4
        return OutlierTransform(matrix=regular_hadamard(group)) if group >= 4 else None
