"""Open images and videos of users: what is checked before a model is loaded, and what a pipeline is given.

`input_files` calls `check_image` and `check_video`, whoever makes a pipeline's arguments `open_image`,
`open_mask` and `open_video`. Pillow reads images and animations, PyAV (the extra `video`) everything else.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError

from int8run.errors import FileError
from int8run.generate.colors import find_color_change
from int8run.generate.pixels import convert_depth, convert_to_rgb, fit_image, is_deep, is_transparent
from int8run.generate.sample_inputs import InputFile, is_video_column
from int8run.generate.video_files import iter_video_frames, read_video_header
from int8run.utils.text import shorten_error

PNG, TIFF = "PNG", "TIFF"
# formats of Pillow that are read; others start programs, such as EPS
IMAGE_FORMATS = (PNG, "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", TIFF, "JPEG2000", "PPM", "TGA")
TURNED_ORIENTATIONS = (5, 6, 7, 8)  # of the EXIF: width and height change places
# a photo of a telephone with a preview or a second lens in it
STILLS_OF_SEVERAL = ("MPO",)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")
MIN_SIDE_PX = 8  # an autoencoder makes one latent of so many
# of all frames of a video: what is in memory at once is three times as many bytes
MAX_VIDEO_PIXELS = 2_000_000_000
# what Pillow's readers raise for files that are no images, or damaged ones
IMAGE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class MediaFacts:
    """What is known of an image or a video before a model is loaded.

    Args:
        width: in pixels, as it is shown.
        height: in pixels.
        frames: 1 of an image.
        conversions: what changes when it becomes RGB with 8 bits.
    """

    width: int
    height: int
    frames: int = 1
    conversions: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """Width and height for messages."""
        return f"{self.width} x {self.height}"


ALPHA = "transparent parts are laid over white"
DEEP = "16 bits become 8"


# -- before a model is loaded ------------------------------------------------------------------------


def check_image(path: Path, label: str, *, decodes: bool) -> MediaFacts:
    """Check that a file is an image which a pipeline can be given.

    Args:
        path: of the file.
        label: of the file, for messages.
        decodes: whether its pixels are read, too; else what its header and its checksums say. Those of a TIFF
            always are: Pillow turns it then.

    Raises:
        FileError: for what is no image, is damaged, animated, too small or too large.
    """
    with opened_image(path, label) as image:
        if is_animated(image):
            raise FileError(
                f"{label} has {count_frames(image)} frames, and an image has one; give it as video, or save "
                "one frame"
            )
        check_size(image.width, image.height, label)
        has_alpha = image.has_transparency_data
        conversions = list_conversions(image)
        if decodes or image.format == TIFF:
            image.load()
            has_alpha = is_transparent(convert_depth(image))
        width, height = get_shown_size(image, reads_all=decodes)
        if not decodes and image.format == PNG:
            image.verify()  # its checksums
    if has_alpha:
        conversions.append(ALPHA)
    return MediaFacts(width=width, height=height, conversions=tuple(conversions))


def check_video(path: Path, label: str) -> MediaFacts:
    """Check that a file is a video, or an animated image.

    Args:
        path: of the file.
        label: of the file, for messages.

    Raises:
        FileError: for a still image, for what is no video or has no frames, and for one that is too small or
            too large.
    """
    if is_image_file(path, label):
        with opened_image(path, label) as image:
            if not is_animated(image):
                raise FileError(f"{label} is an image of one frame; a video has several; give it as image")
            width, height = image.size
            frames = count_frames(image)
            image.seek(frames - 1)
            image.load()
    else:
        width, height, frames = read_video_header(path, label)
    check_size(width, height, label)
    if width * height * frames > MAX_VIDEO_PIXELS:
        raise FileError(
            f"{label} has {frames:,} frames of {width} x {height} pixels; all frames together may have "
            f"{MAX_VIDEO_PIXELS:,}: cut it, or make it smaller"
        )
    return MediaFacts(width=width, height=height, frames=frames)


def check_size(width: int, height: int, label: str) -> None:
    """Raise FileError for an image that shows nothing."""
    if min(width, height) < MIN_SIDE_PX:
        raise FileError(f"{label} has {width} x {height} pixels; each side has at least {MIN_SIDE_PX}")


def list_conversions(image: Image.Image) -> list[str]:
    """What changes when an image becomes RGB with 8 bits, as its header says."""
    change = find_color_change(image)
    conversions = [] if change is None else [change.text]
    if is_deep(image):
        conversions.append(DEEP)
    return conversions


def get_shown_size(image: Image.Image, *, reads_all: bool) -> tuple[int, int]:
    """Width and height after the rotation that the EXIF asks for.

    Args:
        image: as it is opened.
        reads_all: whether the EXIF is looked for behind the pixels, too, where a PNG may have it.
    """
    is_unread = image.format == PNG and "exif" not in image.info and not reads_all
    if not is_unread and image.getexif().get(ExifTags.Base.Orientation) in TURNED_ORIENTATIONS:
        return image.height, image.width
    return image.width, image.height


# -- for a pipeline ----------------------------------------------------------------------------------


def open_image(file: InputFile) -> Image.Image:
    """An image as RGB with 8 bits in sRGB, upright, transparent parts over white.

    Raises:
        FileError: when it cannot be read.
    """
    with opened_image(file.path, file.label) as image:
        return fit_image(convert_to_rgb(image), file.size, border="white")


def open_mask(file: InputFile) -> Image.Image:
    """A mask as shades of grey: white is what changes; so is what is transparent.

    Raises:
        FileError: when it cannot be read.
    """
    image = open_image(replace(file, size=None))
    return fit_image(image.convert("L"), file.size, border="black")


def open_video(file: InputFile) -> list[Image.Image]:
    """The frames of a video or of an animated image, each as RGB.

    Raises:
        FileError: when it cannot be read.
    """
    if is_image_file(file.path, file.label):
        with opened_image(file.path, file.label) as image:
            frames = [convert_to_rgb(frame) for frame in ImageSequence.Iterator(image)]
    else:
        frames = list(iter_video_frames(file.path, file.label))
    return [fit_image(frame, file.size, border="white") for frame in frames]


def read_size(column: str, file: InputFile) -> tuple[int, int]:
    """Width and height of an input, from its header; of a video, from its first frame.

    Args:
        column: that it stands in.
        file: the input.

    Raises:
        FileError: when it cannot be read.
    """
    if is_video_column(column) and not is_image_file(file.path, file.label):
        return next(iter_video_frames(file.path, file.label)).size
    with opened_image(file.path, file.label) as image:
        return get_shown_size(image, reads_all=False)


# -- Pillow ------------------------------------------------------------------------------------------


@contextmanager
def opened_image(path: Path, label: str) -> Iterator[Image.Image]:
    """Open an image; what Pillow raises while it is read becomes a FileError.

    Args:
        path: of the file.
        label: of the file, for messages.
    """
    limit = Image.MAX_IMAGE_PIXELS or 0
    try:
        with warnings.catch_warnings():
            # Pillow itself refuses twice as many
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list_formats()) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FileError(
            f"{label} is larger than the {limit:,} pixels up to which images are opened (Pillow's limit); "
            "make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        advice = "save it as PNG or JPEG"
        if path.suffix.lower() in VIDEO_SUFFIXES:
            advice = "give it as video, or save one frame"
        raise FileError(f"{label} is not an image that can be read; {advice}") from error
    except IMAGE_ERRORS as error:
        reason = shorten_error(getattr(error, "strerror", None) or error)
        raise FileError(f"{label} cannot be read as an image: {reason}; save it anew") from error


def list_formats() -> list[str]:
    """The formats of IMAGE_FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def is_image_file(path: Path, label: str) -> bool:
    """Whether Pillow knows the format of a file, be it an image or an animation.

    Raises:
        FileError: when it cannot be opened.
    """
    try:
        with Image.open(path, formats=list_formats()):
            return True
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True
    except IMAGE_ERRORS as error:
        reason = shorten_error(getattr(error, "strerror", None) or error)
        raise FileError(f"{label} cannot be read: {reason}") from error


def is_animated(image: Image.Image) -> bool:
    """Whether an image has several frames, which are not one photo with its preview."""
    return image.format not in STILLS_OF_SEVERAL and bool(getattr(image, "is_animated", False))


def count_frames(image: Image.Image) -> int:
    """The number of frames."""
    return int(getattr(image, "n_frames", 1))


# -- PyAV --------------------------------------------------------------------------------------------
