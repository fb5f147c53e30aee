"""How calm a video is from frame to frame, as VBench measures it; needs nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from PIL.Image import Image

from int8run.metrics.base import NEITHER, Metric, Needs, SampleFunction, SamplePair, Scope
from int8run.metrics.edits import read_pixels, subtract_pixels


@dataclass(frozen=True)
class TemporalFlicker:
    """VBench's temporal flickering (arXiv:2311.17982): (255 − mean |x[t+1] − x[t]|) / 255 over all neighbors.

    1 is a video that stands still, so neither more nor less is better: it says something beside the float
    model's alone, and only with prompts of still scenes, which VBench asks for, is more of it calmer.
    """

    name: ClassVar[str] = "temporal_flicker"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/temporal_flickering": Metric(
            NEITHER,
            "VBench's temporal flickering of the videos, 1 is still",
            label="temporal flickering",
            lowest=0,
            highest=1,
        ),
        "float/temporal_flickering": Metric(
            NEITHER, "the same of the float model's videos", lowest=0, highest=1
        ),
    }
    needs: ClassVar[Needs] = Needs()
    scope: ClassVar[Scope] = Scope.SAMPLE

    def load(self) -> SampleFunction:
        """Nothing is loaded."""
        return self.compare

    def compare(self, pair: SamplePair) -> dict[str, float]:
        """Both videos; an image has no neighbours and no number."""
        if len(pair.frames) < 2:
            return {}
        return {
            "temporal_flickering": rate_calm(pair.frames),
            "float/temporal_flickering": rate_calm(pair.float_frames),
        }


def rate_calm(frames: Sequence[Image]) -> float:
    """1 less the mean difference between neighbouring frames, colors in 0..1."""
    differences = []
    for earlier, later in pairwise(frames):
        difference = subtract_pixels(read_pixels(later), read_pixels(earlier))
        differences.append(float(np.abs(difference).mean()))
    return 1 - float(np.mean(differences)) / 255
