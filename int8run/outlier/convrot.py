"""ConvRot: rotate groups of input features by a regular Hadamard matrix.

An outlier is spread over its group, so that no single feature sets the scale of a row. In a regular Hadamard
matrix all rows have the same sum, so that the mean of a group is not gathered in one number.

Source: Huang et al. 2025, "ConvRot: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion
Transformers", arXiv:2512.03673. Comfy-Org/comfy-kitchen has the same rotation.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform

GROUP_SIZES = (4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class ConvRot:
    """Rotates groups of `group_size`, or of the largest power of 4 below it that divides the layer's width.

    Args:
        group_size: columns of a group; a power of 4.
    """

    group_size: int = 256
    name: ClassVar[str] = "convrot"
    needs_calibration: ClassVar[bool] = False
    takes_convolutions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
            *smaller, largest = map(str, GROUP_SIZES)
            raise ConfigError(
                f"outlier.group_size is {self.group_size!r}; convrot takes {', '.join(smaller)} or {largest}"
            )

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes widths that are multiples of 4."""
        return f"in_features={in_features} is not a multiple of 4" if in_features % 4 else None

    def get_settings(self, in_features: int) -> dict[str, int]:
        """The group size that divides the width."""
        group = self.group_size
        while in_features % group:
            group //= 4
        return {"group_size": group}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """A rotation for this width. weight: [N, K]."""
        settings = self.get_settings(weight.shape[1])
        matrix = regular_hadamard(settings["group_size"]).to(weight.device)
        return OutlierTransform(self.name, settings, rotation=Rotation(matrix))
