"""The image gallery: which image stands in which cell, and every different image once as a data URI.

Reads the images of the runs' output folders. The page lays the cells out; this module knows nothing of HTML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from int8run.report.embedded_images import MAX_SIDE, EmbeddedImages, open_image
from int8run.report.image_files import DIFFERENCE_GAIN, make_difference_image
from int8run.report.runs import Run
from int8run.report.sample_files import SampleFiles, SampleKey, find_sample_files
from int8run.utils.plurals import count_noun

MAX_BYTES = 30_000_000  # of images on one page, as base64
MAX_CELLS = 2000  # more make a browser slow
# px of the page: its width, what a column takes beside its image, and the sizes that images may begin with
PAGE_WIDTH = 1196
COLUMN_MARGIN = 13
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 160, 320
SIZE_STEP = 8  # of the slider for the size


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
class GalleryInput:
    """An input of the samples of a row.

    Args:
        label: its name, with its column where that is not `image`.
        image: its id; None where it cannot be shown.
        is_first: whether no earlier row of the page shows this image as an input.
    """

    label: str
    image: str | None
    is_first: bool = False


@dataclass(frozen=True)
class GalleryRow:
    """The images of one sample.

    Args:
        key: of the sample.
        caption: above them.
        cells: one for each run.
        inputs: what the samples began with; empty for a prompt alone.
        input_names: the names of their files.
        compared_input: id of the input that results are laid over; None where there is none.
    """

    key: SampleKey
    caption: str
    cells: list[GalleryCell]
    inputs: list[GalleryInput] = field(default_factory=list)
    input_names: str = ""
    compared_input: str | None = None

    @property
    def num_input_columns(self) -> int:
        """How many inputs stand side by side, so that all together are about square."""
        return math.ceil(math.sqrt(len(self.inputs)))


@dataclass(frozen=True)
class Gallery:
    """The gallery of a page.

    Args:
        runs: the columns: runs that have images.
        rows: one per prompt, seed and frame.
        uris: every image as a data URI, by its id.
        notes: what is left out or shown otherwise, in words.
        digests: a hash of the pixels of every image, by its id.
    """

    runs: list[Run]
    rows: list[GalleryRow]
    uris: dict[str, str]
    notes: list[str]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """The width that images begin with, in pixels: few columns fill the page, many are scrolled."""
        if len(self.runs) == 1:
            return MIN_IMAGE_SIZE  # its samples stand side by side
        num_columns = len(self.runs) + self.has_inputs
        width = PAGE_WIDTH // num_columns - COLUMN_MARGIN
        return max(MIN_IMAGE_SIZE, min(MAX_IMAGE_SIZE, width - width % SIZE_STEP))

    @property
    def has_float_images(self) -> bool:
        """Whether any cell has a float image."""
        return any(cell.float_image for row in self.rows for cell in row.cells)

    @property
    def modes(self) -> list[tuple[str, str]]:
        """What the gallery can show, each with the text of its button."""
        modes = [("int8", "INT8")]
        if self.has_float_images:
            modes += [("float", "float"), ("slider", "slider"), ("flicker", "flicker")]
            modes.append(("difference", f"difference ×{DIFFERENCE_GAIN}"))
        if self.has_compared_inputs:
            modes.append(("input", "input slider"))
        return modes

    @property
    def has_inputs(self) -> bool:
        """Whether any sample began with an input."""
        return any(row.inputs for row in self.rows)

    @property
    def has_compared_inputs(self) -> bool:
        """Whether any result can be laid over its input."""
        return any(row.compared_input for row in self.rows)


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
        row = build_row(key, columns, files, images, max_bytes)
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
    return Gallery(runs=columns, rows=rows, uris=images.uris, notes=notes, digests=images.digests)


def build_row(
    key: SampleKey,
    runs: Sequence[Run],
    files: Sequence[SampleFiles | None],
    images: EmbeddedImages,
    max_bytes: int,
) -> GalleryRow:
    """One row: the inputs, and a cell for each run.

    Args:
        key: of its samples.
        runs: the columns.
        files: of each run; None where it did not generate this sample.
        images: where the images go.
        max_bytes: of embedded images, after which cells stay empty.
    """
    inputs, compared_input = build_inputs(runs, files, images)
    input_names = next((sample.input_names for sample in files if sample is not None), "")
    return GalleryRow(
        key=key,
        caption=format_caption(key, files),
        cells=build_cells(runs, files, images, max_bytes),
        inputs=inputs,
        input_names=input_names,
        compared_input=compared_input,
    )


def build_inputs(
    runs: Sequence[Run], files: Sequence[SampleFiles | None], images: EmbeddedImages
) -> tuple[list[GalleryInput], str | None]:
    """The inputs of a row, as the first run has them: their contents are those of all runs.

    Args:
        runs: the columns.
        files: of each run.
        images: where the images go.

    Returns:
        The inputs, and the id of the one that results are laid over.
    """
    known = [(run, sample) for run, sample in zip(runs, files, strict=True) if sample is not None]
    if not known:
        return [], None
    run, sample = known[0]
    inputs = []
    compared_input = None
    for file in sample.inputs:
        image = open_image(file.path, run.record.folder) if file.path else None
        image_id = None if image is None else images.add(image)
        inputs.append(GalleryInput(file.label, image_id))
        if file.is_compared:
            compared_input = image_id
    return inputs, compared_input


def build_cells(
    runs: Sequence[Run], files: Sequence[SampleFiles | None], images: EmbeddedImages, max_bytes: int
) -> list[GalleryCell]:
    """The cells of one row; see `build_row`."""
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
    """The rows with `is_first` set where an input or an INT8 image is shown first: it is embedded there."""
    shown: set[str] = set()
    shown_inputs: set[str] = set()
    marked = []
    for row in rows:
        inputs = []
        for given in row.inputs:
            is_first = given.image is not None and given.image not in shown_inputs
            inputs.append(replace(given, is_first=is_first))
            if given.image is not None:
                shown_inputs.add(given.image)
        cells = []
        for cell in row.cells:
            is_first = cell.image is not None and cell.image not in shown
            cells.append(replace(cell, is_first=is_first))
            if cell.image is not None:
                shown.add(cell.image)
        marked.append(replace(row, inputs=inputs, cells=cells))
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


def format_caption(key: SampleKey, files: Sequence[SampleFiles | None]) -> str:
    """The text above a row: `fox · seed 0 · strength 0.6`.

    Args:
        key: of its samples.
        files: of each run. An argument that is not the same in all of them is left to the heads of columns.
    """
    parts = [key.prompt, f"seed {key.seed}"]
    if key.repeat > 1:
        parts.append(f"sample {key.repeat}")
    known = [sample.arguments for sample in files if sample is not None]
    for argument in known[0] if known else []:
        if all(argument in arguments for arguments in known):
            parts.append(argument)
    if key.frame:
        parts.append(f"{key.frame} frame")
    return " · ".join(parts)
