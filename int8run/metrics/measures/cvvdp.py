"""ColorVideoVDP by `cvvdp`: a model of the eye for images and videos, without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from int8run.errors import ConfigError, check_range
from int8run.metrics.base import MORE, Metric, Needs, SampleFunction, SamplePair, Scope, UnavailableError
from int8run.metrics.weights import needs_packages

PACKAGE = "cvvdp"
METRIC = "cvvdp_jod"


@dataclass(frozen=True)
class Cvvdp:
    """ColorVideoVDP of Mantiuk et al. 2024 (doi 10.1145/3658144), in just-objectionable differences (JOD).

    10 is no visible difference; of two images that are 1 JOD apart, three in four people choose the better
    one. A video is compared as a whole, so what flickers counts as it is seen.

    Args:
        display: the screen that it is seen on, as the library calls it; tells size, distance and brightness.
        frames_per_second: of videos.
    """

    display: str = "standard_4k"
    frames_per_second: float = 16.0
    name: ClassVar[str] = "cvvdp"
    metrics: ClassVar[Mapping[str, Metric]] = {
        f"quality/{METRIC}": Metric(
            MORE,
            "visible difference to the float model, 10 at most",
            unit="JOD",
            label="ColorVideoVDP",
            highest=10,
        )
    }
    needs: ClassVar[Needs] = Needs(packages=(PACKAGE, "torchvision"), extra="cvvdp")
    scope: ClassVar[Scope] = Scope.SAMPLE

    def __post_init__(self) -> None:
        check_range("metrics.measures.cvvdp.frames_per_second", self.frames_per_second, 1, 1000)
        if not isinstance(self.display, str) or not self.display:
            raise ConfigError(
                f"metrics.measures.cvvdp.display is {self.display!r}; it takes the name of a screen, such as "
                "standard_4k, standard_fhd, standard_phone"
            )

    def load(self) -> SampleFunction:
        """Import the library and read its model of the eye, which comes with it.

        Raises:
            UnavailableError: without the library, and for a screen that it does not know.
        """
        with needs_packages(PACKAGE, "cvvdp"):
            import pycvvdp
        try:
            model = pycvvdp.cvvdp(display_name=self.display, quiet=True, device=torch.device("cpu"))
        except pycvvdp.vq_exception as error:
            raise UnavailableError(
                f"metrics.measures.cvvdp.display={self.display} is no screen that the library knows; set "
                "another one, such as standard_4k"
            ) from error

        def measure(pair: SamplePair) -> dict[str, float]:
            rate = self.frames_per_second if len(pair.frames) > 1 else 0
            jod, _ = model.predict(
                stack_frames(pair.frames), stack_frames(pair.float_frames), "FHWC", frames_per_second=rate
            )
            return {METRIC: float(jod)}

        return measure


def stack_frames(frames: Sequence[Image]) -> NDArray[np.uint8]:
    """The colors of images of one size, [F, H, W, 3]."""
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
