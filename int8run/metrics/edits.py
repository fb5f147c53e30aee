"""INT8's error where an edit may change its image and where it must not, inside and outside a mask.

Called by `tasks.input_metrics`, which opens the inputs. Knows images, not pipelines or files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

# Where no mask is given, a pixel is changed if any color of the float edit differs from its input by more
# than this, in 0..1. The autoencoders of diffusion models alone move a color by a few hundredths.
CHANGE_THRESHOLD = 0.1
MASK_THRESHOLD = 128  # of 255: from here on a pixel of a gray mask is inside, as in diffusers' `binarize`
MASKED_PSNR, UNMASKED_PSNR = "masked_psnr_db", "unmasked_psnr_db"
MASKED_SHARE = "masked_share"

Pixels = NDArray[np.uint8]  # [H, W, 3]
Mask = NDArray[np.bool_]  # [H, W]


@dataclass(frozen=True)
class EditSource:
    """What an edit begins with, at any size.

    Args:
        images: the image, or the frames of the video, that is edited; empty where nothing is.
        masks: given masks, gray, white where the edit may change something: one for all frames, or one for
            each; empty where none is given.
    """

    images: Sequence[Image] = ()
    masks: Sequence[Image] = ()


@dataclass
class SquaredError:
    """Sums up the squared differences of color values in 0..255; whole numbers, so nothing is rounded."""

    total: int = 0
    num_values: int = 0

    def add(self, differences: NDArray[np.int32]) -> None:
        """Count the differences of some color values."""
        self.total += int(np.square(differences).sum(dtype=np.int64))
        self.num_values += differences.size

    def compute_psnr(self) -> float | None:
        """10 · log10(255² / mean), in dB; infinite without a difference, None without a value."""
        if self.num_values == 0:
            return None
        if self.total == 0:
            return math.inf
        mean = self.total / self.num_values
        return 10 * math.log10(255**2 / mean)

    def compute_rms(self) -> float:
        """The root of the mean square, of colors in 0..1; 0 without a value."""
        if self.num_values == 0:
            return 0.0
        return math.sqrt(self.total / self.num_values) / 255


@dataclass
class RegionErrors:
    """INT8's error to the float edit inside and outside the masks of a sample, all frames together."""

    inside: SquaredError = field(default_factory=SquaredError)
    outside: SquaredError = field(default_factory=SquaredError)

    def add(self, frame: Pixels, float_frame: Pixels, mask: Mask) -> None:
        """Count one frame.

        Args:
            frame: of the INT8 model.
            float_frame: of the float model, as large.
            mask: true where the edit may change something, as large.
        """
        differences = subtract_pixels(frame, float_frame)
        self.inside.add(differences[mask])
        self.outside.add(differences[~mask])

    @property
    def masked_share(self) -> float:
        """The share of the pixels that is inside, 0 to 1."""
        return self.inside.num_values / (self.inside.num_values + self.outside.num_values)


def measure_regions(
    frames: Sequence[Image], float_frames: Sequence[Image], source: EditSource
) -> dict[str, float]:
    """INT8's error inside and outside the mask of one edit.

    `masked_psnr_db` is the PSNR to the float edit of the pixels inside the mask, `unmasked_psnr_db` that of
    the others: 10 · log10(1 / mse) with the mean squared error of their colors in 0..1, of all frames
    together; infinite where they are identical, left out where there is no such pixel. `masked_share` is the
    share of the pixels that is inside.

    The mask is the given one. Without one, it is where the float edit differs from its input: where any color
    differs by more than CHANGE_THRESHOLD, frame by frame for a video, in the frames that both have.

    Args:
        frames: of the INT8 model; one of an image.
        float_frames: of the float model, as many.
        source: what the edit begins with. It is resized to the frames, as pipelines resize it.

    Returns:
        Metrics by name; empty where there is no mask.
    """
    masks = list_masks(float_frames, source)
    if not masks:
        return {}
    errors = RegionErrors()
    for frame, float_frame, mask in zip(frames, float_frames, masks, strict=False):
        errors.add(read_pixels(frame), read_pixels(float_frame), mask)
    values = {MASKED_SHARE: errors.masked_share}
    regions = {MASKED_PSNR: errors.inside, UNMASKED_PSNR: errors.outside}
    for name, error in regions.items():
        psnr = error.compute_psnr()
        if psnr is not None:
            values[name] = psnr
    return values


def list_masks(float_frames: Sequence[Image], source: EditSource) -> list[Mask]:
    """The mask of each frame; fewer where the input has fewer frames, none where nothing tells them."""
    size = float_frames[0].size
    if len(source.masks) == 1:
        return [read_mask(source.masks[0], size)] * len(float_frames)
    if source.masks:
        return [read_mask(mask, size) for mask in source.masks[: len(float_frames)]]
    pairs = zip(float_frames, source.images, strict=False)
    return [find_changed_pixels(float_frame, image) for float_frame, image in pairs]


def read_mask(mask: Image, size: tuple[int, int]) -> Mask:
    """The pixels inside a mask, resized and cut at half as diffusers' `VaeImageProcessor` does it.

    Args:
        mask: gray; white is inside.
        size: width and height of the frames.
    """
    gray = resize_to_output(mask.convert("L"), size)
    return np.asarray(gray) >= MASK_THRESHOLD


def find_changed_pixels(float_frame: Image, image: Image) -> Mask:
    """Where any color of a float edit differs from its input by more than CHANGE_THRESHOLD."""
    resized = resize_to_output(image.convert("RGB"), float_frame.size)
    differences = np.abs(subtract_pixels(read_pixels(float_frame), read_pixels(resized)))
    changed: Mask = differences.max(axis=-1) > CHANGE_THRESHOLD * 255
    return changed


def resize_to_output(image: Image, size: tuple[int, int]) -> Image:
    """An input as large as the output, by the filter and without the shape that diffusers keeps by default.

    Source: `VaeImageProcessor.resize` with its mode `default`: Lanczos, width and height on their own.
    """
    if image.size == size:
        return image
    return image.resize(size, Resampling.LANCZOS)


def read_pixels(image: Image) -> Pixels:
    """The colors of an image, [H, W, 3] in 0..255."""
    return np.asarray(image.convert("RGB"))


def subtract_pixels(a: Pixels, b: Pixels) -> NDArray[np.int32]:
    """a - b, which may be negative."""
    return a.astype(np.int32) - b.astype(np.int32)
