"""Images of runs as data URIs, every different image once.

Used by the gallery of the report. Knows nothing of HTML, runs or samples.
"""

import base64
import hashlib
import io
import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

MAX_SIDE = 512  # px; an image with a longer side is embedded as a thumbnail
THUMBNAIL_QUALITY = 90  # of WebP


@dataclass
class EmbeddedImages:
    """Data URIs by id; equal images share one id."""

    uris: dict[str, str] = field(default_factory=dict)
    has_thumbnails: bool = False
    nbytes: int = 0  # length of all data URIs
    _ids: dict[bytes, str] = field(default_factory=dict)

    def add(self, image: Image.Image) -> str:
        """Embed an image where it is new.

        Returns:
            its id.
        """
        image = image.convert("RGB")
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if digest not in self._ids:
            self._ids[digest] = f"p{len(self._ids)}"
            uri = self.encode(image)
            self.uris[self._ids[digest]] = uri
            self.nbytes += len(uri)
        return self._ids[digest]

    @property
    def digests(self) -> dict[str, str]:
        """A hash of the pixels of each image, by its id."""
        return {image_id: digest.hex() for digest, image_id in self._ids.items()}

    def keep_first(self, number: int) -> None:
        """Drop all but the images that were added first."""
        self.uris = dict(islice(self.uris.items(), number))

    def encode(self, image: Image.Image) -> str:
        """The data URI of an image: exact where it is small, else of a thumbnail."""
        buffer = io.BytesIO()
        if max(image.size) <= MAX_SIDE:
            image.save(buffer, "PNG", optimize=True)
            return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

        self.has_thumbnails = True
        thumbnail = image.copy()
        thumbnail.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        thumbnail.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def open_image(path: Path, folder: Path) -> Image.Image | None:
    """Read an image of a run.

    Args:
        path: of the file.
        folder: of the run.

    Returns:
        None when the file is missing, lies outside the folder or cannot be read.
    """
    # not Path.resolve, which raises for links that lead to themselves
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None
