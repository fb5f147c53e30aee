"""The settings in an image: all that changes pixels is there, and the words of its command give it back."""

import dataclasses
import json
import shlex

import pytest
import yaml
from support.run_job import make_spec

from int8run.config.run_spec import RunSpec
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.lora.config import LoraSettings
from int8run.models.family import MODEL_FOLDER, ModelSource
from int8run.tasks.run_settings import (
    ENCODERS_SAID_BY_FACTS,
    LORA_SAID_BY_FACTS,
    MODEL_SAID_BY_FACTS,
    NO_SETTINGS,
    SAID_BY_FACTS,
    WITHOUT_PIXELS,
    UnrepeatableSettingError,
    list_candidate_words,
    list_candidates,
    list_known_keys,
    list_other_settings,
    list_other_words,
)
from int8run.text_encoders.base import TextEncoders

# a change of every setting that changes pixels and is in no other fact; a new setting needs one here
CHANGES = [
    ["attention=sage", "compile=blocks", "device=cpu"],
    [
        "model_type.mixed_precision=auto",
        "quality_db=40",
        "calibration.prompts=[owl,'a fox, it\\'s red']",
        "calibration.seed=5",
        "calibration.num_timesteps=2",
        "calibration.max_tokens_per_layer=64",
    ],
    ["model.dtype=float16", "model.revision=abc", "model.quant_format=int8_rowwise", "model.sdnq=hadamard"],
    ["model.workflow=text2image", "model.skip_blocks=[a,b]"],
    ["model=tiny_edit", "lora.mode=bake", "lora.max_overhead=0.5"],
    ["clip=int8_rowwise", "clip.kernel_backend=dequantize", "clip.components=[text_encoder_2]"],
    ["model_type=flux"],
    ["model_type.keep_blocks={first:1,last:2}"],
    ["cache_steps=first_block", "cache_steps.threshold=0.3"],
]
NOT_REPEATED = {"model.base", "model.parts", "clip.path"}  # files: the image says that they are needed


def list_words(spec, option):
    """The words of the command that an image of this run has."""
    settings = json.loads(json.dumps(list_other_settings(spec, is_int8=True)))
    model_option = yaml.safe_load((MODEL_FOLDER / f"{option}.yaml").read_text())
    return list_other_words(settings, model_option)


@pytest.mark.parametrize("overrides", CHANGES, ids=lambda overrides: overrides[0])
def test_the_words_give_back_every_setting(overrides):
    spec = make_spec(overrides)
    option = "tiny_edit" if "model=tiny_edit" in overrides else "tiny"

    words = [word for line in list_words(spec, option) for word in shlex.split(line)]

    facts = [word for word in overrides if word.startswith(("model=", "clip="))]
    again = make_spec([*facts, *words])
    for field in dataclasses.fields(RunSpec):
        if field.name not in WITHOUT_PIXELS:
            assert getattr(again, field.name) == getattr(spec, field.name), field.name
    changed = {word.partition("=")[0] for word in overrides} - {"model", "clip"}
    assert {word.partition("=")[0] for word in words} == changed, "the defaults are left out"


def test_every_setting_is_repeated_or_said_otherwise():
    changed = {word.partition("=")[0] for overrides in CHANGES for word in overrides}
    changed |= NOT_REPEATED | {"plugins"}  # which has a test of its own: it needs an installed package

    names = {field.name for field in dataclasses.fields(RunSpec)}
    assert names - WITHOUT_PIXELS - SAID_BY_FACTS == {key.partition(".")[0] for key in changed}
    sections = {
        "model": (ModelSource, MODEL_SAID_BY_FACTS),
        "lora": (LoraSettings, LORA_SAID_BY_FACTS),
        "clip": (TextEncoders, ENCODERS_SAID_BY_FACTS),
        "calibration": (CalibrationSettings, NO_SETTINGS),
    }
    for section, (settings, said) in sections.items():
        keys = {f"{section}.{field.name}" for field in dataclasses.fields(settings) if field.name not in said}
        assert keys == {key for key in changed if key.startswith(f"{section}.")}


def test_plugins_are_repeated():
    spec = dataclasses.replace(make_spec([]), plugins=("my_package",))

    assert "plugins=['my_package']" in [shlex.split(word)[0] for word in list_words(spec, "tiny")]


def test_a_float_image_has_nothing_of_int8():
    spec = make_spec(["compile=blocks", "clip=int8_rowwise", *CHANGES[1]])

    settings = list_other_settings(spec, is_int8=False)

    assert settings["compile"] == "blocks" and settings["model.dtype"] == "float32"
    assert not any(key.startswith(("calibration", "quality_db", "clip", "lora")) for key in settings)


def test_the_calibration_that_a_step_cache_is_measured_on_is_said():
    settings = list_other_settings(make_spec(["cache_steps=magcache", "calibration.seed=5"]), is_int8=True)

    assert settings["calibration.seed"] == 5


def test_no_image_names_the_class_of_its_step_cache():
    assert not any("_target_" in key for key in list_known_keys())


def test_a_calibration_that_nothing_needs_is_left_out():
    settings = list_other_settings(make_spec(["calibration.seed=5"]), is_int8=True)

    assert "calibration.seed" not in settings


def test_a_path_of_the_machine_is_its_name_and_no_word():
    spec = make_spec(["clip=int8_rowwise", "clip.path=/home/anna/encoder.safetensors"])

    settings = list_other_settings(spec, is_int8=True)

    assert "anna" not in json.dumps(settings)
    with pytest.raises(
        UnrepeatableSettingError, match=r"needs clip\.path \(encoder\), whose folder the image"
    ):
        list_words(spec, "tiny")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "of which the image has no names and values"),
        ({"hydra.run.dir": "/"}, "needs 'hydra.run.dir', which is no setting"),
        ({"a;reboot": 1}, "needs 'a;reboot', which is no setting"),
        ({"tracker.uri": "http://evil"}, "needs 'tracker.uri', which is no setting"),
        ({"compile": {"a": 1}}, "needs compile, which is no number or text"),
        ({"calibration.prompts": [[["a"]]]}, r"needs calibration\.prompts, which is no number"),
    ],
)
def test_what_somebody_wrote_into_an_image_makes_no_word(settings, reason):
    with pytest.raises(UnrepeatableSettingError, match=reason):
        list_other_words(settings, {})


def test_a_value_is_quoted_for_a_shell():
    (word,) = list_other_words({"attention": "a b; $(reboot) 'x'"}, {})

    (read,) = shlex.split(word)
    assert make_spec([read]).attention == "a b; $(reboot) 'x'"


def test_the_candidates_of_an_automatic_choice_are_repeated():
    overrides = ["outlier=auto", "outlier.candidates.hadanorm.alpha=0.25", "~outlier.candidates.quarot"]
    spec = make_spec(overrides)

    words = list(list_candidate_words(json.loads(json.dumps(list_candidates(spec)))))

    assert make_spec(["outlier=auto", *words]).outlier == spec.outlier
    assert sorted(words) == sorted(overrides[1:])
    assert list(list_candidate_words(list_candidates(make_spec(["outlier=auto"])))) == []
    assert list_candidates(make_spec([])) is None


@pytest.mark.parametrize(
    "candidates", [None, {"mine": {"method": "convrot"}}, {"quarot": {"method": "none"}}, {"quarot": 1}]
)
def test_unknown_candidates_make_no_word(candidates):
    with pytest.raises(UnrepeatableSettingError, match="candidate"):
        list(list_candidate_words(candidates))
