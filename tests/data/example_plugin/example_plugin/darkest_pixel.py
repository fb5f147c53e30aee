"""A metric: how far apart the darkest pixels of two images are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.metrics.base import LESS, FrameFunction, Metric, Needs, Scope


@dataclass(frozen=True)
class DarkestPixel:
    """The difference of the two smallest colors, times `factor`."""

    factor: float = 1.0
    name: ClassVar[str] = "darkest_pixel"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/darkest_pixel": Metric(LESS, "difference of the darkest pixels")
    }
    needs: ClassVar[Needs] = Needs()
    scope: ClassVar[Scope] = Scope.FRAME

    def load(self) -> FrameFunction:
        """Nothing is loaded."""
        return self.compare

    def compare(self, a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
        """Of two images [1, 3, H, W] in 0..1."""
        return {"darkest_pixel": self.factor * abs(a.min() - b.min()).item()}
