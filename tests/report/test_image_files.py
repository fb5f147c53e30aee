"""The image files of a run: difference images, the grid, and saved samples."""

import numpy as np
import pytest
from PIL import Image

from int8run.report import image_files
from int8run.report.image_files import (
    DIFFERENCE_GAIN,
    GRID_MIN_SIDE,
    fit_into,
    limit_rows,
    make_difference_image,
    make_image_grid,
    make_image_strip,
    save_sample,
    shorten_caption,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def make_flat_image(color, side=64):
    """A square of one color."""
    return Image.new("RGB", (side, side), color)


def find_color(image, color):
    """How many pixels have this color, and the box around them."""
    mask = Image.fromarray((np.asarray(image) == color).all(axis=-1))
    return int(np.asarray(mask).sum()), mask.getbbox()


# -- differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(9, 9, 0), (10, 20, 80), (20, 10, 80), (0, 31, 248), (0, 32, 255), (0, 255, 255)]
)
def test_a_difference_is_amplified_and_clipped(a, b, expected):
    difference = make_difference_image(make_flat_image((a, 0, 0), 2), make_flat_image((b, 0, 0), 2))

    assert DIFFERENCE_GAIN == 8
    assert difference.getpixel((1, 1)) == (expected, 0, 0)


def test_a_difference_takes_images_of_any_mode():
    gray, transparent = Image.new("L", (2, 2), 5), Image.new("RGBA", (2, 2), (5, 5, 6, 0))

    assert make_difference_image(gray, transparent).getpixel((0, 0)) == (0, 0, 8)


# -- the grid ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_by_two():
    """A grid of two rows and two columns."""
    rows = [
        ("fox", [make_flat_image(RED), make_flat_image(GREEN)]),
        ("owl", [make_flat_image(BLUE), make_flat_image(RED)]),
    ]
    return make_image_grid(rows, ["float", "INT8"])


def test_small_images_are_enlarged(two_by_two):
    assert find_color(two_by_two, GREEN)[0] == find_color(two_by_two, BLUE)[0] == GRID_MIN_SIDE**2
    assert find_color(two_by_two, RED)[0] == 2 * GRID_MIN_SIDE**2


@pytest.mark.parametrize(("side", "shown"), [(100, 200), (192, 192), (193, 193), (300, 300)])
def test_images_are_enlarged_by_a_whole_factor(side, shown):
    grid = make_image_grid([("", [make_flat_image(RED, side)])], [""])

    assert find_color(grid, RED)[0] == shown**2


