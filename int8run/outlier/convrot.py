"""ConvRot: rotate groups of input features by a regular Hadamard matrix, so that no single feature sets the scale."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform

GROUP_SIZES = (4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class ConvRot:
    """Groups of `group_size`, or the largest power of 4 that divides the layer's input features."""

    group_size: int = 256
    name: ClassVar[str] = "convrot"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
            *smaller, largest = map(str, GROUP_SIZES)
            raise ConfigError(
                f"outlier.group_size is {self.group_size!r}; convrot takes {', '.join(smaller)} or {largest}"
            )

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes multiples of 4."""
        return f"in_features={in_features} is not a multiple of 4" if in_features % 4 else None

    def get_settings(self, in_features: int) -> dict[str, int]:
        """The group that divides the width."""
        group = self.group_size
        while in_features % group:
            group //= 4
        return {"group_size": group}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """A rotation for this width. weight: [N, K]."""
        settings = self.get_settings(weight.shape[1])
        return OutlierTransform(
            self.name, settings, rotation=Rotation(regular_hadamard(settings["group_size"]).to(weight.device))
        )
