"""The image gallery: which image stands where, what is embedded, and what is left out."""

import base64
from io import BytesIO

import pytest
from PIL import Image
from report.run_folders import make_noise_image, render_report, write_input, write_run, write_sample

from int8run.report.embedded_images import open_image
from int8run.report.image_files import make_difference_image
from int8run.report.image_gallery import build_gallery
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


# -- inputs --------------------------------------------------------------------------------------------------


def write_edit_run(folder, number, inputs, prompt="fox", **entry):
    """A run of one edit; `inputs` are (column, name, images)."""
    run_folder = folder / str(number)
    image, float_image = make_noise_image(100 + number), make_noise_image(200)
    sample = write_sample(run_folder, "000_fox_s0", prompt, image, float_image, **entry)
    sample["inputs"] = [write_input(run_folder, column, name, *images) for column, name, images in inputs]
    return write_run(folder, number, [f"outlier={number}"], metrics={}, images=[sample])


def test_the_inputs_of_a_sample_stand_in_its_row(tmp_path):
    cat, mask = make_noise_image(0), make_noise_image(1)
    inputs = [("image", "cat.png", [cat]), ("mask_image", "mask.png", [mask])]
    records = [write_edit_run(tmp_path, number, inputs, strength=0.6) for number in range(2)]

    gallery = build_gallery(name_runs(records))

    (row,) = gallery.rows
    assert row.caption == "fox · seed 0 · strength 0.6"
    assert row.input_names == "image: cat.png · mask_image: mask.png"
    shown = [decode_uri(gallery.uris[given.image]) for given in row.inputs]
    assert [image.tobytes() for image in shown] == [cat.tobytes(), mask.tobytes()]
    assert row.compared_input == row.inputs[0].image
    assert len(row.cells) == 2
    assert ("input", "input slider") in gallery.modes


def test_an_input_of_all_rows_is_embedded_once(tmp_path):
    cat = make_noise_image(0)
    samples = []
    for index, prompt in enumerate(("fox", "owl")):
        sample = write_sample(tmp_path / "0", f"{index:03d}_s0", prompt, make_noise_image(index + 5))
        sample["inputs"] = [write_input(tmp_path / "0", "image", "cat.png", cat)]
        samples.append(sample)
    record = write_run(tmp_path, metrics={}, images=samples)

    gallery = build_gallery(name_runs([record]))

    assert len(gallery.uris) == 3
    assert [row.inputs[0].is_first for row in gallery.rows] == [True, False]
    deferred = select_deferred_images(gallery)
    assert gallery.rows[0].inputs[0].image not in deferred, "the page holds it where it is shown first"


def test_other_inputs_make_another_row(tmp_path):
    records = [
        write_edit_run(tmp_path, number, [("image", "in.png", [make_noise_image(number)])])
        for number in range(2)
    ]

    gallery = build_gallery(name_runs(records))

    assert [row.caption for row in gallery.rows] == ["fox · seed 0"] * 2
    missing = [[cell.missing_reason for cell in row.cells] for row in gallery.rows]
    assert missing == [["", "not generated"], ["not generated", ""]]


def test_a_strength_that_runs_do_not_share_is_not_in_the_caption(tmp_path):
    inputs = [("image", "cat.png", [make_noise_image(0)])]
    arguments = {"true_cfg_scale": 4}
    records = [
        write_edit_run(tmp_path, number, inputs, strength=0.3 + number / 10, arguments=arguments)
        for number in range(2)
    ]

    (row,) = build_gallery(name_runs(records)).rows

    assert row.caption == "fox · seed 0 · true_cfg_scale=4"


def test_an_input_video_shows_the_frame_of_the_still_beside_it(tmp_path):
    stills = ["images/v_first.png", "images/v_last.png"]
    frames = [make_noise_image(0), make_noise_image(1)]
    sample = {"prompt": "x", "seed": 1, "file": "images/v.webp", "stills": stills}
    sample["inputs"] = [
        write_input(tmp_path / "0", "video", "clip.mp4", *frames),
        write_input(tmp_path / "0", "reference_images", "face.png", make_noise_image(2)),
    ]
    record = write_run(tmp_path, metrics={}, images=[sample])
    for number, name in enumerate(stills):
        make_noise_image(10 + number).save(tmp_path / "0" / name)

    gallery = build_gallery(name_runs([record]))

    first, last = gallery.rows
    shown = [decode_uri(gallery.uris[row.inputs[0].image]).tobytes() for row in (first, last)]
    assert shown == [frame.tobytes() for frame in frames]
    assert first.inputs[1].image == last.inputs[1].image, "an image stands beside each still"


def test_a_missing_image_of_an_input_leaves_its_name(tmp_path):
    record = write_edit_run(tmp_path, 0, [("image", "cat.png", [make_noise_image(0)])])
    (tmp_path / "0/images/input_cat_0.png").unlink()

    (row,) = build_gallery(name_runs([record])).rows

    assert (row.inputs[0].image, row.input_names, row.compared_input) == (None, "image: cat.png", None)


def test_reference_images_alone_are_not_laid_over_the_result(tmp_path):
    references = [("reference_images", f"{n}.png", [make_noise_image(n)]) for n in range(5)]
    gallery = build_gallery(name_runs([write_edit_run(tmp_path, 0, references)]))

    (row,) = gallery.rows
    assert row.compared_input is None
    assert row.num_input_columns == 3, "five stand in two lines of three and two"
    assert "input" not in dict(gallery.modes)


def test_a_run_of_an_earlier_version_has_no_column_of_inputs(tmp_path):
    old = write_fox_runs(tmp_path, [make_noise_image(0)], [make_noise_image(1)])

    gallery = build_gallery(old)
    page, _ = render_report([run.record for run in old], tmp_path)

    assert not gallery.has_inputs
    assert page.find_all("th", class_="inputs") == page.find_all("td", class_="inputs") == []
    assert "input slider" not in [span["text"] for span in page.find_all("span")]


def test_the_page_has_the_inputs_first(tmp_path):
    record = write_edit_run(tmp_path, 0, [("image", "<cat>.png", [make_noise_image(0)])])

    page, html = render_report([record], tmp_path)

    (heading,) = page.find_all("th", class_="inputs")
    assert heading["text"] == "input"
    tiles = [tile for tile in page.find_all("button") if tile.get("class") == "tile"]
    assert "data-fixed" in tiles[0] and tiles[1]["data-input"] == tiles[0]["data-fixed"]
    assert "<cat>" not in html
    assert page.unbalanced == []


def test_few_columns_begin_with_images_that_fill_the_page(tmp_path):
    sizes = []
    for number in range(9):
        images = [{"prompt": "fox", "seed": 0, "file": "images/fox.png"}]
        write_run(tmp_path, number, [f"outlier={number}"], metrics={}, images=images)
        sizes.append(build_gallery(name_runs(find_records(tmp_path))).image_size)

    assert sizes == [160, 320, 320, 280, 224, 184, 160, 160, 160]
