"""task=inspect of a PNG: what it was made with, and the command that makes it again."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.cli_process import Command
from support.run_job import make_spec

from int8run.errors import FileError
from int8run.generate.image_parameters import collect_input_facts
from int8run.generate.input_files import read_samples
from int8run.generate.prompts import PromptSet
from int8run.layers.plan import Int8Settings
from int8run.tasks.file_description import FileDescription
from int8run.tasks.inspect_file import inspect_file
from int8run.tasks.model_facts import SAID_OTHERWISE, list_int8_settings, list_methods
from int8run.tasks.run_settings import list_other_settings

FACTS: dict[str, Any] = {
    "version": "int8run 0.1.0",
    "prompt": "a fox, it's here",
    "seed": 3,
    "model": "tiny",
    "sampling": {"steps": 2, "guidance": 3.5, "height": 16, "width": 16, "batch": 1, "extra": {}},
    "precision": "INT8",
    "outlier": "convrot",
    "settings": {},
}


def write_png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 6)).save(path, pnginfo=chunks)
    return path


def describe(folder: Path, **changes: Any) -> FileDescription:
    """What is said of an image of ours; a fact that is None is left out."""
    facts = {name: value for name, value in (FACTS | changes).items() if value is not None}
    return inspect_file(str(write_png(folder / "a.png", int8run=json.dumps(facts))))


def test_facts_are_shown_by_name(tmp_path: Path) -> None:
    rows = dict(describe(tmp_path).rows)

    assert rows["size"].endswith("8 x 6 pixels")
    assert (rows["prompt"], rows["seed"], rows["outlier"]) == ("a fox, it's here", "3", "convrot")
    assert rows["sampler.steps"] == "2"
    assert "sampler.extra" not in rows, "it is empty"
    unsaid = [text for name, text in describe(tmp_path).rows if name == "not said"]
    assert [text.partition(":")[0] for text in unsaid] == [
        "settings of the outlier method, of rounding= and backend=",
        "settings of int8, such as int8.attention",
    ], "this image is by an earlier version"


def test_the_command_is_quoted_for_a_shell(tmp_path: Path) -> None:
    (line,) = describe(tmp_path, negative_prompt="$blurry").list_commands()

    words = shlex.split(line.removeprefix("to repeat it:  "))
    assert words[:5] == [
        "int8run",
        "model=tiny",
        "prompt=a fox, it's here",
        "negative_prompt=$blurry",
        "seed=3",
    ]
    assert words[-1] == "outlier=convrot"


def test_the_command_has_the_methods_with_their_settings(tmp_path: Path) -> None:
    methods = {
        "outlier_settings": {"group_size": 64},
        "rounding": "mse",
        "rounding_settings": {"candidates": 8, "smallest": 0.75},
        "backend": "cpu",
        "backend_settings": {"int8_branch": True},
        "int8_settings": {},
    }

    description = describe(tmp_path, **methods)

    (line,) = description.list_commands()
    assert line.endswith(
        " outlier=convrot outlier.group_size=64 rounding=mse rounding.candidates=8 rounding.smallest=0.75"
        " backend=cpu backend.int8_branch=True"
    )
    rows = dict(description.rows)
    assert (rows["outlier.group_size"], rows["rounding"], rows["backend"]) == ("64", "mse", "cpu")
    assert "not said" not in rows


# a value of each setting of `int8` that is not its default; a new setting needs one here
INT8_VALUES = {
    "small_batch_fallback": "never",
    "max_rows": 7,
    "small_layer_params": 5,
    "only_if_faster": False,
    "convolutions": "auto",
    "vae": "int8",
    "controlnet": "float",
    "attention": "auto",
    "attention_min_sqnr_db": 12.5,
    "bits": 4,
    "group_size": 32,
    "steps": [[0.0, "float"], [0.5, "int8"]],
}
NOT_REPEATED = {"checkpoint"}  # a file of one machine; the image says that it is needed


def test_every_setting_of_int8_is_repeated_or_said_otherwise() -> None:
    names = {field.name for field in dataclasses.fields(Int8Settings)}

    assert names == {*INT8_VALUES, *NOT_REPEATED, *SAID_OTHERWISE}


@pytest.mark.parametrize("names", [["attention"], ["max_rows"], ["steps"], list(INT8_VALUES)], ids=", ".join)
def test_the_command_repeats_the_settings_of_int8(tmp_path: Path, names: list[str]) -> None:
    spec = make_spec([f"int8.{name}={INT8_VALUES[name]}" for name in names])

    description = describe(tmp_path, **list_methods(spec))

    (line,) = description.list_commands()
    words = [word for word in shlex.split(line) if word.startswith("int8.")]
    assert len(words) == len(names), "the defaults are left out"
    assert make_spec(words).int8 == spec.int8
    rows = dict(description.rows)
    shown = {name: rows.get(f"int8.{name}") for name in names}
    assert shown == {name: str(INT8_VALUES[name]) for name in names}
    assert "not said" not in rows


def test_a_checkpoint_of_int8_layers_is_named_without_its_folder() -> None:
    one = list_int8_settings(Int8Settings(checkpoint="/home/me/mine.safetensors"))
    two = list_int8_settings(Int8Settings(checkpoint={"transformer": "/a/high.safetensors", "t2": "low/"}))

    assert (one["checkpoint"], two["checkpoint"]) == ("mine", "high, low")


def test_an_automatic_choice_names_no_candidates(tmp_path: Path) -> None:
    settings = {"max_cost": None, "tolerance_db": 0.1}

    description = describe(
        tmp_path, outlier="auto", outlier_settings=settings, rounding="absmax", int8_settings={}
    )

    (line,) = description.list_commands()
    assert line.endswith(" outlier=auto outlier.max_cost=null outlier.tolerance_db=0.1 rounding=absmax")
    assert (
        dict(description.rows)["not said"] == "the candidates of outlier=auto: the command takes the defaults"
    )


def test_loras_that_a_model_brings_are_repeated_with_it(tmp_path: Path) -> None:
    (line,) = describe(tmp_path, model="tiny", loras="edit: 1").list_commands()

    assert " int8run model=tiny_edit 'prompt=" in line


def test_a_float_image_is_repeated_in_its_dtype(tmp_path: Path) -> None:
    (line,) = describe(tmp_path, precision="bfloat16", outlier=None, text_encoders="nvfp4").list_commands()

    assert line.endswith(" int8.enable=false model.dtype=bfloat16 clip=nvfp4")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"loras": "style: 0.5"}, "needs its LoRAs (style: 0.5), whose files the image does not name"),
        ({"model": "mine"}, "needs the checkpoint mine, which is no option of model="),
        ({"text_encoders": "auto"}, "needs the file of its text encoders"),
        ({"sampling": {"extra": {"sigmas": [1, 0.5]}}}, "needs sampler.extra.sigmas, which is no number"),
        ({"sampling": {"extra": [1]}}, "needs sampler.extra, of which the image has no names and values"),
        ({"sampling": {"extra": {"a;reboot": 1}}}, "needs sampler.extra.'a;reboot', which is no name"),
        ({"outlier_settings": {"$(reboot)": 1}}, "needs outlier.'$(reboot)', which is no name of a setting"),
        ({"outlier_settings": "a"}, "needs outlier, of which the image has no names and values"),
        ({"rounding": "mse", "rounding_settings": {"smallest": "x"}}, "needs rounding.smallest, which is no"),
        ({"int8_settings": {"checkpoint": "mine"}}, "needs int8.checkpoint (mine), whose folder the image"),
        ({"int8_settings": {"later": 1}}, "needs int8.later, which this version does not have"),
        (
            {"int8_settings": {"attention": {"a": 1}}},
            "needs int8.attention, which is no number, text or list",
        ),
    ],
    ids=[
        "loras",
        "checkpoint",
        "text encoders",
        "sigmas",
        "a list of arguments",
        "an argument for a shell",
        "a setting for a shell",
        "a text of settings",
        "a setting that is text",
        "INT8 layers of a file",
        "a setting of a later version",
        "a list as a setting",
    ],
)
def test_what_a_command_would_lack_is_named(tmp_path: Path, changes: dict[str, Any], missing: str) -> None:
    description = describe(tmp_path, **changes)

    assert description.list_commands() == []
    assert dict(description.rows)["to repeat it"].startswith(missing)


def test_an_image_of_another_program(tmp_path: Path) -> None:
    rows = dict(inspect_file(str(write_png(tmp_path / "a.png", parameters="a fox\nSteps: 4"))).rows)

    assert rows["kind"] == "image, not made by int8run"
    assert rows["made with"] == "a fox\nSteps: 4"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sampling": 1}'])
def test_a_text_chunk_that_is_not_ours_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileError, match="its text chunk int8run is not"):
        inspect_file(str(write_png(tmp_path / "a.png", int8run=text)))


def test_a_file_that_is_no_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")

    with pytest.raises(FileError, match="cannot be read as a PNG"):
        inspect_file(str(tmp_path / "a.png"))
    with pytest.raises(FileError, match=r"b\.png: no such file"):
        inspect_file(str(tmp_path / "b.png"))


@pytest.mark.slow
def test_the_command_makes_the_same_image(command: Command) -> None:
    settings = ["sampler.steps=2", "tracker=none", "metrics.baseline=none", "backend=reference"]
    settings += ["outlier=convrot", "outlier.group_size=16", "rounding=mse", "rounding.candidates=4"]
    made = command("model=tiny", 'prompt=a fox, in "snow"', *settings, "hydra.run.dir=first")
    assert made.code == 0, made.err
    (image,) = (command.folder / "first" / "images").iterdir()
    (line,) = inspect_file(str(image)).list_commands()

    _, *words = shlex.split(line.removeprefix("to repeat it:  "))
    repeated = command(*words, "tracker=none", "metrics.baseline=none", "hydra.run.dir=second")

    assert repeated.code == 0, repeated.err
    (again,) = (command.folder / "second" / "images").iterdir()
    assert Image.open(image).tobytes() == Image.open(again).tobytes()


def test_the_command_has_the_inputs(tmp_path: Path) -> None:
    description = describe(
        tmp_path,
        pipeline="FluxImg2ImgPipeline",
        inputs={"image": ["my cat.png"], "reference_images": ["a.png", "b's.png"]},
        strength=0.5,
        arguments={"true_cfg_scale": 4},
    )

    (line,) = description.list_commands()
    words = shlex.split(line.removeprefix("to repeat it:  "))
    assert words[4:9] == [
        "model.pipeline=FluxImg2ImgPipeline",
        "prompts.image='my cat.png'",
        r"prompts.reference_images=['a.png','b\'s.png']",
        "prompts.strength=0.5",
        "++sampler.extra.true_cfg_scale=4",
    ]
    rows = dict(description.rows)
    assert (rows["image"], rows["reference_images"]) == ("my cat.png", "a.png, b's.png")
    missing = [text.partition(",")[0] for name, text in description.rows if name == "not found"]
    assert missing == ["my cat.png", "a.png", "b's.png"]


def test_the_command_takes_the_copies_that_the_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, copies = tmp_path / "images", tmp_path / "inputs"
    images.mkdir()
    copies.mkdir()
    for name in ("my-cat.png", "b.png"):
        (copies / name).touch()
    facts = FACTS | {
        "inputs": {"image": ["my cat.png"], "reference_images": ["gone.png", "b.png"]},
        "input_copies": {"image": ["my-cat.png"], "reference_images": ["gone.png", "b.png"]},
    }
    write_png(images / "a.png", int8run=json.dumps(facts))
    monkeypatch.chdir(images)

    description = inspect_file("a.png")

    (line,) = description.list_commands()
    words = shlex.split(line)
    assert f"prompts.image={copies / 'my-cat.png'}" in words
    assert f"prompts.reference_images=['gone.png','{copies / 'b.png'}']" in words
    rows = dict(description.rows)
    assert rows["image"] == "my cat.png" and "input copies" not in rows
    assert rows["not found"].startswith("gone.png, no copy beside the image")


@pytest.mark.parametrize("name", ["../secret.png", "..", "", "x" * 999, 1, None])
def test_a_copy_is_looked_for_in_its_folder_alone(tmp_path: Path, name: object) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "inputs").mkdir()
    (tmp_path / "secret.png").touch()

    description = describe(tmp_path / "images", inputs={"image": ["a.png"]}, input_copies={"image": [name]})

    assert "prompts.image=a.png" in shlex.split(description.list_commands()[0])


def test_a_run_names_the_copies_of_its_inputs(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "My Cat.PNG")
    prompts = PromptSet(prompts=["a"], image=str(tmp_path / "My Cat.PNG"))
    (sample,) = read_samples(prompts, seed=0, folder=tmp_path / "out")
    (tmp_path / "out" / "images").mkdir()

    description = describe(tmp_path / "out" / "images", **collect_input_facts(sample.inputs))

    copy = tmp_path / "out" / "inputs" / "my-cat.png"
    assert f"prompts.image={copy}" in shlex.split(description.list_commands()[0])
    assert copy.read_bytes() == (tmp_path / "My Cat.PNG").read_bytes()


NOT_GIVEN = {
    "input of a table": (
        {"inputs": {"pose_video": ["a.mp4"]}},
        "needs its input pose_video, which stands in a",
    ),
    "no name of an input": ({"inputs": {"image;reboot": ["a"]}}, "needs"),
    "argument": ({"arguments": {"layers": [1, 2]}}, "needs the argument layers, which is no number or text"),
}


@pytest.mark.parametrize(("facts", "reason"), NOT_GIVEN.values(), ids=NOT_GIVEN)
def test_inputs_that_no_setting_is_for_are_named(tmp_path: Path, facts: dict[str, Any], reason: str) -> None:
    description = describe(tmp_path, **facts)

    assert not description.commands
    assert dict(description.rows)["to repeat it"].startswith(reason)


def test_the_command_has_the_settings_of_the_run(tmp_path: Path) -> None:
    spec = make_spec(["attention=sage", "compile=blocks", "model.dtype=float16"])

    description = describe(tmp_path, settings=list_other_settings(spec, is_int8=True), outlier=None)

    (line,) = description.list_commands()
    words = shlex.split(line)
    assert {"attention=sage", "compile=blocks", "model.dtype=float16"} <= set(words)
    rows = dict(description.rows)
    assert (rows["attention"], rows["model.dtype"]) == ("sage", "float16")


def test_an_image_of_an_earlier_version_says_that_settings_are_missing(tmp_path: Path) -> None:
    unsaid = [text for name, text in describe(tmp_path, settings=None).rows if name == "not said"]

    assert unsaid[-1].startswith("settings such as calibration, compile= and attention=")
