"""Images are written while a run generates, and say what they were made with."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from support.run_job import make_spec, run_job, save_lora
from support.tiny_pipeline import random_pipeline

import int8run.generate.generate as generate_module
from int8run.errors import ConfigError
from int8run.pipeline import process_cache
from int8run.report.image_files import save_sample
from int8run.tasks.model_facts import describe_model, list_methods, name_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=2",
    "tracker=none",
    "backend=reference",
    "metrics.layers=false",
]


@pytest.fixture(autouse=True)
def no_earlier_model() -> None:
    process_cache.clear()


def interrupt_call(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let call number `number` of the pipeline raise an error in place of an image."""
    real_call, calls = generate_module.call_pipeline, []

    def call(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return real_call(*arguments)

    monkeypatch.setattr(generate_module, "call_pipeline", call)


# -- while it generates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_what_is_generated_is_kept_when_a_run_is_stopped(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    interrupt_call(monkeypatch, 6, error)  # two of the warm-up, then float, INT8, INT8 of two prompts

    with pytest.raises(type(error)):
        run_job([model, *SMALL, "prompts.prompts=[a,b,c]"], tmp_path)

    kept = {path.name for path in (tmp_path / "images").iterdir()}
    assert kept == {"000_a_s0.png", "000_a_s0_float.png", "001_b_s0.png"}
    assert f"3 of 6 images are generated and kept in {tmp_path / 'images'}" in caplog.text


def test_each_image_has_a_line_with_the_time_left(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    run_job([model, *SMALL, "prompts.prompts=[a,b]", "metrics.baseline=none"], tmp_path)

    lines = [line for line in caplog.messages if line.startswith("Generating: ") and " of " in line]
    assert [line.rpartition(" ")[0].rstrip("0123456789:, ") for line in lines] == [
        "Generating: 1 of",
        "Generating: 2 of 2, took",
    ]
    assert lines[0].endswith(" left")


# -- what the files say --------------------------------------------------------------------------------------


def test_each_image_says_what_it_was_made_with(model: str, tmp_path: Path) -> None:
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
    lora = (
        f"lora.adapters=[{{_target_: int8run.lora.config.Adapter, name: style, path: {file}, strength: 0.5}}]"
    )

    methods = ["outlier=convrot", "outlier.group_size=64", "rounding=mse", "rounding.candidates=8"]
    run_job([model, *SMALL, "prompts.prompts=['лиса']", *methods, "seed=3", lora], tmp_path / "out")

    int8_path, float_path = sorted((tmp_path / "out" / "images").iterdir(), key=lambda path: len(path.name))
    texts, float_texts = Image.open(int8_path).text, Image.open(float_path).text
    prompt, negative, settings = texts["parameters"].split("\n")
    assert (prompt, negative) == ("лиса", "Negative prompt: ")
    folder = Path(model.removeprefix("model.location=")).name
    assert settings.startswith(
        "Steps: 2, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 3, Size: 16x16, "
        f"Model: {folder},"
    )
    assert (
        "Precision: INT8, Outlier: convrot group_size=64, Rounding: mse candidates=8 smallest=0.5, "
        'Backend: reference, LoRAs: "style: 0.5", Version: int8run'
    ) in settings
    assert 'Precision: float32, LoRAs: "style: 0.5", Version: int8run' in float_texts["parameters"]
    facts = json.loads(texts["int8run"])
    assert (facts["prompt"], facts["seed"], facts["outlier"], facts["loras"]) == (
        "лиса",
        3,
        "convrot",
        "style: 0.5",
    )
    assert (facts["outlier_settings"], facts["rounding"], facts["rounding_settings"], facts["backend"]) == (
        {"group_size": 64},
        "mse",
        {"candidates": 8, "smallest": 0.5},
        "reference",
    )
    assert "backend_settings" not in facts, "it has none"
    assert not {"outlier", "rounding", "backend"} & set(json.loads(float_texts["int8run"]))
    assert str(tmp_path) not in "".join(texts.values())


def test_the_settings_of_a_method_are_those_that_a_command_can_take() -> None:
    spec = make_spec(["outlier=auto", "outlier.max_cost=null", "backend.table=/home/me/table.json"])

    facts = list_methods(spec)

    assert facts["outlier_settings"] == {"max_cost": None, "tolerance_db": 0.1}, "no methods in it"
    assert facts["backend_settings"] == {"rounds": 7}, "no file in it"
    assert "rounding_settings" not in facts, "absmax has none"


def test_other_programs_are_told_of_the_settings_of_int8_that_were_changed() -> None:
    spec = make_spec(["int8.attention=int8", "int8.vae=int8"])

    assert describe_model(spec, "int8")["INT8 settings"] == "vae=int8 attention=int8"
    assert "INT8 settings" not in describe_model(spec, "float")
    assert "INT8 settings" not in describe_model(make_spec([]), "int8")


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev"),
        ("/home/me/models/flux1-dev.safetensors", "flux1-dev"),
        ("/home/me/my model/", "my model"),
        ("shipped:tiny", "tiny"),
    ],
)
def test_a_model_is_named_without_its_folder(location: str, name: str) -> None:
    assert name_model(location) == name