def test_enlarging_does_not_smooth():
    image = Image.new("RGB", (2, 2), RED)
    image.putpixel((0, 0), GREEN)

    grid = make_image_grid([("", [image])], [""])

    assert find_color(grid, GREEN)[0] == (GRID_MIN_SIDE // 2) ** 2
    assert find_color(grid, RED)[0] == 3 * (GRID_MIN_SIDE // 2) ** 2


def test_rows_go_down_and_columns_to_the_right(two_by_two):
    (_, green), (_, blue) = find_color(two_by_two, GREEN), find_color(two_by_two, BLUE)

    assert green[0] >= blue[2], "the second column is right of the first"
    assert blue[1] >= green[3], "the second row is below the first"
    assert green[2] <= two_by_two.width and blue[3] <= two_by_two.height


def test_wide_images_keep_their_shape():
    grid = make_image_grid([("", [Image.new("RGB", (128, 64), RED)])], [""])

    left, top, right, bottom = find_color(grid, RED)[1]
    assert (right - left, bottom - top) == (256, 128)


@pytest.mark.parametrize(("heading", "caption"), [("difference x 8", ""), ("", "difference x 8")])
def test_headings_and_captions_are_written_above_the_image(heading, caption):
    empty = make_image_grid([("", [make_flat_image(RED)])], [""])

    written = make_image_grid([(caption, [make_flat_image(RED)])], [heading])

    top_of_image = find_color(empty, RED)[1][1]
    above, below = (0, 0, empty.width, top_of_image), (0, top_of_image, *empty.size)
    assert empty.crop(above).getextrema() == ((255, 255),) * 3
    assert written.crop(above).getextrema()[0][0] < 128, "nothing dark above the image"
    assert written.crop(below).tobytes() == empty.crop(below).tobytes()


def test_a_row_without_images_is_a_caption_of_the_rows_below():
    rows = [
        ("1", [make_flat_image(RED), make_flat_image(GREEN)]),
        ("2", [make_flat_image(BLUE), make_flat_image(RED)]),
    ]
    plain = make_image_grid(rows[:1], ["float", "INT8"])

    grid = make_image_grid([("a fox", []), *rows], ["float", "INT8"])

    (_, green), (_, blue) = find_color(grid, GREEN), find_color(grid, BLUE)
    (_, green_of_plain) = find_color(plain, GREEN)
    line_height = green[1] - green_of_plain[1]
    assert 16 <= line_height <= 32
    assert blue[1] - green[3] > line_height
    assert grid.height - blue[3] == plain.height - green_of_plain[3]
    caption = grid.crop((0, green_of_plain[1] - line_height, grid.width, green_of_plain[1]))
    assert caption.getextrema()[0][0] < 128
    assert find_color(grid, RED)[0] == 2 * GRID_MIN_SIDE**2


@pytest.mark.parametrize(("side", "line_height"), [(64, 24), (384, 24), (480, 28), (960, 48)])
def test_text_grows_with_large_images(side, line_height):
    grid = make_image_grid([("", [make_flat_image(RED, side)])], [""])

    _, top, _, bottom = find_color(grid, RED)[1]
    assert grid.height - (bottom - top) - 2 * 12 == 2 * line_height, "a heading and a caption"


@pytest.mark.parametrize(
    ("text", "width", "shortened"),
    [
        ("a fox · seed 0", 14, "a fox · seed 0"),
        ("a very long prompt about a fox · seed 12", 24, "a very long p… · seed 12"),
        ("a very long prompt about a fox · seed 12", 11, "a… · seed 12"[-10:]),
    ],
)
def test_a_caption_keeps_its_beginning_and_its_seed(text, width, shortened):
    assert shorten_caption(text, width, len) == shortened
    assert len(shortened) <= max(width, 10)


@pytest.mark.parametrize("num_characters", [6_000, 100_000])
def test_shortening_a_long_caption_measures_it_a_few_times(num_characters):
    measured = []

    def measure(text):
        measured.append(len(text))
        return len(text)

    shortened = shorten_caption("a" * num_characters, 400, measure)

    assert len(shortened) == 400
    assert len(measured) <= 20, "halving needs one try for each doubling of the length"
    assert sum(measured) <= 4 * num_characters, "the work grows with the length, not with its square"


def test_a_grid_has_no_more_rows_than_viewers_open(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_GRID_PIXELS", 250 * 250 * 3)
    rows = [(f"prompt {number}", [make_flat_image(RED)]) for number in range(2000)]

    grid = make_image_grid(rows, [""])

    assert find_color(grid, RED)[0] == 3 * GRID_MIN_SIDE**2
    assert grid.width * grid.height < 250 * 250 * 4
    assert limit_rows(rows, 3)[3:] == [("1997 more rows have no room here: see images/", [])]


def test_a_caption_is_one_line_whatever_its_prompt_has():
    plain = make_image_grid([("a fox", [make_flat_image(RED)])], [""])
    prompts = "two\nlines\r\nand more", "\x1b[31mred"

    for prompt in prompts:
        grid = make_image_grid([(prompt, [make_flat_image(RED)])], [""])
        assert grid.size == plain.size
        assert find_color(grid, RED) == find_color(plain, RED), "the text is not drawn over the image"


def test_a_column_is_as_wide_as_its_widest_image_and_a_row_as_high_as_its_highest():
    strip = Image.new("RGB", (128, 64), BLUE)
    rows = [
        ("1", [strip, make_flat_image(GREEN)]),
        ("2", [make_flat_image(BLUE), Image.new("RGB", (64, 32), RED)]),
    ]

    grid = make_image_grid(rows, ["", ""])

    boxes = [find_color(grid, color)[1] for color in (BLUE, GREEN, RED)]
    sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes]
    assert sizes[1:] == [(192, 192), (192, 96)], "enlarged by the factor of the last column"
    assert boxes[0][2] - boxes[0][0] == 384
    assert boxes[1][0] == boxes[2][0] >= boxes[0][2], "the second column begins behind the widest image"
    assert grid.height >= boxes[2][1] + 192, "room for the square beside it"


def test_a_column_may_be_empty_in_a_row():
    rows = [("1", [make_flat_image(RED), make_flat_image(GREEN)]), ("2", [None, make_flat_image(BLUE)])]

    grid = make_image_grid(rows, ["input", "INT8"])

    assert find_color(grid, BLUE)[1][0] == find_color(grid, GREEN)[1][0]


def test_a_column_has_room_for_its_heading():
    heading = "a heading that is much wider than the images below it"
    rows = [("", [make_flat_image(RED), make_flat_image(GREEN)])]

    narrow, wide = make_image_grid(rows, ["", ""]), make_image_grid(rows, [heading, ""])

    assert find_color(wide, GREEN)[1][0] > find_color(narrow, GREEN)[1][0]


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, (60, 40)), (2, (124, 40)), (3, (188, 40)), (4, (60, 40)), (5, (92, 40)), (12, (188, 40))],
)
def test_inputs_stand_side_by_side_and_shrink_where_they_are_many(count, size):
    strip = make_image_strip([make_flat_image(RED)] * count, (60, 40))

    assert strip.size == size
    expected = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 12: 2}[count]
    lines = {top for top in range(strip.height) if RED in row_colors(strip, top)}
    assert count_runs(lines) == expected


