"""The image files of a run: samples as PNG or animated WebP, and grids of them with captions."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFont
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
CAPTION_END = 10  # characters at the end of a caption that are never cut: ` · seed 12`

# Of WebP. Lossless, a noisy video takes seven times the bytes, and the PNGs beside it are exact.
ANIMATION_QUALITY = 95
ANIMATION_EFFORT = 2  # half the time of WebP's usual 4 for as many bytes

GridRow = tuple[str, Sequence[Image.Image]]


def make_difference_image(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| times DIFFERENCE_GAIN, clipped: black where equal."""
    difference = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    return difference.point(lambda value: min(255, value * DIFFERENCE_GAIN))


def make_image_grid(rows: Sequence[GridRow], columns: Sequence[str]) -> Image.Image:
    """Images in rows with a caption above each row and a heading above each column.

    Args:
        rows: caption and images of each row. All images have one size. A row without images is a caption for
            the rows below it: those of one video.
        columns: the headings.
    """
    width, height = choose_cell_size(rows)
    # Text grows with the images: a large grid is looked at from further away.
    font_size = max(MIN_FONT_SIZE, width // 24)
    font = ImageFont.load_default(size=font_size)
    line_height = font_size + 8
    grid_width = len(columns) * (width + GRID_GAP) + GRID_GAP
    rows = limit_rows(rows, MAX_GRID_PIXELS // (grid_width * (line_height + height + GRID_GAP)))
    row_heights = [line_height + (height + GRID_GAP if images else 0) for _, images in rows]

    grid_size = grid_width, line_height + sum(row_heights) + GRID_GAP
    grid = Image.new("RGB", grid_size, "white")
    draw = ImageDraw.Draw(grid)
    lefts = [GRID_GAP + column * (width + GRID_GAP) for column in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        draw.text((left, GRID_GAP // 2), heading, fill="black", font=font)

    tops = accumulate(row_heights, initial=line_height + GRID_GAP)
    for top, (caption, images) in zip(tops, rows, strict=False):
        visible, caption_font = choose_caption_font(make_visible(caption), font_size)
        text = shorten_caption(visible, grid.width - 2 * GRID_GAP, caption_font.getlength)
        draw.text((GRID_GAP, top - 2), text, fill=CAPTION_COLOR, font=caption_font)
        for left, image in zip(lefts, images, strict=False):
            resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(resized, (left, top + line_height - 4))
    return grid


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


def choose_cell_size(rows: Sequence[GridRow]) -> tuple[int, int]:
    """Width and height of each image in a grid: enlarged by a whole factor where it is small."""
    widest = max(image.width for _, images in rows for image in images)
    factor = max(1, -(-GRID_MIN_SIDE // widest))
    width, height = next(images[0].size for _, images in rows if images)
    return width * factor, height * factor


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
