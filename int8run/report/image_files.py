"""The image files of a run: samples as PNG or animated WebP, and grids of them with captions."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from int8run.report.caption_fonts import choose_caption_font
from int8run.utils.plurals import count_noun
from int8run.utils.text import find_longest, make_visible

DIFFERENCE_GAIN = 8

GRID_MIN_SIDE = 192  # px; smaller images are enlarged in a grid, by a whole factor and without smoothing
MAX_GRID_PIXELS = 120_000_000  # a larger PNG is refused by viewers, and takes gigabytes to write
GRID_GAP = 12  # px between images
MIN_FONT_SIZE = 16
CAPTION_COLOR = "#555"
STRIP_COLUMNS = 3  # images of one strip that stand side by side at full size
STRIP_GAP = 4  # px between them
STRIP_COLOR = "#d8d8d8"  # around an image of another shape; a mask is black and white
STRIP_GAP_COLOR = "white"
CAPTION_END = 10  # characters at the end of a caption that are never cut: ` · seed 12`

# Of WebP. Lossless, a noisy video takes seven times the bytes, and the PNGs beside it are exact.
ANIMATION_QUALITY = 95
ANIMATION_EFFORT = 2  # half the time of WebP's usual 4 for as many bytes

# a caption and an image for each column; None leaves a column empty
GridRow = tuple[str, Sequence[Image.Image | None]]

# what stands above a column; several labels where its images are strips of so many
GridHeading = str | Sequence[str]


def make_difference_image(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| times DIFFERENCE_GAIN, clipped: black where equal."""
    difference = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    return difference.point(lambda value: min(255, value * DIFFERENCE_GAIN))


