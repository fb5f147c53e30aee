"""Images and videos of users: what pipelines are given, and what is refused before a model is loaded."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from int8run.errors import FileError
from int8run.generate import colors, media, video_files
from int8run.generate.media import check_image, check_video, open_image, open_mask, open_video
from int8run.generate.pixels import fit_image
from int8run.generate.sample_inputs import InputFile

RED, BLUE = (255, 0, 0), (0, 0, 255)


def make_halves(width: int = 16, height: int = 12) -> Image.Image:
    """A red left half and a blue right half."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def as_input(path: Path) -> InputFile:
    return InputFile(name=path.name, path=path, sha256="", place="a.csv, row 3 (line 4): image")


def save_turned(path: Path) -> None:
    """As a telephone writes it that was held upright: pixels that lie, and how to turn them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    make_halves().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("decodes", [True, False])
def test_an_image_is_turned_as_its_exif_says(tmp_path: Path, name: str, decodes: bool) -> None:
    path = tmp_path / name
    save_turned(path)

    facts = check_image(path, "image", decodes=decodes)
    image = open_image(as_input(path))

    assert image.size == (16, 12)
    if decodes or name != "a.png":  # a PNG may have its EXIF behind the pixels
        assert facts.size == "16 x 12"
    left, right = np.asarray(image)[6, 2].astype(int), np.asarray(image)[6, 13].astype(int)
    assert np.abs(left - RED).max() < 8 and np.abs(right - BLUE).max() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_over_white_and_said(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    path = tmp_path / "a.png"
    if mode == "P":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.paste(1, (4, 0, 8, 8))
        palette.save(path, transparency=1)
    else:
        image.convert(mode).save(path)

    assert check_image(path, "image", decodes=True).conversions == (media.ALPHA,)
    opened = open_image(as_input(path))
    assert (opened.mode, opened.getpixel((0, 0)), opened.getpixel((7, 7))) == (
        "RGB",
        (0, 0, 0),
        (255, 255, 255),
    )


def test_an_alpha_channel_that_lets_nothing_through_is_not_said(tmp_path: Path) -> None:
    make_halves().convert("RGBA").save(tmp_path / "a.png")

    assert check_image(tmp_path / "a.png", "image", decodes=True).conversions == ()


def test_sixteen_bits_become_eight_and_are_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535] * 2] * 8, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")

    assert check_image(tmp_path / "a.png", "image", decodes=True).conversions == (media.DEEP,)
    opened = open_image(as_input(tmp_path / "a.png"))
    assert [opened.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def make_srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def make_swapped_profile() -> bytes:
    """sRGB whose red is blue and whose blue is red: the first names of a tag are in the table of tags."""
    profile = make_srgb_profile()
    table, rest = profile[:400], profile[400:]
    return table.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ") + rest


def make_linear_grey_profile() -> bytes:
    """Shades of grey without a gamma, as the ICC's specification lays it out."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)  # D50 in units of 1/65536
    linear = b"curv" + bytes(4) + struct.pack(">I", 0)
    tags = struct.pack(">I4s2I4s2I", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(linear))
    body = tags + white + linear
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + white[8:] + bytes(48)
    return header + body


def test_colors_of_a_profile_become_srgb_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make_halves().save(path, icc_profile=make_swapped_profile())

    assert check_image(path, "image", decodes=False).conversions == (colors.WITH_PROFILE,)
    red_in_its_profile = open_image(as_input(path)).getpixel((0, 0))
    assert np.abs(np.array(red_in_its_profile) - RED[::-1]).max() <= 1


def test_transparent_parts_stay_so_with_a_profile(tmp_path: Path) -> None:
    image = make_halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    image.save(tmp_path / "a.png", icc_profile=make_swapped_profile())

    opened = open_image(as_input(tmp_path / "a.png"))

    assert opened.getpixel((7, 7)) == (255, 255, 255)
    assert np.abs(np.array(opened.getpixel((0, 0))) - RED[::-1]).max() <= 1


def test_shades_of_grey_have_profiles_too(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 128).save(tmp_path / "a.png", icc_profile=make_linear_grey_profile())

    opened = open_image(as_input(tmp_path / "a.png"))

    # half of the light is shade 188 in sRGB: 1.055 * 0.502 ** (1 / 2.4) - 0.055
    assert np.abs(np.array(opened.getpixel((0, 0))) - 188).max() <= 1


def test_a_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    make_halves().save(tmp_path / "a.png", icc_profile=make_srgb_profile())

    assert check_image(tmp_path / "a.png", "image", decodes=False).conversions == ()
    assert open_image(as_input(tmp_path / "a.png")).getpixel((0, 0)) == RED


