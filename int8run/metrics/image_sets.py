"""Distances between sets of images: INT8's to the float model's, and each one's to a folder of real images.

Called by the metrics of sets in `metrics.measures`, which bring what a distance is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as ImageFiles
from PIL import UnidentifiedImageError
from PIL.Image import Image
from torch import Tensor

from int8run.errors import ConfigError
from int8run.metrics.base import SamplePair, SetFunction, UnavailableError
from int8run.metrics.key_frames import select_key_frames

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MIN_IMAGES = 2
# of images as uint8 [3, H, W] in two sets
Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def check_reference(setting: str, reference: object) -> None:
    """Raise ConfigError for a `reference` that is neither a folder's name nor null."""
    if reference is not None and (not isinstance(reference, str) or not reference):
        raise ConfigError(f"{setting} is {reference!r}; it takes a folder of images, or null")


class ImageFolder(Sequence[Tensor]):
    """The images of some files as uint8 [3, H, W], each opened when it is asked for: a set may be large.

    Args:
        files: of the images.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        file = self.files[number]
        try:
            with ImageFiles.open(file) as image:
                return to_bytes(image)
        except (UnidentifiedImageError, OSError) as error:
            raise UnavailableError(f"{file} of its reference cannot be read: {error}") from error


def open_reference(reference: str | None) -> ImageFolder:
    """The images of a folder, in the order of their names; none without a folder.

    Args:
        reference: the folder.

    Raises:
        UnavailableError: when it is missing, or holds fewer than two images.
    """
    if reference is None:
        return ImageFolder([])
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise UnavailableError(f"its reference={reference} is no folder; name a folder of images")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) < MIN_IMAGES:
        raise UnavailableError(
            f"its reference={reference} holds {len(files)} images; it needs at least {MIN_IMAGES}, which end "
            f"with {', '.join(SUFFIXES)}"
        )
    return ImageFolder(files)


def to_bytes(image: Image) -> Tensor:
    """An image as uint8 [3, H, W]."""
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def make_set_function(name: str, reference: Sequence[Tensor], distance: Distance) -> SetFunction:
    """What compares the images of a run with those of the float model, and both with a reference.

    Args:
        name: of the metric. With a reference there are `NAME_reference` and `float/NAME_reference`, too.
        reference: images; empty for none.
        distance: between two sets.

    Returns:
        A function that raises UnavailableError for a set of one image, and for a damaged reference.
    """

    def measure(pairs: Sequence[SamplePair]) -> dict[str, float]:
        own = collect_images([pair.frames for pair in pairs])
        floats = collect_images([pair.float_frames for pair in pairs])
        if len(own) < MIN_IMAGES:
            raise UnavailableError(f"a set has at least {MIN_IMAGES} images, and this run one; add prompts")
        values = {name: distance(own, floats)}
        if reference:
            values[f"{name}_reference"] = distance(own, reference)
            values[f"float/{name}_reference"] = distance(floats, reference)
        return values

    return measure


def collect_images(samples: Sequence[Sequence[Image]]) -> list[Tensor]:
    """The images of a run as uint8 [3, H, W]; of a video its key frames.

    Args:
        samples: the frames of each.
    """
    images = []
    for frames in samples:
        for number in select_key_frames(len(frames)).values():
            images.append(to_bytes(frames[number]))
    return images
