"""QuaRot as the INT8-Toolkit applies it: rotate groups of input features by Sylvester's Hadamard matrix."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import Rotation, sylvester_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform

GROUP_SIZES = tuple(2**n for n in range(1, 11))


def check_group_size(group_size: int) -> None:
    """Refuse a group that Sylvester's construction does not have, or that no kernel takes."""
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"outlier.group_size is {group_size!r}; choose a power of 2 from {GROUP_SIZES[0]} to {GROUP_SIZES[-1]}"
        )


def width_unsupported_reason(group_size: int, in_features: int) -> str | None:
    """Why groups of this size do not fit a layer."""
    return (
        f"in_features={in_features} is not a multiple of {group_size}" if in_features % group_size else None
    )


@dataclass(frozen=True)
class QuaRot:
    """Groups of `group_size`, 128 in the Toolkit's files; a width that it does not divide is not rotated at all, as there.

    Sylvester's matrix has a row of ones: a group whose mean is far from 0 is gathered in one number. `convrot` has none.
    """

    group_size: int = 128
    name: ClassVar[str] = "quarot"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes multiples of its group."""
        return width_unsupported_reason(self.group_size, in_features)

    def get_settings(self, in_features: int) -> dict[str, int]:
        """Its group."""
        return {"group_size": self.group_size}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """The rotation. weight: [N, K]."""
        rotation = Rotation(sylvester_hadamard(self.group_size).to(weight.device), sylvester=True)
        return OutlierTransform(self.name, self.get_settings(weight.shape[1]), rotation=rotation)
