"""Which diffusers class runs a checkpoint: what repositories name, `model.pipeline`, and the modes."""

import diffusers
import pytest
from diffusers.pipelines import auto_pipeline

from int8run.errors import ConfigError
from int8run.models.pipeline_class import (
    check_pipeline_fits,
    choose_pipeline_class,
    find_mode_class,
    is_pipeline,
    list_component_classes,
    list_modes,
    list_needed_components,
)
from int8run.models.pipeline_modes import check_pipeline_settings, load_modes

FLUX_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}


def choose(named="FluxPipeline", pipeline=None, mode=None, controlnet=None):
    return choose_pipeline_class(named, pipeline=pipeline, mode=mode, controlnet=controlnet)


def check_flux(name, index=None, parts=None):
    check_pipeline_fits(
        name, index or FLUX_INDEX, parts or {}, f"model.pipeline={name}", ("transformer", "controlnet")
    )


# what is chosen


def test_repository_names_its_pipeline_unless_the_settings_do():
    assert choose() == "FluxPipeline"
    assert choose(pipeline="FluxImg2ImgPipeline") == "FluxImg2ImgPipeline"


@pytest.mark.parametrize(
    ("named", "mode", "controlnet", "expected"),
    [
        ("FluxPipeline", "img2img", None, "FluxImg2ImgPipeline"),
        ("FluxPipeline", "inpaint", None, "FluxInpaintPipeline"),
        ("FluxPipeline", "control", "FluxControlNetModel", "FluxControlNetPipeline"),
        ("FluxPipeline", "img2img", "FluxControlNetModel", "FluxControlNetImg2ImgPipeline"),
        ("FluxPipeline", "control", None, "FluxControlPipeline"),
        ("FluxImg2ImgPipeline", "text_to_image", None, "FluxPipeline"),
        ("FluxKontextPipeline", "edit", None, "FluxKontextPipeline"),
        ("StableDiffusionPipeline", "inpaint", None, "StableDiffusionInpaintPipeline"),
        ("StableDiffusionXLPipeline", "control", "ControlNetModel", "StableDiffusionXLControlNetPipeline"),
        (
            "StableDiffusionXLPipeline",
            "control",
            "ControlNetUnionModel",
            "StableDiffusionXLControlNetUnionPipeline",
        ),
        ("WanPipeline", "image_to_video", None, "WanImageToVideoPipeline"),
        ("LTX2Pipeline", "conditions", None, "LTX2ConditionPipeline"),
        ("Flux2KleinPipeline", "edit", None, "Flux2KleinPipeline"),
        ("ChromaPipeline", "img2img", None, "ChromaImg2ImgPipeline"),
    ],
)
def test_mode_finds_the_class_for_the_same_checkpoint(named, mode, controlnet, expected):
    assert choose(named, mode=mode, controlnet=controlnet) == expected


