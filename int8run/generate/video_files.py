"""Read videos with PyAV (the extra `video`): their size, their number of frames, and the frames.

Called by `media`, which reads animated images itself. Pillow's formats are not known here.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from int8run.errors import FileError
from int8run.utils.text import shorten_error

INSTALL_PYAV = "pip install 'int8run[video]'"


def read_video_header(path: Path, label: str) -> tuple[int, int, int]:
    """Width, height and number of frames of a video; the first frame is decoded.

    Args:
        path: of the file.
        label: of the file, for messages.

    Raises:
        FileError: when PyAV is missing or cannot read it, and for a video without frames.
    """
    first = next(iter_video_frames(path, label), None)
    if first is None:
        raise FileError(f"{label} has no frames; a video has several")
    with opened_video(path, label) as (container, stream):
        # packets are counted without being decoded; many files do not say how many there are
        frames = sum(1 for packet in container.demux(stream) if packet.size)
    return first.width, first.height, frames


def iter_video_frames(path: Path, label: str) -> Iterator[Image.Image]:
    """The frames of a video, one after the other, upright.

    Args:
        path: of the file.
        label: of the file, for messages.
    """
    with opened_video(path, label) as (container, stream):
        for frame in container.decode(stream):
            image: Image.Image = frame.to_image()
            # telephones write how they were held beside the frames
            rotation = getattr(frame, "rotation", 0)
            yield image.rotate(rotation, expand=True) if rotation else image


@contextmanager
def opened_video(path: Path, label: str) -> Iterator[tuple[Any, Any]]:
    """Open a video: its container and its first stream of frames.

    Args:
        path: of the file.
        label: of the file, for messages.

    Raises:
        FileError: when PyAV is missing, or cannot read it.
    """
    if importlib.util.find_spec("av") is None:
        raise FileError(
            f"{label} needs PyAV to be read: {INSTALL_PYAV}; animated GIF, WebP and PNG need nothing"
        )
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FileError(f"{label} has no frames; a video has several")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = shorten_error(getattr(error, "strerror", None) or error)
        raise FileError(f"{label} cannot be read as a video: {reason}") from error
