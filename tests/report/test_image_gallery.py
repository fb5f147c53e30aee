"""The image gallery: which image stands where, what is embedded, and what is left out."""

import base64
from io import BytesIO

import pytest
from PIL import Image
from report.run_folders import make_noise_image, write_run, write_sample

from int8run.report.image_files import make_difference_image
from int8run.report.image_gallery import build_gallery, open_image
from int8run.report.page_sections import select_deferred_images
from int8run.report.runs import name_runs
from int8run.tracking.run_record import find_records, read_record


def write_fox_runs(folder, images, float_images):
    """Named runs that each generated one image of a fox."""
    for number, (image, float_image) in enumerate(zip(images, float_images, strict=True)):
        sample = write_sample(folder / str(number), "000_fox_s0", "fox", image, float_image)
        write_run(folder, number, [f"outlier={number}"], metrics={}, images=[sample])
    return name_runs(find_records(folder))


def decode_uri(uri):
    """The image in a data URI."""
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_equal_images_are_embedded_once(tmp_path):
    fox, other, float_fox = make_noise_image(1), make_noise_image(0), make_noise_image(0)

    gallery = build_gallery(write_fox_runs(tmp_path, [fox, fox, other], [float_fox] * 3))

    (row,) = gallery.rows
    first, second, third = row.cells
    assert row.caption == "fox · seed 0"
    assert [cell.same_as for cell in row.cells] == ["", "#0", ""]
    assert [cell.is_first for cell in row.cells] == [True, False, True]
    assert first.image == second.image
    assert third.image == third.float_image == first.float_image
    assert len(gallery.uris) == 4  # INT8, float, their difference, and black
    assert select_deferred_images(gallery).keys() == {first.difference_image, third.difference_image}


def test_small_images_and_differences_are_exact(tmp_path):
    image, float_image = make_noise_image(1), make_noise_image(2)

    gallery = build_gallery(write_fox_runs(tmp_path, [image], [float_image]))

    cell = gallery.rows[0].cells[0]
    expected = {
        cell.image: image,
        cell.float_image: float_image,
        cell.difference_image: make_difference_image(float_image, image),
    }
    assert len(expected) == 3
    for name, original in expected.items():
        assert gallery.uris[name].startswith("data:image/png;base64,")
        assert decode_uri(gallery.uris[name]).tobytes() == original.tobytes()
    assert gallery.notes == [] and gallery.has_float_images


def test_large_images_are_thumbnails_and_a_note_says_so(tmp_path):
    large = make_noise_image(1, 8).resize((1024, 768))

    gallery = build_gallery(write_fox_runs(tmp_path, [large], [None]))

    cell = gallery.rows[0].cells[0]
    assert gallery.uris[cell.image].startswith("data:image/webp;base64,")
    assert decode_uri(gallery.uris[cell.image]).size == (512, 384)
    assert "thumbnails" in gallery.notes[0]
    assert cell.float_image is None and not gallery.has_float_images


@pytest.fixture
def five_prompts(tmp_path):
    """One named run with an image of each of five prompts."""
    samples = [
        write_sample(tmp_path / "0", f"{i:03}_x_s0", f"prompt {i}", make_noise_image(i)) for i in range(5)
    ]
    return name_runs([write_run(tmp_path, metrics={}, images=samples)])


def test_a_page_has_a_limit_of_bytes_and_a_note_says_what_is_left_out(five_prompts):
    nbytes_of_one = len(build_gallery(five_prompts).uris["p0"])

    gallery = build_gallery(five_prompts, max_bytes=int(2.5 * nbytes_of_one))

    assert [row.caption for row in gallery.rows] == ["prompt 0 · seed 0", "prompt 1 · seed 0"]
    assert len(gallery.uris) == 2
    assert gallery.notes[0].startswith("3 images left out: a page holds at most")


def test_a_page_has_a_limit_of_cells(five_prompts):
    assert len(build_gallery(five_prompts).rows) == 5
    assert len(build_gallery(five_prompts, max_cells=3).rows) == 3


def test_a_file_that_cannot_be_read_leaves_its_cell_empty(tmp_path):
    runs = write_fox_runs(tmp_path, [make_noise_image(i) for i in (1, 2, 3)], [None] * 3)
    (tmp_path / "0/images/000_fox_s0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "1/images/000_fox_s0.png").unlink()

    gallery = build_gallery(runs)

    reasons = [cell.missing_reason for cell in gallery.rows[0].cells]
    assert reasons == ["no readable file", "no readable file", ""]
    assert gallery.notes == [
        "2 cells without an image: it was not generated, its file cannot be read, or the page is full."
    ]


def test_an_image_outside_the_folder_is_not_read(tmp_path):
    make_noise_image(1).save(tmp_path / "secret.png")
    (tmp_path / "0").mkdir()

    assert open_image(tmp_path / "0" / ".." / "secret.png", tmp_path / "0") is None
    assert open_image(tmp_path / "secret.png", tmp_path) is not None


def test_rows_are_prompts_and_seeds_whatever_their_order(tmp_path):
    for number, prompts in enumerate((["fox", "owl", "fox"], ["owl", "fox"])):
        images = [{"prompt": p, "seed": 0, "file": f"images/{i}.png"} for i, p in enumerate(prompts)]
        write_run(tmp_path, number, [f"outlier={number}"], metrics={}, images=images)

    gallery = build_gallery(name_runs(find_records(tmp_path)))

    assert {row.caption: [cell.missing_reason for cell in row.cells] for row in gallery.rows} == {
        "fox · seed 0": ["no readable file", "no readable file"],
        "owl · seed 0": ["no readable file", "no readable file"],
        "fox · seed 0 · sample 2": ["no readable file", "not generated"],
    }


def test_a_video_is_shown_as_its_stills(tmp_path):
    stills = ["images/000_x_s0_first.png", "images/000_x_s0_last.png"]
    float_stills = ["images/f_first.png", "images/f_last.png"]
    sample = {"prompt": "x", "seed": 1, "file": "images/000_x_s0.webp", "float": "images/f.webp"}
    sample |= {"psnr_db": 30.0, "stills": stills, "float_stills": float_stills}
    write_run(tmp_path, metrics={}, images=[sample])
    (tmp_path / "0/images").mkdir()
    for i, name in enumerate([*stills, *float_stills]):
        make_noise_image(i).save(tmp_path / "0" / name)

    gallery = build_gallery(name_runs([read_record(tmp_path / "0")]))

    assert [row.caption for row in gallery.rows] == ["x · seed 1 · first frame", "x · seed 1 · last frame"]
    assert all(cell.image and cell.float_image for row in gallery.rows for cell in row.cells)
    assert "stills" in gallery.notes[0]