def make_image_grid(rows: Sequence[GridRow], columns: Sequence[GridHeading]) -> Image.Image:
    """Images in rows with a caption above each row and a heading above each column.

    A column is as wide as its widest image, a row as high as its highest. All are enlarged by one whole
    factor where the images of the last column are small.

    Args:
        rows: caption and images of each row. A row without images is a caption for the rows below it: those
            of one video.
        columns: the headings.
    """
    headings = [(column,) if isinstance(column, str) else column for column in columns]
    factor = choose_enlargement(rows)
    # Text grows with the images: a large grid is looked at from further away.
    font_size = max(MIN_FONT_SIZE, factor * find_widest(rows, column=-1) // 24)
    font = ImageFont.load_default(size=font_size)
    line_height = font_size + 8
    widths = []
    for column, labels in enumerate(headings):
        widest = factor * find_widest(rows, column)
        longest = max(font.getlength(label) for label in labels)
        widths.append(max(widest, math.ceil(longest) * len(labels)))
    lefts = list(accumulate((width + GRID_GAP for width in widths), initial=GRID_GAP))
    grid_width = lefts.pop()
    row_heights = measure_row_heights(rows, line_height, factor)
    rows = limit_rows(rows, MAX_GRID_PIXELS // (grid_width * max(row_heights)))

    row_heights = measure_row_heights(rows, line_height, factor)
    grid_size = grid_width, line_height + sum(row_heights) + GRID_GAP
    grid = Image.new("RGB", grid_size, "white")
    draw = ImageDraw.Draw(grid)
    for left, width, labels in zip(lefts, widths, headings, strict=True):
        for number, label in enumerate(labels):
            label_left = left + number * (width + factor * STRIP_GAP) // len(labels)
            draw.text((label_left, GRID_GAP // 2), label, fill="black", font=font)

    tops = accumulate(row_heights, initial=line_height + GRID_GAP)
    for top, (caption, images) in zip(tops, rows, strict=False):
        visible, caption_font = choose_caption_font(make_visible(caption), font_size)
        text = shorten_caption(visible, grid.width - 2 * GRID_GAP, caption_font.getlength)
        draw.text((GRID_GAP, top - 2), text, fill=CAPTION_COLOR, font=caption_font)
        for left, image in zip(lefts, images, strict=False):
            if image is not None:
                grid.paste(enlarge(image, factor), (left, top + line_height - 4))
    return grid


def measure_row_heights(rows: Sequence[GridRow], line_height: int, factor: int) -> list[int]:
    """The height of each row with its caption, in pixels.

    Args:
        rows: of a grid.
        line_height: of a caption.
        factor: by which images are enlarged.
    """
    heights = []
    for _, images in rows:
        highest = max((image.height for image in images if image is not None), default=0)
        room = factor * highest + GRID_GAP if highest else 0
        heights.append(line_height + room)
    return heights


def find_widest(rows: Sequence[GridRow], column: int) -> int:
    """The width of the widest image of a column; 0 where it has none."""
    widest = 0
    for _, images in rows:
        image = images[column] if images else None
        if image is not None:
            widest = max(widest, image.width)
    return widest


def choose_enlargement(rows: Sequence[GridRow]) -> int:
    """The whole factor by which the last column's images are wide enough."""
    widest = find_widest(rows, column=-1)
    return max(1, -(-GRID_MIN_SIDE // widest))


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """An image whose pixels become squares of `factor` pixels."""
    size = image.width * factor, image.height * factor
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def make_image_strip(images: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Images side by side, at most STRIP_COLUMNS of a size; more are smaller and stand in several lines.

    Args:
        images: at least one. Each keeps its shape.
        size: width and height of the room for one.
    """
    num_lines = math.ceil(math.sqrt(len(images) / STRIP_COLUMNS))
    num_columns = math.ceil(len(images) / num_lines)
    width, height = (max(1, (side - STRIP_GAP * (num_lines - 1)) // num_lines) for side in size)
    strip_size = num_columns * (width + STRIP_GAP) - STRIP_GAP, num_lines * (height + STRIP_GAP) - STRIP_GAP
    strip = Image.new("RGB", strip_size, STRIP_GAP_COLOR)
    for number, image in enumerate(images):
        line, column = divmod(number, num_columns)
        fitting = ImageOps.pad(image.convert("RGB"), (width, height), color=STRIP_COLOR)
        strip.paste(fitting, (column * (width + STRIP_GAP), line * (height + STRIP_GAP)))
    return strip


def limit_rows(rows: Sequence[GridRow], max_rows: int) -> Sequence[GridRow]:
    """The first rows, and a caption that says how many are left out; at least one row."""
    max_rows = max(1, max_rows)
    num_left_out = len(rows) - max_rows
    if num_left_out <= 0:
        return rows
    return [
        *rows[:max_rows],
        (f"{count_noun(num_left_out, 'more row', 'have')} no room here: see images/", []),
    ]


def fit_into(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image as large as it can be in a width and height without losing its shape."""
    return ImageOps.contain(image, size, method=Image.Resampling.LANCZOS)


def shorten_caption(text: str, width: float, measure: Callable[[str], float]) -> str:
    """A text that is at most `width` wide: its beginning, `…` and its end, where the seed is.

    Args:
        text: the caption.
        width: what it may take.
        measure: the width of a text.
    """
    if measure(text) <= width:
        return text
    end = text[-CAPTION_END:]

    def shorten(length: int) -> str:
        return f"{text[:length].rstrip()}…{end}"

    length = find_longest(len(text), lambda length: measure(shorten(length)) <= width)
    return shorten(length) if length else end


def save_sample(
    frames: Sequence[Image.Image],
    key_frames: Mapping[str, int],
    folder: Path,
    name: str,
    frames_per_second: float,
    texts: Mapping[str, str] | None = None,
) -> list[str]:
    """Save an image as PNG; a video as an animation, and some of its frames as PNG.

    Args:
        frames: one for an image.
        key_frames: which frames of a video to save, by what they are called.
        folder: where to.
        name: of the file, without its ending.
        frames_per_second: of a video.
        texts: what is written into the files about them, by key; an animation has `parameters` alone.

    Returns:
        Names of the files in `folder`; the first is the whole sample.
    """
    texts = texts or {}
    chunks = make_png_texts(texts)
    if len(frames) == 1:
        save_whole(frames[0], folder / f"{name}.png", pnginfo=chunks)
        return [f"{name}.png"]

    animation = folder / f"{name}.webp"
    save_animation(frames, animation, frames_per_second, texts.get("parameters", ""))
    stills = {f"{name}_{which}.png": frames[number] for which, number in key_frames.items()}
    for file, frame in stills.items():
        save_whole(frame, folder / file, pnginfo=chunks)
    return [animation.name, *stills]


def save_whole(image: Image.Image, path: Path, **options: object) -> None:
    """Save an image whole or not at all, also where a run is stopped in between.

    Args:
        image: to save.
        path: of the file, whose ending is that of its format.
        options: of Pillow's `save`.
    """
    unfinished = path.with_name(f".{path.name}.new")
    try:
        image.save(unfinished, format=path.suffix.removeprefix("."), **options)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_png_texts(texts: Mapping[str, str]) -> PngInfo:
    """Text chunks of a PNG. Only ASCII goes into the plain ones: readers disagree on what else they hold."""
    chunks = PngInfo()
    for key, text in texts.items():
        if text.isascii():
            chunks.add_text(key, text)
        else:
            chunks.add_itxt(key, text)
    return chunks


def save_animation(
    frames: Sequence[Image.Image], path: Path, frames_per_second: float, comment: str = ""
) -> None:
    """Save a video as WebP.

    Args:
        frames: two or more.
        path: of the file.
        frames_per_second: how fast it plays.
        comment: for the EXIF field UserComment, where the readers of `parameters` look in a WebP.
    """
    exif = Image.Exif()
    if comment:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment.encode(
            "utf-16-be"
        )

    # When each frame ends, to the millisecond, so that no error adds up.
    ends = [round(1000 * number / frames_per_second) for number in range(len(frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]
    first, *others = frames
    save_whole(
        first,
        path,
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        quality=ANIMATION_QUALITY,
        method=ANIMATION_EFFORT,
        exif=exif,
    )
