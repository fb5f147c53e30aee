"""The image gallery: which image stands in which cell, and every different image once as a data URI.

Reads the images of the runs' output folders. The page lays the cells out; this module knows nothing of HTML.
"""

import base64
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from int8run.report.image_files import make_difference_image
from int8run.report.runs import Run
from int8run.utils.plurals import count_noun

MAX_SIDE = 512  # px; an image with a longer side is embedded as a thumbnail
THUMBNAIL_QUALITY = 90  # of WebP
MAX_BYTES = 30_000_000  # of images on one page, as base64
MAX_CELLS = 2000  # more make a browser slow


class SampleKey(NamedTuple):
    """What the images of one row have in common.

    Args:
        prompt, seed: of the sample.
        repeat: 1 for the first sample with this prompt and seed, 2 for the second.
        frame: which still of a video; empty for an image.
    """

    prompt: str
    seed: int
    repeat: int
    frame: str


@dataclass(frozen=True)
class SampleFiles:
    """The files of one cell.

    Args:
        image: of the INT8 model.
        float_image: of the float model; None where it generated none.
        psnr: of the sample, in dB.
    """

    image: Path
    float_image: Path | None
    psnr: float | None


@dataclass(frozen=True)
class GalleryCell:
    """One cell: an INT8 image, the float image of the same sample, and their difference, each by its id.

    Args:
        run: the column.
        image: the INT8 image; None where there is none.
        float_image: the float model's image; None where there is none.
        difference_image: how the two differ; None without a float image.
        psnr: of the sample, in dB; None where it was not measured.
        same_as: tag of an earlier run in the row with the very same INT8 image; empty where there is none.
        is_first: whether no earlier cell of the page shows this INT8 image.
        missing_reason: why there is no image.
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
class GalleryRow:
    """The images of one sample; a cell for each run."""

    caption: str
    cells: list[GalleryCell]


@dataclass(frozen=True)
class Gallery:
    """The gallery of a page.

    Args:
        runs: the columns: runs that have images.
        rows: one per prompt, seed and frame.
        uris: every image as a data URI, by its id.
        notes: what is left out or shown otherwise, in words.
    """

    runs: list[Run]
    rows: list[GalleryRow]
    uris: dict[str, str]
    notes: list[str]

    @property
    def has_float_images(self) -> bool:
        """Whether any cell has a float image."""
        return any(cell.float_image for row in self.rows for cell in row.cells)


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


def build_gallery(runs: Sequence[Run], *, max_bytes: int = MAX_BYTES, max_cells: int = MAX_CELLS) -> Gallery:
    """Arrange the images: a row per prompt, seed and frame, a column per run that has images.

    Args:
        runs: all runs of the report.
        max_bytes: of embedded images; the first row is shown in any case.
        max_cells: the same for cells.
    """
    files_by_tag = {run.tag: find_sample_files(run) for run in runs}
    columns = [run for run in runs if files_by_tag[run.tag]]
    keys = list(dict.fromkeys(key for run in columns for key in files_by_tag[run.tag]))

    images = EmbeddedImages()
    rows: list[GalleryRow] = []
    for key in keys:
        is_full = images.nbytes >= max_bytes or (len(rows) + 1) * len(columns) > max_cells
        if rows and is_full:
            break
        num_before = len(images.uris)
        files = [files_by_tag[run.tag].get(key) for run in columns]
        row = GalleryRow(format_caption(key), build_row(columns, files, images, max_bytes))
        if rows and images.nbytes > max_bytes:
            images.keep_first(num_before)  # the row that was one too many
            break
        rows.append(row)

    rows = mark_first_images(rows)
    num_left_out = 0
    for key in keys[len(rows) :]:
        num_left_out += sum(key in files_by_tag[run.tag] for run in columns)
    notes = []
    if num_left_out:
        notes.append(
            f"{count_noun(num_left_out, 'image')} left out: a page holds at most {max_bytes / 1e6:g} MB of "
            f"images and {max_cells} cells. The runs' images/ folders have them all."
        )
    has_videos = any(key.frame for key in keys)
    notes += list_notes(rows, has_videos=has_videos, has_thumbnails=images.has_thumbnails)
    return Gallery(runs=columns, rows=rows, uris=images.uris, notes=notes)


def find_sample_files(run: Run) -> dict[SampleKey, SampleFiles]:
    """The files of each image of a run; of a video those of its stills."""
    folder = run.record.folder
    num_seen: Counter[tuple[str, int]] = Counter()
    found = {}
    for sample in run.record.images:
        prompt, seed = str(sample.get("prompt", "")), int(sample.get("seed", 0))
        num_seen[prompt, seed] += 1
        names = sample.get("stills") or [sample["file"]]
        float_names = sample.get("float_stills") or [sample.get("float")]
        for position, name in enumerate(names):
            float_name = float_names[position] if position < len(float_names) else None
            key = SampleKey(
                prompt=prompt, seed=seed, repeat=num_seen[prompt, seed], frame=name_frame(sample, name)
            )
            found[key] = SampleFiles(
                image=folder / name,
                float_image=folder / float_name if float_name else None,
                psnr=sample.get("psnr_db"),
            )
    return found


def name_frame(sample: Mapping[str, object], still: str) -> str:
    """Which frame a still shows, from its name: `000_fox_s0_first.png` -> `first`; empty for an image."""
    if not sample.get("stills"):
        return ""
    return Path(still).stem.removeprefix(f"{Path(str(sample['file'])).stem}_")


def build_row(
    runs: Sequence[Run], files: Sequence[SampleFiles | None], images: EmbeddedImages, max_bytes: int
) -> list[GalleryCell]:
    """The cells of one row.

    Args:
        runs: the columns.
        files: of each run; None where it did not generate this sample.
        images: where the images go.
        max_bytes: of embedded images, after which cells stay empty.
    """
    cells = []
    tag_of_image: dict[str, str] = {}  # the first run with an image, by the image's id
    for run, sample in zip(runs, files, strict=True):
        cell = build_cell(run, sample, images, max_bytes)
        image = cell.image
        if image is not None:
            cell = replace(cell, same_as=tag_of_image.get(image, ""))
            tag_of_image.setdefault(image, run.tag)
        cells.append(cell)
    return cells


def build_cell(run: Run, files: SampleFiles | None, images: EmbeddedImages, max_bytes: int) -> GalleryCell:
    """One cell; see `build_row`."""
    if files is None:
        return GalleryCell(run, missing_reason="not generated")
    folder = run.record.folder
    image = open_image(files.image, folder)
    if image is None:
        return GalleryCell(run, missing_reason="no readable file")
    if images.nbytes >= max_bytes:
        return GalleryCell(run, missing_reason="left out")

    cell = GalleryCell(run, image=images.add(image), psnr=files.psnr)
    float_image = open_image(files.float_image, folder) if files.float_image else None
    if float_image is None:
        return cell
    return replace(
        cell,
        float_image=images.add(float_image),
        difference_image=images.add(make_difference_image(float_image, image)),
    )


def mark_first_images(rows: Sequence[GalleryRow]) -> list[GalleryRow]:
    """The rows with `is_first` set in the first cell that shows an INT8 image: the page embeds it there."""
    shown: set[str] = set()
    marked = []
    for row in rows:
        cells = []
        for cell in row.cells:
            is_first = cell.image is not None and cell.image not in shown
            cells.append(replace(cell, is_first=is_first))
            if cell.image is not None:
                shown.add(cell.image)
        marked.append(GalleryRow(row.caption, cells))
    return marked


def list_notes(rows: Sequence[GalleryRow], *, has_videos: bool, has_thumbnails: bool) -> list[str]:
    """What a reader has to know about these images."""
    notes = []
    num_missing = sum(bool(cell.missing_reason) for row in rows for cell in row.cells)
    if num_missing:
        notes.append(
            f"{count_noun(num_missing, 'cell')} without an image: it was not generated, its file cannot be "
            "read, or the page is full."
        )
    if has_videos:
        notes.append("Videos are shown as stills; their PSNR is the mean over all frames.")
    if has_thumbnails:
        notes.append(
            f"Images with a side longer than {MAX_SIDE} pixels are shown as thumbnails (lossy WebP); "
            "differences and PSNR are those of the full images."
        )
    return notes


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


def format_caption(key: SampleKey) -> str:
    """The text above a row: `fox · seed 0`."""
    parts = [key.prompt, f"seed {key.seed}"]
    if key.repeat > 1:
        parts.append(f"sample {key.repeat}")
    if key.frame:
        parts.append(f"{key.frame} frame")
    return " · ".join(parts)
