"""From rows to samples: inputs are checked together, hashed, and copied once for each content."""

import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from int8run.errors import FileError
from int8run.generate import input_files
from int8run.generate.input_files import read_samples
from int8run.generate.media import open_image
from int8run.generate.prompts import PromptSet, Sample, split_batches
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs


def save_image(path: Path, color: str = "red", size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def read(folder: Path, table: str, **settings: Any) -> list[Sample]:
    """The samples of a table in CSV, with the copies in `run`."""
    (folder / "a.csv").write_text(table)
    return read_samples(PromptSet(path=str(folder / "a.csv"), **settings), seed=3, folder=folder / "run")


def test_inputs_are_copied_once_for_each_content(tmp_path: Path) -> None:
    save_image(tmp_path / "My Cat.PNG")
    save_image(tmp_path / "same" / "other.png")
    save_image(tmp_path / "blue" / "my-cat.png", "blue")
    table = "prompt,image\na,My Cat.PNG\nb,blue/my-cat.png\nc,same/other.png\nd,My Cat.PNG\n"

    samples = read(tmp_path, table)

    images = [sample.inputs.files["image"][0] for sample in samples]
    assert [image.path.relative_to(tmp_path / "run").as_posix() for image in images] == [
        "inputs/my-cat.png",
        "inputs/my-cat-2.png",
        "inputs/my-cat.png",
        "inputs/my-cat.png",
    ]
    assert [image.name for image in images] == ["My Cat.PNG", "my-cat.png", "other.png", "My Cat.PNG"]
    assert images[0] == images[2] != images[1]
    assert images[1].path.read_bytes() == (tmp_path / "blue" / "my-cat.png").read_bytes()
    assert len(list((tmp_path / "run" / "inputs").iterdir())) == 2


def test_samples_are_known_by_the_content_of_their_inputs(tmp_path: Path) -> None:
    save_image(tmp_path / "one" / "cat.png")
    save_image(tmp_path / "two" / "tiger.png")
    save_image(tmp_path / "three" / "cat.png", "blue")
    texts = []
    for path in ("one/cat.png", "two/tiger.png", "three/cat.png"):
        texts.append(repr(read(tmp_path, f"prompt,image\na,{path}\n")))

    assert texts[0] == texts[1] != texts[2]
    assert str(tmp_path) not in texts[0]


def test_a_row_without_inputs_is_a_prompt_alone(tmp_path: Path) -> None:
    save_image(tmp_path / "cat.png")

    with_image, without, with_strength = read(tmp_path, "prompt,image,strength\na,cat.png,\nb,,\nc,,0.5\n")

    assert with_image.inputs.files.keys() == {"image"}
    assert without == Sample("b", 3, "001_b_s3")
    assert without.inputs is NO_INPUTS
    assert with_strength.inputs == SampleInputs(strength=0.5)
    assert not list(tmp_path.glob("run/inputs/*"))[1:]


def test_prompts_alone_leave_no_folder(tmp_path: Path) -> None:
    read(tmp_path, "prompt\na\n")

    assert not (tmp_path / "run").exists()


WRONG = {
    "missing": (
        "a,cat.png,\nb,dog.png,",
        r"^a\.csv, row 2 \(line 3\): image=/.*/dog\.png: no such file \(looked for",
    ),
    "folder": ("a,sub,", r"row 1 \(line 2\): image=/.*/sub is a folder; name a file in it"),
    "unreadable": ("a,cat.png,\nb,text.png,", r"^a\.csv, row 2 \(line 3\): image=text\.png is not an image"),
    "mask of another size": (
        "a,cat.png,cat.png\nb,cat.png,wide.png",
        r"^a\.csv, row 2 \(line 3\): mask_image=wide\.png has 32 x 16 pixels, and its image cat\.png 16 x ",
    ),
}


@pytest.mark.parametrize(("rows", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_an_input_is_said_by_its_row(tmp_path: Path, rows: str, message: str) -> None:
    save_image(tmp_path / "cat.png")
    save_image(tmp_path / "wide.png", size=(32, 16))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "sub").mkdir()

    with pytest.raises(FileError, match=message):
        read(tmp_path, f"prompt,image,mask_image\n{rows}\n")
    assert not (tmp_path / "run").exists(), "all is checked before anything is copied"


def test_a_missing_file_is_found_before_any_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "cat.png")
    monkeypatch.setattr(input_files, "check_file", lambda *_, **__: pytest.fail("an input was opened"))

    with pytest.raises(FileError, match=r"row 2 \(line 3\): image=.*no such file"):
        read(tmp_path, "prompt,image\na,cat.png\nb,dog.png\n")


def test_pixels_of_many_images_are_read_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(input_files, "MAX_DECODED", 2)
    decoded = []
    check_image = input_files.check_image

    def count(path: Path, label: str, *, decodes: bool) -> Any:
        decoded.append(decodes)
        return check_image(path, label, decodes=decodes)

    monkeypatch.setattr(input_files, "check_image", count)
    rows = [f"{number},{save_image(tmp_path / f'{number}.png').name}" for number in (1, 2, 3, 1)]

    with caplog.at_level(logging.INFO):
        read(tmp_path, "\n".join(["prompt,image", *rows]))

    assert decoded == [True, True, False], "each file once"
    assert "3 input files were checked, all but 2 by header alone" in caplog.messages


def test_what_changes_when_inputs_are_opened_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        Image.new("RGBA", (16, 16), (number, 0, 0, 0)).save(tmp_path / f"{number}.png")
    rows = "".join(f"a,{number}.png\n" for number in range(5))

    with caplog.at_level(logging.INFO):
        read(tmp_path, f"prompt,image\n{rows}")

    assert caplog.messages == ["transparent parts are laid over white: 0.png, 1.png, 2.png, and 2 more"]


def test_an_input_of_all_prompts_is_one_copy(tmp_path: Path) -> None:
    cat = save_image(tmp_path / "cat.png")
    prompts = PromptSet(["a", "b"], image=str(cat), strength=0.5, seeds_per_prompt=2)

    samples = read_samples(prompts, seed=0, folder=tmp_path / "run")

    assert len(samples) == 4
    assert {sample.inputs.files["image"][0].path for sample in samples} == {tmp_path / "run/inputs/cat.png"}
    assert {sample.inputs.strength for sample in samples} == {0.5}


def test_a_sample_with_inputs_has_a_call_of_its_own() -> None:
    plain = [Sample(str(number), number, str(number)) for number in range(5)]
    with_inputs = Sample("c", 0, "c", inputs=SampleInputs(strength=0.5))

    assert split_batches(plain, 2) == [plain[:2], plain[2:4], plain[4:]]
    assert split_batches([plain[0], with_inputs, with_inputs, plain[1], plain[2]], 2) == [
        [plain[0]],
        [with_inputs],
        [with_inputs],
        [plain[1], plain[2]],
    ]


def test_an_input_is_opened_at_the_size_of_the_run(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    prompts = PromptSet(prompts=["mirror it"], image=str(tmp_path / "a.png"))

    (fitted,) = read_samples(prompts, seed=0, folder=tmp_path / "run", size=(16, 24))
    (as_it_is,) = read_samples(prompts, seed=0, folder=tmp_path / "run")

    assert open_image(fitted.inputs.files["image"][0]).size == (16, 24)
    assert open_image(as_it_is.inputs.files["image"][0]).size == (40, 20)
    assert fitted.inputs != as_it_is.inputs, "float images of the one are not those of the other"