@pytest.mark.parametrize(
    ("mode", "auto_class"),
    [
        ("text_to_image", auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING),
        ("img2img", auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("inpaint", auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING),
    ],
)
def test_modes_agree_with_autopipeline(mode, auto_class):
    # diffusers' own search, from each class of its tables
    for named in {cls.__name__ for table in auto_pipeline.SUPPORTED_TASKS_MAPPINGS for cls in table.values()}:
        expected = auto_pipeline._get_task_class(auto_class, named, throw_error_if_not_exist=False)
        if expected is not None:
            assert find_mode_class(named, mode, None) == expected.__name__


def test_every_class_of_the_modes_is_a_pipeline_of_diffusers():
    classes = {name for mode in load_modes().values() for pair in mode.pairs.items() for name in pair}

    assert [name for name in classes if not is_pipeline(name)] == []
    for mode in load_modes().values():
        assert [table for table in mode.tables if not hasattr(auto_pipeline, table)] == []


def test_paired_classes_share_their_denoiser():
    for mode in load_modes().values():
        for named, found in mode.pairs.items():
            ours, others = (list_component_classes(getattr(diffusers, name)) for name in (named, found))
            for component in ("transformer", "unet"):
                assert ours.get(component) == others.get(component), (named, found)


# what is refused


def test_unknown_pipeline_gets_a_suggestion():
    with pytest.raises(
        ConfigError,
        match=r"^model\.pipeline=FluxImg2imgPipeline is not in diffusers \S+; did you mean "
        r"'FluxImg2ImgPipeline'\? null takes the one that the repository names$",
    ):
        choose(pipeline="FluxImg2imgPipeline")
    with pytest.raises(ConfigError, match=r"^model\.pipeline=FluxTransformer2DModel is no pipeline of "):
        choose(pipeline="FluxTransformer2DModel")


def test_mode_that_a_checkpoint_has_not_is_refused_with_those_that_it_has():
    with pytest.raises(
        ConfigError,
        match=r"^model\.mode=image_to_video does not exist for a checkpoint of FluxPipeline; it has "
        r"text_to_image \(FluxPipeline\), img2img \(FluxImg2ImgPipeline\), inpaint \(FluxInpaintPipeline\), "
        r".*; these have it: model=\S+, .*; or name a class of diffusers with model\.pipeline$",
    ):
        choose(mode="image_to_video")
    with pytest.raises(ConfigError, match=r"for a checkpoint of DiTPipeline; it has no mode; "):
        choose("DiTPipeline", mode="img2img")


def test_mode_that_needs_a_controlnet_says_so():
    with pytest.raises(
        ConfigError,
        match=r"^model\.mode=control of a checkpoint of StableDiffusionPipeline is run by "
        r"StableDiffusionControlNetPipeline, which needs a ControlNet: give it with "
        r"'model\.parts\.controlnet=\[CLASS, FOLDER\]'$",
    ):
        choose("StableDiffusionPipeline", mode="control")


def test_mode_is_one_of_the_named_class():
    # the YAML of a model may name a class, and the command line a mode
    assert choose("FluxPipeline", "FluxKontextPipeline", "inpaint") == "FluxKontextInpaintPipeline"
    with pytest.raises(ConfigError, match=r"for a checkpoint of WanVACEPipeline; it has video_to_video"):
        choose("WanPipeline", "WanVACEPipeline", "image_to_video")


def test_settings_name_a_class_or_a_mode():
    check_pipeline_settings(None, None)
    check_pipeline_settings("FluxPipeline", None)
    check_pipeline_settings(None, "edit")
    with pytest.raises(ConfigError, match=r"^model\.mode is 'img2image'; did you mean 'img2img'\?"):
        check_pipeline_settings(None, "img2image")
    with pytest.raises(ConfigError, match=r"^model\.pipeline is 3; it takes the name of a pipeline"):
        check_pipeline_settings(3, None)
    check_pipeline_settings("FluxPipeline", "edit")


# whether the repository has what a pipeline is made of


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"])
def test_pipeline_of_the_same_components_fits(name):
    check_flux(name)


def test_missing_component_is_named():
    with pytest.raises(
        ConfigError,
        match=r"^model\.pipeline=FluxControlNetPipeline is run by FluxControlNetPipeline, which needs "
        r"controlnet, and the repository has none; give it with 'model\.parts\.controlnet=\[CLASS, FOLDER\]'",
    ):
        check_flux("FluxControlNetPipeline")
    check_flux("FluxControlNetPipeline", parts={"controlnet": "FluxControlNetModel"})


def test_denoiser_of_another_class_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^model\.pipeline=Flux2KleinPipeline is run by Flux2KleinPipeline, which takes a "
        r"Flux2Transformer2DModel as transformer, and there is a FluxTransformer2DModel; the repository is "
        r"for FluxPipeline$",
    ):
        check_flux("Flux2KleinPipeline")


def test_controlnet_of_another_class_is_refused():
    with pytest.raises(ConfigError, match=r"takes a FluxControlNetModel or Flux\w+ as controlnet"):
        check_flux("FluxControlNetPipeline", parts={"controlnet": "ControlNetModel"})


def test_controlnet_without_a_pipeline_that_takes_one_is_refused():
    with pytest.raises(ConfigError, match=r"FluxImg2ImgPipeline, which takes no controlnet, and there is a"):
        check_flux("FluxImg2ImgPipeline", parts={"controlnet": "FluxControlNetModel"})


def test_needed_components_are_those_without_a_default():
    cls = diffusers.StableDiffusionXLInpaintPipeline

    # its `_optional_components`, and settings with a default, are not needed
    assert list_needed_components(cls) == ["vae", "unet", "scheduler"]


def test_modes_of_a_checkpoint_are_listed():
    assert list_modes("WanPipeline") == {
        "text_to_video": "WanPipeline",
        "image_to_video": "WanImageToVideoPipeline",
        "video_to_video": "WanVideoToVideoPipeline",
    }