@pytest.mark.parametrize("profile", [b"no profile", make_linear_grey_profile()], ids=["damaged", "of_grey"])
def test_a_profile_that_cannot_be_used_is_ignored_and_it_is_said(tmp_path: Path, profile: bytes) -> None:
    make_halves().save(tmp_path / "a.png", icc_profile=profile)

    assert check_image(tmp_path / "a.png", "image", decodes=False).conversions == (colors.UNUSABLE_PROFILE,)
    assert open_image(as_input(tmp_path / "a.png")).getpixel((0, 0)) == RED


def test_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    make_halves().quantize(2).save(tmp_path / "a.gif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=100)

    assert open_image(as_input(tmp_path / "a.gif")).getpixel((0, 0)) == RED
    assert check_image(tmp_path / "b.jpg", "image", decodes=False).conversions == (colors.NO_PROFILE,)
    found = open_image(as_input(tmp_path / "b.jpg"))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - RED).max() < 4


def test_a_mask_is_grey_and_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    image.save(tmp_path / "a.png")

    mask = open_mask(as_input(tmp_path / "a.png"))

    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((7, 0))) == ("L", 0, 255)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_is_a_video_and_no_image(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frames = [Image.new("RGB", (16, 12), color) for color in (RED, BLUE, RED)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)

    facts = check_video(path, "video")

    assert (facts.size, facts.frames) == ("16 x 12", 3)
    assert [frame.getpixel((3, 3)) for frame in open_video(as_input(path))] == [RED, BLUE, RED]
    with pytest.raises(
        FileError, match=r"^row 3: image=a has 3 frames, and an image has one; give it as video"
    ):
        check_image(path, "row 3: image=a", decodes=True)


def test_a_photo_with_a_preview_in_it_is_one_image(tmp_path: Path) -> None:
    make_halves().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[make_halves()])

    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert check_image(tmp_path / "a.jpg", "image", decodes=True).frames == 1


def test_a_still_image_is_no_video(tmp_path: Path) -> None:
    make_halves().save(tmp_path / "a.png")

    with pytest.raises(
        FileError, match=r"video=a is an image of one frame; a video has several; give it as im"
    ):
        check_video(tmp_path / "a.png", "video=a")


@pytest.mark.parametrize("size", [(1, 1), (640, 4)])
def test_an_image_that_shows_nothing_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")

    with pytest.raises(
        FileError, match=rf"image=a has {size[0]} x {size[1]} pixels; each side has at least 8"
    ):
        check_image(tmp_path / "a.png", "image=a", decodes=False)


@pytest.mark.parametrize("size", [(20_000, 5_000), (20_000, 20_000)])
def test_a_huge_image_is_refused_with_the_limit(tmp_path: Path, size: tuple[int, int]) -> None:
    # a header that promises so many pixels, and a few bytes of them
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)

    with pytest.raises(
        FileError, match=r"^image=a is larger than the 89,478,485 pixels up to which .*Pillow"
    ):
        check_image(tmp_path / "a.png", "image=a", decodes=False)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_a_truncated_image_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    chance = np.random.default_rng(0)
    Image.fromarray(chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    with pytest.raises(FileError, match=r"^image=a cannot be read as an image: .*; save it anew"):
        check_image(path, "image=a", decodes=True)


def test_a_damaged_png_is_found_by_its_checksums_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make_halves().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 255
    path.write_bytes(data)

    with pytest.raises(FileError, match=r"cannot be read as an image"):
        check_image(path, "image=a", decodes=False)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).write_text("not an image")

    with pytest.raises(FileError, match=r"image=a is not an image that can be read; save it as PNG or JPEG"):
        check_image(tmp_path / "a.png", "image=a", decodes=False)
    with pytest.raises(FileError, match=r"image=a is not an image that can be read; give it as video"):
        check_image(tmp_path / "a.mp4", "image=a", decodes=False)


def test_a_format_that_starts_a_program_is_not_read(tmp_path: Path) -> None:
    make_halves().save(tmp_path / "a.eps")

    with pytest.raises(FileError, match="is not an image that can be read"):
        check_image(tmp_path / "a.eps", "image=a", decodes=True)


def test_an_image_that_is_damaged_when_its_turn_comes_is_named_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")

    with pytest.raises(FileError, match=r"^a\.csv, row 3 \(line 4\): image=a\.png is not an image"):
        open_image(as_input(tmp_path / "a.png"))


