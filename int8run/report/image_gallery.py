"""The image wall: which picture stands where, and every different picture once as a data URI."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from int8run.report.run_files import make_difference_image
from int8run.report.runs import Run, pluralize

MAX_SIDE = 512  # px; a picture with a longer side is embedded as a thumbnail
THUMBNAIL_QUALITY = 90  # of WebP
MAX_BYTES = 30_000_000  # of pictures on one page, as base64
MAX_CELLS = 2000  # more make a browser slow


@dataclass
class EmbeddedImages:
    """Data URIs by id; equal pictures are one."""

    uris: dict[str, str] = field(default_factory=dict)
    thumbnails: bool = False
    _ids: dict[bytes, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Length of all data URIs."""
        return sum(map(len, self.uris.values()))

    def add(self, image: Image.Image) -> str:
        """The id of a picture."""
        image = image.convert("RGB")
        content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if content not in self._ids:
            self._ids[content] = f"p{len(self._ids)}"
            self.uris[self._ids[content]] = self.encode(image)
        return self._ids[content]

    def encode(self, image: Image.Image) -> str:
        """Exact where it is small, else a thumbnail."""
        buffer = io.BytesIO()
        if max(image.size) <= MAX_SIDE:
            image.save(buffer, "PNG", optimize=True)
            return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        self.thumbnails = True
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class SampleFiles:
    """The files of one cell."""

    image: Path
    float_image: Path | None  # the float model's
    metrics: dict[str, Any]  # the sample's quality


@dataclass(frozen=True)
class GalleryCell:
    """One place of the wall.

    Args:
        ours: id of the INT8 picture; None where there is none.
        base: id of the float model's.
        difference: id of their difference.
        same: tag of an earlier run in the row with the very same INT8 picture.
        first: whether no earlier cell of the page shows this INT8 picture.
        note: why there is no picture.
    """

    run: Run
    image: str | None = None
    float_image: str | None = None
    difference_image: str | None = None
    psnr: float | None = None
    same_as: str = ""
    is_first: bool = False
    missing_reason: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of one caption and a cell per run; what was left out is said in words."""

    runs: list[Run]
    rows: list[tuple[str, list[GalleryCell]]]
    uris: dict[str, str]
    notes: list[str]

    @property
    def has_float_images(self) -> bool:
        """Whether a float picture is there."""
        return any(cell.float_image for _, cells in self.rows for cell in cells)


def find_sample_files(run: Run) -> dict[tuple[str, int, int, str], SampleFiles]:
    """Pictures of a run by prompt, seed, which of several with that prompt and seed, and frame (empty for pictures)."""
    found: dict[tuple[str, int, int, str], SampleFiles] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for image in run.record.images:
        prompt, seed = str(image.get("prompt", "")), int(image.get("seed", 0))
        seen[prompt, seed] += 1
        ours = image.get("stills") or [image["file"]]
        floats = image.get("float_stills") or [image.get("float")]
        floats += [None] * (len(ours) - len(floats))
        stem = Path(image["file"]).stem
        for file, base in zip(ours, floats, strict=False):
            frame = Path(file).stem.removeprefix(f"{stem}_") if image.get("stills") else ""
            folder = run.record.folder
            found[prompt, seed, seen[prompt, seed], frame] = SampleFiles(
                folder / file, folder / base if base else None, image
            )
    return found


def build_gallery(runs: Sequence[Run], most_bytes: int = MAX_BYTES, most_cells: int = MAX_CELLS) -> Gallery:
    """A row per prompt, seed and frame, a column per run that has pictures."""
    found = {run.tag: find_sample_files(run) for run in runs}
    shown = [run for run in runs if found[run.tag]]
    keys = list(dict.fromkeys(key for run in shown for key in found[run.tag]))
    pictures = EmbeddedImages()
    rows: list[tuple[str, list[GalleryCell]]] = []
    notes: list[str] = []
    used: set[str] = set()
    for number, key in enumerate(keys):
        kept, before = dict(pictures.uris), pictures.bytes
        cells = build_row(shown, [found[run.tag].get(key) for run in shown], pictures, used, most_bytes)
        if rows and (
            pictures.bytes > most_bytes or (len(rows) + 1) * len(shown) > most_cells or before >= most_bytes
        ):
            pictures.uris = kept
            left = sum(key in found[run.tag] for key in keys[number:] for run in shown)
            limit = f"{most_bytes / 1e6:g} MB of pictures and {most_cells} places"
            notes.append(
                f"{pluralize(left, 'picture')} left out: a page holds at most {limit}. The runs' images/ folders have them."
            )
            break
        rows.append((format_caption(*key), cells))
    missing = sum(bool(cell.missing_reason) for _, cells in rows for cell in cells)
    if missing:
        notes.append(
            f"{pluralize(missing, 'place')} without a picture: not drawn, no file that can be read, or the page was full."
        )
    if any(key[3] for key in keys):
        notes.append("Of a video its stills are shown; the PSNR is that of all its frames.")
    if pictures.thumbnails:
        notes.append(
            f"Pictures with a side longer than {MAX_SIDE} pixels are shown as thumbnails of that size (lossy WebP); "
            "differences and PSNR are of the full pictures."
        )
    return Gallery(shown, rows, pictures.uris, notes)


def build_row(
    runs: Sequence[Run],
    files: Sequence[SampleFiles | None],
    pictures: EmbeddedImages,
    used: set[str],
    most_bytes: int,
) -> list[GalleryCell]:
    """The cells of one row; `used` are ids of INT8 pictures that stand on the page already."""
    cells = []
    first_with: dict[str, str] = {}
    for run, source in zip(runs, files, strict=True):
        if source is None:
            cells.append(GalleryCell(run, missing_reason="not drawn"))
            continue
        ours = open_image(source.image, run.record.folder)
        if ours is None or pictures.bytes >= most_bytes:
            cells.append(GalleryCell(run, missing_reason="no readable file" if ours is None else "left out"))
            continue
        base = open_image(source.float_image, run.record.folder) if source.float_image else None
        ours_id = pictures.add(ours)
        psnr = source.metrics.get("psnr_db")
        cells.append(
            GalleryCell(
                run,
                ours_id,
                pictures.add(base) if base else None,
                pictures.add(make_difference_image(base, ours)) if base else None,
                psnr,
                first_with.get(ours_id, ""),
                ours_id not in used,
            )
        )
        used.add(ours_id)
        first_with.setdefault(ours_id, run.tag)
    return cells


def open_image(path: Path, folder: Path) -> Image.Image | None:
    """A picture of the folder; None when it is not there, lies outside or cannot be read."""
    if not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # SyntaxError is Pillow's word for a broken PNG
        return None


def format_caption(prompt: str, seed: int, nth: int, frame: str) -> str:
    """What stands over a row."""
    again = f" · drawing {nth}" if nth > 1 else ""
    return f"{prompt} · seed {seed}{again}" + (f" · {frame} frame" if frame else "")
