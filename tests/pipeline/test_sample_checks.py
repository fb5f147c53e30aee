"""Samples that the model's pipeline does not take are refused before anything is loaded."""

import logging
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from int8run.errors import ConfigError, FileError
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import InputFile, SampleInputs
from int8run.models.family import ModelSource
from int8run.models.sampling import Sampling
from int8run.pipeline.sample_checks import (
    check_columns,
    check_needed_arguments,
    check_samples,
    check_settings,
)

TINY = ModelSource("shipped:tiny", "tiny", Sampling(steps=16, height=64, width=64))


def make_sample(*columns, strength=None, count=1, **arguments):
    files = {
        column: (InputFile("x.png", Path("x.png"), "0", place=f"prompts.{column}"),) * count
        for column in columns
    }
    return Sample("a", 0, "0", inputs=SampleInputs(files, strength, arguments))


def check(sample, mode=None, pipeline=None, asked=None):
    model = replace(TINY, mode=mode, pipeline=pipeline)
    asked = asked or Sampling()
    check_samples(model, [sample], asked, asked.with_defaults(model.sampling))


def check_call(name, *columns, count=1):
    check_columns(read_call_inputs(getattr(diffusers, name)), make_sample(*columns, count=count).inputs, TINY)


def test_what_a_pipeline_takes_passes():
    check(make_sample())
    check(make_sample("image", strength=0.5), mode="img2img")
    check(make_sample("image", "mask_image", padding_mask_crop=8), mode="inpaint")
    check_call("QwenImageEditPlusPipeline", "image", count=3)
    check_call("QwenImageEditPlusPipeline", "reference_images", count=2)


def test_input_too_much_is_refused_with_what_would_do():
    with pytest.raises(
        ConfigError,
        match=r"^prompts\.image=x\.png: FluxPipeline takes no image and no video; "
        r"for image: model\.mode=img2img or model=tiny_edit or ",
    ):
        check(make_sample("image"))
    with pytest.raises(
        ConfigError, match=r"takes no mask_image; .* for image, mask_image: model\.mode=inpaint"
    ):
        check(make_sample("image", "mask_image"), mode="img2img")


def test_missing_input_is_named_with_its_setting():
    with pytest.raises(
        ConfigError,
        match=r"^FluxInpaintPipeline needs mask_image: prompts\.mask_image=FILE; it takes image \(needed\), "
        r"mask_image \(needed\), strength; for image: model\.mode=img2img",
    ):
        check(make_sample("image"), mode="inpaint")
    with pytest.raises(
        ConfigError, match=r"^FluxImg2ImgPipeline needs image: .* for text alone: model\.mode=text"
    ):
        check(make_sample(), mode="img2img")
    with pytest.raises(
        ConfigError, match=r"^CosmosVideoToWorldPipeline needs image or video: prompts\.image=FILE; "
    ):
        check_call("CosmosVideoToWorldPipeline")


def test_several_files_where_one_is_taken_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"^prompts\.image=x\.png: FluxImg2ImgPipeline takes one image, and there are 2; give one, or "
        "make each a row of a table$",
    ):
        check(make_sample("image", count=2), mode="img2img")


def test_strength_that_is_not_taken_or_leaves_no_step_is_refused():
    with pytest.raises(
        ConfigError, match=r"^FluxPipeline takes no strength; leave prompts\.strength out: it takes"
    ):
        check(make_sample(strength=0.5))
    with pytest.raises(
        ConfigError,
        match=r"^a strength of 0\.05 leaves none of sampler\.steps=16; set prompts\.strength to 0\.063 or ",
    ):
        check(make_sample("image", strength=0.05), mode="img2img")
    check(make_sample("image", strength=0.063), mode="img2img")


def test_argument_of_a_row_must_be_one_of_the_call():
    with pytest.raises(
        ConfigError, match=r"^padding_mask_crops is not an argument of FluxInpaintPipeline; did you"
    ):
        check(make_sample("image", "mask_image", padding_mask_crops=8), mode="inpaint")


def test_misspelled_column_is_named_before_the_input_that_is_missing():
    inputs = SampleInputs(arguments={"imge": "cat.png"}, place="a.csv, row 3 (line 4)")

    with pytest.raises(
        ConfigError,
        match=r"^a\.csv, row 3 \(line 4\): imge is not an argument of FluxImg2ImgPipeline; did you mean 'im",
    ):
        check(Sample("a", 0, "0", inputs=inputs), mode="img2img")


def test_argument_that_no_input_is_for_can_be_given_as_a_setting():
    call = read_call_inputs(diffusers.DiTPipeline)

    with pytest.raises(
        ConfigError, match=r"^DiTPipeline cannot be called without class_labels, which no input is"
    ):
        check_needed_arguments(call, SampleInputs(), Sampling())
    check_needed_arguments(call, SampleInputs(), Sampling(extra={"class_labels": [1]}))


def test_setting_of_the_user_that_a_pipeline_does_not_take_is_refused():
    call = read_call_inputs(diffusers.StableDiffusionXLImg2ImgPipeline)

    with pytest.raises(
        ConfigError,
        match=r"^StableDiffusionXLImg2ImgPipeline takes no height; its images have the size of their input: "
        r"leave sampler\.height out$",
    ):
        check_settings(call, Sampling(height=64))
    with pytest.raises(ConfigError, match=r"takes no guidance_scale; leave sampler\.guidance out$"):
        check_settings(read_call_inputs(diffusers.QwenImage21Pipeline), Sampling(guidance=2.0))


def test_argument_of_the_user_that_a_pipeline_does_not_have_is_refused():
    asked = Sampling(extra={"true_cfg": 4})

    with pytest.raises(
        ConfigError,
        match=r"^sampler\.extra\.true_cfg is not an argument of FluxPipeline; did you mean 'true_cfg_",
    ):
        check_samples(TINY, [make_sample()], asked, asked)


def test_setting_of_the_checkpoint_that_a_pipeline_does_not_take_is_said(caplog):
    model = replace(TINY, sampling=Sampling(steps=2, extra={"num_frames": 9}))

    with caplog.at_level(logging.INFO):
        check_samples(model, [make_sample()], Sampling(), model.sampling)

    assert caplog.messages == [
        "FluxPipeline takes no sampler.extra.num_frames=9, which the checkpoint's settings have for its own "
        "pipeline"
    ]


def test_model_that_is_not_there_is_refused_first(tmp_path):
    with pytest.raises(FileError):
        check_samples(replace(TINY, location=str(tmp_path)), [make_sample()], Sampling(), Sampling())


def test_modular_pipeline_takes_what_its_blocks_take(tmp_path):
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "WanAnimate2ModularPipeline"}')
    model = replace(TINY, location=str(tmp_path))

    with pytest.raises(ConfigError, match=r"^WanAnimate2ModularPipeline needs video: prompts\.video"):
        check_samples(model, [make_sample("image")], Sampling(steps=4), Sampling(steps=4))
    # arguments without a default are what its blocks make themselves
    check_samples(model, [make_sample("image", "video")], Sampling(steps=4), Sampling(steps=4))
