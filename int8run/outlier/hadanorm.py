"""HadaNorm as the INT8-Toolkit applies it: scaled columns, a rotation, and centered tokens.

Sources: Federici et al. 2025, "HadaNorm: Diffusion Transformer Quantization through Mean-Centered
Transformations", arXiv:2506.09932; SparknightLLC/ComfyUI-INT8-Toolkit, `int8_quant.py`, which scales by the
weight's maxima.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.errors import check_range
from int8run.kernels.hadamard.reference import Rotation, sylvester_hadamard
from int8run.outlier.base import LayerStatistics, OutlierTransform
from int8run.outlier.quarot import check_group_size, width_unsupported_reason

# the least maximum of a column, and the least sigma, as in the Toolkit
SMALLEST = 1e-6


@dataclass(frozen=True)
class HadaNorm:
    """`sigma = max|W|^(alpha - 1)` per column; W is multiplied by sigma, x divided by it, both are rotated.

    x - mean(x) and mean(x) over the tokens are quantized separately and their products added, which is exact
    before rounding. This costs a pass over the input and a row per image. Layers that read the same tensor do
    not share its quantization, because sigma depends on the weight.

    Args:
        group_size: columns of a rotated group, a power of 2.
        alpha: share of a column's range that stays in the weight.
    """

    group_size: int = 128
    alpha: float = 0.5
    name: ClassVar[str] = "hadanorm"
    needs_calibration: ClassVar[bool] = False
    takes_convolutions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_range("outlier.alpha", self.alpha, 0, 1)

    def unsupported_reason(self, in_features: int) -> str | None:
        """It takes widths that are multiples of its group."""
        return width_unsupported_reason(self.group_size, in_features)

    def get_settings(self, in_features: int) -> dict[str, float]:
        """Group size and alpha."""
        return {"group_size": self.group_size, "alpha": self.alpha}

    def fit(self, weight: Tensor, statistics: LayerStatistics | None = None) -> OutlierTransform:
        """Sigma from the weight, and the rotation. weight: [N, K]."""
        w_max = weight.detach().float().abs().amax(0).clamp(min=SMALLEST)  # [N, K] -> [K]
        sigma = w_max.pow(self.alpha - 1).clamp(min=SMALLEST)
        matrix = sylvester_hadamard(self.group_size).to(weight.device)
        return OutlierTransform(
            self.name,
            self.get_settings(weight.shape[1]),
            factor=1 / sigma,
            rotation=Rotation(matrix, sylvester=True),
            centered=True,
        )
