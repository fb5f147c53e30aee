"""QuaRot as the INT8-Toolkit applies it: rotate groups of input features by Sylvester's Hadamard matrix.

Sources: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456;
SparknightLLC/ComfyUI-INT8-Toolkit, `int8_quant.py`, whose files this method reads and writes.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import Rotation, sylvester_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform

# the powers of 2 that the kernels rotate by
GROUP_SIZES = tuple(2**n for n in range(1, 11))


def check_group_size(group_size: int) -> None:
    """Check that Sylvester's construction has a matrix of this size and that the kernels take it.

    Raises:
        ConfigError: when they do not.
    """
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        allowed = f"a power of 2 from {GROUP_SIZES[0]} to {GROUP_SIZES[-1]}"
        raise ConfigError(f"outlier.group_size is {group_size!r}; choose {allowed}")


def width_unsupported_reason(group_size: int, in_features: int) -> str | None:
    """Why groups of this size do not fit a layer of this width; None when they fit."""
    if in_features % group_size == 0:
        return None
    return f"in_features={in_features} is not a multiple of {group_size}"


@dataclass(frozen=True)
class QuaRot:
    """Rotates groups of `group_size`. As in the Toolkit, other widths are not rotated at all.

    Sylvester's matrix has a row of ones: a group whose mean is far from 0 is gathered in one number. The
    matrix of `convrot` has no such row.

    Args:
        group_size: columns of a group, a power of 2; 128 in the Toolkit's files.
    """

    group_size: int = 128
    name: ClassVar[str] = "quarot"
    needs_calibration: ClassVar[bool] = False
    takes_convolutions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes widths that are multiples of its group."""
        return width_unsupported_reason(self.group_size, in_features)

    def get_settings(self, in_features: int) -> dict[str, int]:
        """The group size."""
        return {"group_size": self.group_size}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """The rotation. weight: [N, K]."""
        rotation = Rotation(sylvester_hadamard(self.group_size).to(weight.device), sylvester=True)
        return OutlierTransform(self.name, self.get_settings(weight.shape[1]), rotation=rotation)