def row_colors(image, top):
    """The colors of a line of pixels."""
    return {image.getpixel((left, top)) for left in range(image.width)}


def count_runs(numbers):
    """How many unbroken runs some whole numbers make."""
    return sum(number - 1 not in numbers for number in numbers)


def test_an_input_keeps_its_shape_in_a_strip():
    strip = make_image_strip([Image.new("RGB", (100, 50), RED), make_flat_image(GREEN)], (60, 60))

    left, top, right, bottom = find_color(strip, RED)[1]
    assert (right - left, bottom - top) == (60, 30)
    assert find_color(strip, GREEN)[0] == 60 * 60


@pytest.mark.parametrize(
    ("size", "expected"), [((200, 100), (60, 30)), ((10, 20), (30, 60)), ((9, 9), (60, 60))]
)
def test_an_image_fits_into_a_size_without_losing_its_shape(size, expected):
    assert fit_into(Image.new("RGB", size), (60, 60)).size == expected


# -- saved samples -------------------------------------------------------------------------------------------


def test_an_image_is_saved_without_loss(tmp_path):
    image = make_flat_image(RED)

    assert save_sample([image], {"first": 0}, tmp_path, "fox", 16) == ["fox.png"]

    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]
    assert Image.open(tmp_path / "fox.png").tobytes() == image.tobytes()


@pytest.fixture
def video():
    """Five frames that differ."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC) for pixels in noise]


def test_key_frames_of_a_video_are_saved_without_loss(tmp_path, video):
    names = save_sample(video, {"first": 0, "middle": 2, "last": 4}, tmp_path, "fox", 16)

    assert names == ["fox.webp", "fox_first.png", "fox_middle.png", "fox_last.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for name, number in zip(names[1:], (0, 2, 4), strict=True):
        assert Image.open(tmp_path / name).tobytes() == video[number].tobytes()


def test_a_video_is_saved_as_an_animation(tmp_path, video):
    save_sample(video, {"first": 0}, tmp_path, "fox", 16)

    animation = Image.open(tmp_path / "fox.webp")
    assert (animation.n_frames, animation.info["loop"]) == (5, 0)
    durations = []
    for number in range(5):
        animation.seek(number)
        shown = np.asarray(animation.convert("RGB"), dtype=np.float32)
        durations.append(animation.info["duration"])
        # lossy, but much nearer to its own frame than to any other
        errors = [float(np.abs(shown - np.asarray(frame, dtype=np.float32)).mean()) for frame in video]
        assert min(errors) == errors[number] < 8 < sorted(errors)[1] / 4, errors
    assert sum(durations) == round(5000 / 16)
    assert set(durations) == {62, 63}, "16 frames a second are 62.5 ms each"


def test_an_image_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """Ctrl-C while it is written."""

    def write_half(image, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", write_half)

    with pytest.raises(KeyboardInterrupt):
        save_sample([make_flat_image(RED)], {"first": 0}, tmp_path, "fox", 16)

    assert list(tmp_path.iterdir()) == []
