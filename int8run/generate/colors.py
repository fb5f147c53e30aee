"""Colors of images that have a profile (ICC).

Phones write Display P3, scanners and printers their own; models know sRGB.
Called by `pixels` for each image that is opened, and by `media` for what it says of one beforehand. Pillow's
LittleCMS does the work.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

NO_PROFILE = "CMYK becomes RGB without a color profile"
WITH_PROFILE = "the colors of its profile become sRGB"
UNUSABLE_PROFILE = "its color profile cannot be used and is ignored"
# the mode of Pillow in which colors of each kind of profile are given
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# what can be given in that mode without a change: palettes are of RGB
FITTING_MODES = {
    "RGB": ("RGB", "RGBA", "P", "PA", "L", "LA", "1"),
    "GRAY": ("L", "LA", "1"),
    "CMYK": ("CMYK",),
}
SAME_SHADES = 2  # two profiles that differ by no more are written by two programs, and mean the same


@dataclass(frozen=True)
class ColorChange:
    """What happens to the colors of an image.

    Args:
        text: what is said of it.
        transform: to sRGB, from the mode that it takes; None: Pillow converts the numbers as they are.
    """

    text: str
    transform: ImageCms.ImageCmsTransform | None = None


def find_color_change(image: Image.Image) -> ColorChange | None:
    """What happens to the colors of an image that becomes RGB; None where they stay as they are.

    Args:
        image: whose header has been read. One with more than 8 bits counts as shades of grey.
    """
    data = image.info.get("icc_profile")
    if not data:
        return ColorChange(NO_PROFILE) if image.mode == "CMYK" else None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if get_color_mode(image) not in FITTING_MODES.get(space, ()):
            return ColorChange(UNUSABLE_PROFILE)
        mode = PROFILE_MODES[space]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    # a Pillow that was built without LittleCMS raises ImportError
    except (ImageCms.PyCMSError, ImportError):
        return ColorChange(UNUSABLE_PROFILE)
    if mode != "CMYK" and keeps_colors(transform, mode):
        return None
    return ColorChange(WITH_PROFILE, transform)


def convert_colors(image: Image.Image, change: ColorChange | None) -> Image.Image:
    """An image as RGB in sRGB, without its transparency.

    Args:
        image: with 8 bits.
        change: what `find_color_change` says of it.
    """
    if change is None or change.transform is None:
        return image.convert("RGB")
    mode = change.transform.input_mode
    given = image if image.mode == mode else image.convert("RGB").convert(mode)
    return change.transform.apply(given)


def get_color_mode(image: Image.Image) -> str:
    """The mode of an image; of one with more than 8 bits that of shades of grey."""
    if image.mode.startswith("I") or image.mode == "F":
        return "L"
    return image.mode


def keeps_colors(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform changes no color that can be seen: sRGB is written in many ways.

    Args:
        transform: to sRGB.
        mode: that it takes: L or RGB.
    """
    probe = Image.linear_gradient("L") if mode == "L" else make_color_cube()
    before = np.asarray(probe.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(probe), dtype=np.int16)
    return int(np.abs(after - before).max()) <= SAME_SHADES


def make_color_cube() -> Image.Image:
    """Every combination of six shades of red, green and blue, one pixel each."""
    shades = np.arange(0, 256, 51, dtype=np.uint8)
    # [6, 6, 6, 3] -> [36, 6, 3]
    cube = np.stack(np.meshgrid(shades, shades, shades), axis=-1).reshape(36, 6, 3)
    return Image.fromarray(cube)
