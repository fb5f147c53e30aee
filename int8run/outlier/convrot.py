"""ConvRot: rotate groups of input features by a regular Hadamard matrix, so that no single feature sets the scale."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups
from int8run.outlier.base import OutlierTransform


class GroupRotation(OutlierTransform):
    """`W_g Hᵀ` offline, `x_g H` online; H is orthonormal, so the product does not change."""

    matrix: Tensor

    def __init__(self, group_size: int):
        super().__init__()
        self.group_size = group_size
        # rebuilt from the group size, so it is not part of a state dict
        self.register_buffer("matrix", regular_hadamard(group_size), persistent=False)

    def transform_weight(self, weight: Tensor) -> Tensor:
        """weight: [N, K] -> float32 [N, K]."""
        return rotate_groups(weight.float(), self.matrix.to(weight.device).T)

    def transform_input(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., K]. The matrix holds signs over a power of two: exact in every float dtype."""
        return rotate_groups(x, self.matrix.to(x.dtype))

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


@dataclass(frozen=True)
class ConvRot:
    """Groups of `group_size`, or the largest power of 4 that divides the layer's input features."""

    group_size: int = 256
    name: ClassVar[str] = "convrot"

    def __post_init__(self) -> None:
        if self.group_size not in (4, 16, 64, 256, 1024):
            raise ConfigError(f"outlier.group_size is {self.group_size}; convrot takes 4, 16, 64, 256 or 1024")

    def fit(self, weight: Tensor) -> GroupRotation | None:
        """A rotation for this width, or None when it is not a multiple of 4. weight: [N, K]."""
        group = self.group_size
        while group >= 4 and weight.shape[1] % group:
            group //= 4
        return GroupRotation(group) if group >= 4 else None