def test_a_video_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    monkeypatch.setattr(video_files.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(
        FileError,
        match=r"video=a needs PyAV to be read: pip install 'int8run\[video\]'; animated GIF, WebP and",
    ):
        check_video(tmp_path / "a.mp4", "video=a")


# -- with PyAV -------------------------------------------------------------------------------------------


def write_video(path: Path, frames: list[Image.Image]) -> None:
    """Write a film."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def is_near(image: Image.Image, position: tuple[int, int], color: tuple[int, int, int]) -> bool:
    """Whether a pixel has a color, as far as a video keeps it."""
    x, y = position
    return bool(np.abs(np.asarray(image).astype(int)[y, x] - color).max() < 16)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_the_frames_of_a_video_are_read(tmp_path: Path, name: str) -> None:
    write_video(
        tmp_path / name, [Image.new("RGB", (64, 48), color) for color in (RED, RED, RED, BLUE, BLUE, BLUE)]
    )

    facts = check_video(tmp_path / name, "video")
    frames = open_video(as_input(tmp_path / name))

    assert (facts.size, facts.frames, len(frames)) == ("64 x 48", 6, 6)
    assert is_near(frames[0], (3, 3), RED) and is_near(frames[-1], (3, 3), BLUE)


def test_a_video_is_turned_as_the_telephone_was_held(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, [make_halves(64, 48)] * 2)
    data = bytearray(path.read_bytes())
    # the matrix of the track, which begins 40 bytes behind the version: by 90 degrees, clockwise
    start = data.index(b"tkhd") + 4 + 40
    one, minus_one, zero = b"\0\1\0\0", b"\xff\xff\0\0", b"\0\0\0\0"
    width = (48).to_bytes(2, "big") + b"\0\0"
    data[start : start + 36] = zero + one + zero + minus_one + zero + zero + width + zero + b"\x40\0\0\0"
    path.write_bytes(data)

    assert check_video(path, "video").size == "48 x 64"
    frame = open_video(as_input(path))[0]
    assert is_near(frame, (24, 8), RED) and is_near(frame, (24, 56), BLUE), "left is up"


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()

    with pytest.raises(FileError, match="video=a has no frames; a video has several"):
        check_video(tmp_path / "sound.mp4", "video=a")
    with pytest.raises(FileError, match="video=a has no frames; a video has several"):
        check_video(tmp_path / "empty.avi", "video=a")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_text("not a video " * 100)

    with pytest.raises(FileError, match="video=a cannot be read as a video"):
        check_video(tmp_path / "a.mp4", "video=a")


def test_a_video_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("L", (64, 64), shade) for shade in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 64 * 64 * 9)

    with pytest.raises(
        FileError, match=r"video=a has 10 frames of 64 x 64 pixels; all frames together may have 36,864"
    ):
        check_video(tmp_path / "a.gif", "video=a")


def test_an_image_is_fitted_whole_with_white_beside_it() -> None:
    wide = make_halves(width=64, height=16)

    fitted = np.asarray(fit_image(wide, (32, 32), border="white"))

    assert fitted.shape == (32, 32, 3)
    assert (fitted[:12] == 255).all() and (fitted[20:] == 255).all()
    assert fitted[16, 2].tolist() == list(RED)
    assert fitted[16, 29].tolist() == list(BLUE)


def test_the_border_of_a_fitted_mask_stays_as_it_is() -> None:
    mask = Image.new("L", (16, 64), 255)

    fitted = np.asarray(fit_image(mask, (32, 32), border="black"))

    assert (fitted[:, 16] == 255).all()
    assert (fitted[:, :12] == 0).all()


@pytest.mark.parametrize("size", [(32, 32), None])
def test_an_image_of_the_right_size_is_not_touched(size: tuple[int, int] | None) -> None:
    image = make_halves(width=32, height=32)

    assert fit_image(image, size, border="white") is image


def test_an_input_is_opened_at_the_size_that_it_is_brought_to(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make_halves(width=64, height=16).save(path)
    animation = tmp_path / "a.gif"
    make_halves().save(
        animation, save_all=True, append_images=[make_halves().transpose(Image.Transpose.ROTATE_180)]
    )
    fitted = replace(as_input(path), size=(32, 48))

    frames = open_video(replace(as_input(animation), size=(32, 48)))

    assert open_image(fitted).size == open_mask(fitted).size == (32, 48)
    assert [frame.size for frame in frames] == [(32, 48)] * 2
    assert np.asarray(open_image(fitted))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(open_mask(fitted))[0, 0] == 0
