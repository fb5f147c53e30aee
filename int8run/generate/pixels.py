"""Pixels as pipelines take them: RGB with 8 bits in sRGB, upright, without transparency.

Called by `media` with each image that is opened. Nothing is known here of files and of pipelines.
"""

import numpy as np
from PIL import Image, ImageOps

from int8run.generate.colors import convert_colors, find_color_change

WHITE = (255, 255, 255, 255)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """A copy as RGB with 8 bits in sRGB, upright, transparent parts over white.

    Caches hold what was generated from these pixels: where they change, so does `sample_inputs.COLORS`.
    """
    upright = convert_depth(ImageOps.exif_transpose(image))
    change = find_color_change(upright)
    if not upright.has_transparency_data:
        return convert_colors(upright, change)
    rgba = upright.convert("RGBA")
    colors = convert_colors(rgba, change)
    colors.putalpha(rgba.getchannel("A"))
    background = Image.new("RGBA", rgba.size, WHITE)
    return Image.alpha_composite(background, colors).convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int] | None, border: str) -> Image.Image:
    """An image at another size, whole: where its shape differs, borders are added.

    Args:
        image: RGB, or L for a mask.
        size: width and height of the result in pixels; None: those of the image.
        border: color of the borders; those of a mask are black, so that they stay.
    """
    if size is None or image.size == size:
        return image
    return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=border)


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits for each shade of grey.

    Pillow itself takes the upper 8 bits of colors with 16.
    """
    return image.mode.startswith("I") or image.mode == "F"


def convert_depth(image: Image.Image) -> Image.Image:
    """An image with 8 bits for each shade of grey; Pillow's own conversion would cut off what is above 255.

    Raises:
        ValueError: for numbers that are neither 8 nor 16 bits: what is white in them is not known.
    """
    if not is_deep(image):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are neither numbers of 8 bits nor of 16; save it as PNG")
    shades = Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
    shades.info = image.info
    return shades


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets something through."""
    if not image.has_transparency_data:
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.getextrema()[0] != 255
