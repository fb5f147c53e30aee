"""FLIP by `flip-evaluator`: the difference that is seen when two images take turns at one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from int8run.errors import check_range
from int8run.metrics.base import LESS, FrameFunction, Metric, Needs, Scope
from int8run.metrics.weights import needs_packages

PACKAGE = "flip-evaluator"


@dataclass(frozen=True)
class Flip:
    """LDR-FLIP of Andersson et al. 2020 (doi 10.1145/3406183), mean over the pixels; 0 for identical images.

    Args:
        pixels_per_degree: of visual angle. 67 is a 0.7 m wide 4K screen from 0.7 m, the paper's own.
    """

    pixels_per_degree: float = 67.0
    name: ClassVar[str] = "flip"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/flip": Metric(
            LESS,
            "difference that is seen when INT8's and the float image take turns",
            label="FLIP",
            lowest=0,
            highest=1,
        )
    }
    needs: ClassVar[Needs] = Needs(packages=(PACKAGE,), extra="perceptual")
    scope: ClassVar[Scope] = Scope.FRAME

    def __post_init__(self) -> None:
        check_range("metrics.measures.flip.pixels_per_degree", self.pixels_per_degree, 1, 1000)

    def load(self) -> FrameFunction:
        """Import the library; it has no weights."""
        with needs_packages(PACKAGE, "perceptual"):
            import flip_evaluator

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            _, mean_error, _ = flip_evaluator.evaluate(
                to_array(b),
                to_array(a),
                "LDR",
                applyMagma=False,
                parameters={"ppd": self.pixels_per_degree},
            )
            return {"flip": float(mean_error)}

        return measure


def to_array(image: Tensor) -> NDArray[np.float32]:
    """[1, 3, H, W] in 0..1 -> [H, W, 3], contiguous."""
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy(), dtype=np.float32)
