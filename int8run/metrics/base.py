"""What a metric of images is: the protocol that the classes in `metrics.measures` have.

One file there and one YAML in `conf/metric/` make a metric. `metrics.catalog` finds them, `metrics.loading`
loads those that a run asks for. Nothing here knows a certain metric.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from PIL.Image import Image
from torch import Tensor

MORE, LESS, NEITHER = 1, -1, 0


@dataclass(frozen=True)
class Metric:
    """What a number says.

    Args:
        direction: MORE where more is better, LESS where less is better, NEITHER where neither is.
        description: in a few words.
        measure: the entry of `metrics.perceptual` that adds it; None: runs have it without being asked.
        unit: such as `dB`; empty for a number without one.
        label: in tables, where it is not its name.
        lowest, highest: what it can be; intervals of its mean end there.
    """

    direction: int
    description: str
    measure: str | None = None
    unit: str = ""
    label: str = ""
    lowest: float = -math.inf
    highest: float = math.inf


class Scope(StrEnum):
    """What one call of a metric compares."""

    FRAME = "frame"  # an image, or one frame of a video, with the float model's
    KEY_FRAMES = "key_frames"  # the same, of a video its first, middle and last frame
    SAMPLE = "sample"  # an image or a whole video with the float model's
    SET = "set"  # all images of a run with all of the float model's


@dataclass(frozen=True)
class Needs:
    """What has to be there before a metric can be computed.

    Args:
        packages: to install with pip, besides int8run's own; empty for none.
        extra: int8run's extra that brings them; empty where none does.
        min_side: pixels that the shorter side of every image must have.
        weights: the network and its size, for the documents; empty where none is downloaded.
        prompts: whether it reads the prompts.
    """

    packages: tuple[str, ...] = ()
    extra: str = ""
    min_side: int = 1
    weights: str = ""
    prompts: bool = False


@dataclass(frozen=True)
class SamplePair:
    """One image or video beside the float model's.

    Args:
        frames: of the INT8 model; one of an image.
        float_frames: of the float model, as many.
        prompt: of both.
    """

    frames: Sequence[Image]
    float_frames: Sequence[Image]
    prompt: str


# Each returns metrics by name: `lpips` becomes `quality/lpips`, and `float/clip_score` stays as it is. A
# sample without such a number has no entry, as an image has no flicker. Those of frames are called with two
# images [1, 3, H, W] in 0..1, INT8's first, and with the prompt.
FrameFunction = Callable[[Tensor, Tensor, str], dict[str, float]]
SampleFunction = Callable[[SamplePair], dict[str, float]]
SetFunction = Callable[[Sequence[SamplePair]], dict[str, float]]


class Measure(Protocol):
    """A frozen dataclass that computes one metric or several that belong together; its fields are settings.

    Attributes:
        name: in `metrics.perceptual`, and the name of its file in `conf/metric/`.
        metrics: what it adds to a run, by public name.
        needs: what has to be there.
        scope: what one call compares.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    needs: ClassVar[Needs]
    scope: ClassVar[Scope]

    def load(self) -> Callable[..., dict[str, float]]:
        """Load its network, if it has one, and return what compares.

        Returns:
            A FrameFunction, SampleFunction or SetFunction, as `scope` says.

        Raises:
            UnavailableError: where it cannot be computed here.
        """
        ...


class UnavailableError(Exception):
    """A metric that cannot be computed here: why, and what to do."""


MeasureClass = type[Any]  # of a Measure; its constructor takes its settings