def test_a_video_says_it_in_its_exif_and_its_stills(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 99)]

    save_sample(frames, {"first": 0}, tmp_path, "fox", 8, {"parameters": "лиса\nSteps: 1"})

    comment = (
        Image.open(tmp_path / "fox.webp").getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    )
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == "лиса\nSteps: 1"
    assert Image.open(tmp_path / "fox_first.png").text["parameters"] == "лиса\nSteps: 1"


# -- what a pipeline rounds ----------------------------------------------------------------------------------


def test_a_rounded_size_is_said_and_recorded(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = ["sampler.height=19", "sampler.width=22", "sampler.batch=4"]

    run_job([model, *SMALL, *sizes, "prompts.prompts=[a]", "metrics.baseline=none"], tmp_path)

    assert "FluxPipeline rounded sampler.width=22 to 20, sampler.height=19 to 16; " in caplog.text
    assert "there are fewer images than sampler.batch=4, and a call makes 1; what was" in caplog.text
    saved = json.loads((tmp_path / "metrics.json").read_text())
    image = saved["images"][0]
    assert (saved["sampling"]["width"], saved["sampling"]["height"], saved["sampling"]["batch"]) == (
        20,
        16,
        1,
    )
    assert saved["rounded"]["sampler.height"] == {"asked": 19, "generated": 16}
    assert (image["width"], image["height"]) == (20, 16)
    opened = Image.open(tmp_path / image["file"])
    assert opened.size == (20, 16)
    assert "Size: 20x16" in opened.text["parameters"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("num_images_per_prompt=2", r"is 2; .* prompts\.seeds_per_prompt=2 makes"),
        ("output_type=latent", "makes no images to compare"),
        ("max_sequence_length=9999", "FluxPipeline cannot generate this: .*max_sequence_length"),
    ],
)
def test_what_cannot_be_compared_is_refused(model: str, tmp_path: Path, extra: str, message: str) -> None:
    overrides = [model, *SMALL, "prompts.prompts=[a]", "metrics.baseline=none", f"++sampler.extra.{extra}"]

    with pytest.raises(ConfigError, match=message):
        run_job(overrides, tmp_path)


# -- memory --------------------------------------------------------------------------------------------------


def test_both_models_have_their_peak_memory(model: str, tmp_path: Path) -> None:
    metrics = run_job([model, *SMALL, "prompts.prompts=[a]"], tmp_path).metrics

    assert metrics["memory/peak_bytes"] > metrics["memory/denoiser_bytes"]
    assert metrics["float/peak_bytes"] > metrics["float/denoiser_bytes"]
