"""task=inspect of a prompt table: what each row has, and which of its inputs cannot be used."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from int8run.errors import FileError
from int8run.models.family import ModelSource
from int8run.models.sampling import Sampling
from int8run.tasks.inspect_file import inspect_file
from int8run.tasks.inspect_prompts import NamedModel, find_named_model, inspect_prompts

TINY = ModelSource("shipped:tiny", "tiny", Sampling(), mode="img2img")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two sizes, an animation, and a file that is none."""
    Image.new("RGB", (32, 16)).save(tmp_path / "cat.png")
    Image.new("L", (16, 16)).save(tmp_path / "mask.png")
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 128, 255)]
    frames[0].save(tmp_path / "walk.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def test_each_row_says_what_it_has(folder: Path) -> None:
    path = folder / "a.csv"
    path.write_text("prompt,image,video,strength,seed,layers\na cat,cat.png,,0.5,7,3\n,,walk.gif,,,\n")

    description = inspect_file(str(path))

    rows = dict(description.rows)
    assert rows["kind"] == "prompt table"
    assert rows["size"] == "0.1 kB, 2 rows"
    assert rows["columns"] == "prompt 1, image 1, strength 1, seed 1, layers 1, video 1"
    assert rows["row 1"] == "a cat · image cat.png (32 x 16) · strength 0.5 · seed 7 · layers 3"
    assert rows["row 2"] == "no prompt · video walk.gif (16 x 16, 3 frames)"
    assert description.list_commands() == [f"to generate them:  int8run prompts=file prompts.path={path}"]


def test_an_input_that_cannot_be_used_is_shown_beside_its_row(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_text(
        '{"prompt": "a", "image": "dog.png"}\n{"prompt": "b", "image": "text.png"}\n'
        '{"prompt": "c", "image": "cat.png", "mask_image": "mask.png"}\n{"prompt": "d", "image": "cat.png"}\n'
    )

    description = inspect_file(str(path))

    rows = dict(description.rows)
    assert rows["row 1"] == "a · image dog.png"
    assert rows["problem in row 1"].startswith(f"image={folder}/dog.png: no such file")
    assert rows["problem in row 2"].startswith("image=text.png is not an image that can be read")
    assert rows["problem in row 3"].startswith(
        "mask_image=mask.png has 16 x 16 pixels, and its image cat.png 32"
    )
    assert "problem in row 4" not in rows
    assert not description.commands


def test_of_many_rows_the_first_are_shown(folder: Path) -> None:
    path = folder / "a.csv"
    path.write_text("prompt,image\n" + "a,cat.png\n" * 30 + "b,dog.png\n")

    rows = dict(inspect_file(str(path)).rows)

    assert rows["size"].endswith("31 rows")
    assert "row 20" in rows and "row 21" not in rows
    assert rows["…"] == "11 more rows"
    assert "problem in row 31" in rows


def test_a_list_of_prompts_is_described_too(folder: Path) -> None:
    (folder / "a.txt").write_text("# mine\na fox\nan owl\n")

    rows = dict(inspect_file(str(folder / "a.txt")).rows)

    assert (rows["kind"], rows["row 2"]) == ("prompts, one per line", "an owl")


def test_a_table_that_cannot_be_read_is_an_error(folder: Path) -> None:
    (folder / "a.csv").write_text("prompt,prompt\n")

    with pytest.raises(FileError, match=r"a\.csv, line 1 has the column 'prompt' twice"):
        inspect_file(str(folder / "a.csv"))


def test_what_the_model_takes_is_said(folder: Path) -> None:
    (folder / "a.csv").write_text("prompt,image\na,cat.png\n")
    model = NamedModel(TINY, ("model=tiny", "model.mode=img2img"))

    described = inspect_prompts(folder / "a.csv", model)
    absent = NamedModel(replace(TINY, location=str(folder / "absent")), ("model=mine",))
    unknown = dict(inspect_prompts(folder / "a.csv", absent).rows)

    assert dict(described.rows)["the model takes"] == "FluxImg2ImgPipeline: image (needed), strength"
    assert described.list_commands() == [
        f"to generate them:  int8run model=tiny model.mode=img2img prompts=file prompts.path={folder}/a.csv"
    ]
    assert unknown["the model takes"].startswith("not known: ")


def test_rows_that_the_model_does_not_take_are_problems(folder: Path) -> None:
    path = folder / "a.csv"
    path.write_text("prompt,image,mask_image\na,cat.png,\nb,,\nc,cat.png,cat.png\n")

    described = inspect_prompts(path, NamedModel(TINY, ("model=tiny", "model.mode=img2img")))

    rows = dict(described.rows)
    assert "problem in row 1" not in rows
    assert rows["problem in row 2"] == "FluxImg2ImgPipeline needs image"
    assert rows["problem in row 3"] == "FluxImg2ImgPipeline takes no mask_image"
    assert not described.commands


def test_only_a_model_that_the_command_names_is_asked(folder: Path) -> None:
    words = ["task=inspect", "model=tiny", "+model.mode=img2img", "model_type=flux", "prompts.path=a.csv"]

    assert find_named_model(TINY, words) == NamedModel(TINY, ("model=tiny", "+model.mode=img2img"))
    assert find_named_model(TINY, ["task=inspect"]) is None
