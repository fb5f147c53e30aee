"""MS-SSIM, which needs no network; runs with large images have it without being asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope

MS_SSIM_SIDE = 176  # four halvings leave the 11 px that the window of the last scale covers


@dataclass(frozen=True)
class MsSsim:
    """SSIM over five scales with the weights of Wang et al. 2003, as torchmetrics computes it.

    A scale whose mean contrast term is negative counts as 0, the last scale mirrors its border.
    """

    name: ClassVar[str] = "ms_ssim"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/ms_ssim": Metric(MORE, "SSIM at several scales, of large images", highest=1)
    }
    needs: ClassVar[Needs] = Needs(min_side=MS_SSIM_SIDE)
    scope: ClassVar[Scope] = Scope.FRAME

    def load(self) -> FrameFunction:
        """Nothing is loaded."""
        return compute_ms_ssim


def compute_ms_ssim(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
    """MS-SSIM of two images [1, 3, H, W] in 0..1."""
    # not at the top: every command reads the settings that name this class, and torchmetrics takes seconds
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return {"ms_ssim": multiscale_structural_similarity_index_measure(a, b, data_range=1.0).item()}
