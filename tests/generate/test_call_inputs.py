"""What the calls of pipelines take and need, for every image and video pipeline of diffusers."""

import inspect
from pathlib import Path

import diffusers
import pytest
import yaml
from diffusers import DiffusionPipeline

from int8run.generate.call_inputs import (
    CallInputs,
    find_call_inputs,
    load_facts,
    read_call_inputs,
)
from int8run.models.modular_pipeline import get_call_class
from int8run.models.pipeline_class import is_pipeline

REVIEWED = yaml.safe_load((Path(__file__).parent / "pipeline_inputs.yaml").read_text(encoding="utf-8"))
SETTINGS = ("prompt", "num_inference_steps", "guidance_scale", "height", "width", "callback_on_step_end")


def list_pipelines():
    """Every pipeline of diffusers that is not deprecated, by name."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        is_pipeline = isinstance(cls, type) and issubclass(cls, DiffusionPipeline)
        if is_pipeline and cls is not DiffusionPipeline and ".deprecated." not in cls.__module__:
            found[name] = cls
    return found


PIPELINES = list_pipelines()


def write_line(call: CallInputs) -> str:
    """What a call takes, as `pipeline_inputs.yaml` has it."""
    words = []
    for column in call.takes:
        word = column
        word += "!" if column in call.needs else ""
        word += "|" if column in call.needs_one else ""
        word += "*" if column in call.several else ""
        word += f"={call.arguments[column]}" if call.arguments[column] != column else ""
        words.append(word)
    words += ["strength"] if call.takes_strength else []
    missing = [f"-{name}" for name in SETTINGS if name not in call.parameters]
    return " ".join([*words, *missing, *(f"+{name}" for name in call.needed_arguments)])


def make_call(call, name="SomePipeline", components=()):
    return find_call_inputs(name, inspect.signature(call).parameters, components)


def test_every_pipeline_takes_what_was_reviewed():
    found = {}
    for name, cls in PIPELINES.items():
        call = read_call_inputs(cls)
        if call.takes:
            found[name] = write_line(call)

    assert len(PIPELINES) > 200
    assert found == REVIEWED


@pytest.mark.parametrize("name", REVIEWED)
def test_arguments_are_described_by_the_pipeline(name):
    # independent of the signature: the documentation of the call
    documented = inspect.getdoc(PIPELINES[name].__call__) or ""
    call = read_call_inputs(PIPELINES[name])

    assert all(argument in documented for argument in call.arguments.values()) or not documented


def test_classes_of_the_facts_are_those_of_diffusers():
    facts = load_facts()
    named = {*facts.several_images, *facts.nested_images, *facts.frame_tensors}
    named |= {*facts.needs, *facts.optional, *facts.needs_one}

    assert [name for name in named if not is_pipeline(name)] == []
    for name in named:
        takes = read_call_inputs(get_call_class(getattr(diffusers, name))).takes
        columns = {*facts.needs.get(name, ()), *facts.optional.get(name, ()), *facts.needs_one.get(name, ())}
        assert columns <= set(takes), name


def test_text_to_image_takes_no_image():
    for name in ("FluxPipeline", "StableDiffusionXLPipeline", "WanPipeline", "QwenImagePipeline"):
        call = read_call_inputs(PIPELINES[name])
        assert call.takes == ()
        assert call.describe() == "no image and no video"


def test_argument_is_needed_where_it_has_no_default_or_none_that_its_type_allows():
    def call(self, image, last_image: str | None = None, video: list[str] = None, control_image=None):  # noqa: RUF013
        pass

    assert make_call(call).needs == ("image", "video")


def test_image_of_a_controlnet_is_a_control_image():
    def text_to_image(self, prompt, image=None):
        pass

    def image_to_image(self, prompt, image=None, control_image=None):
        pass

    assert make_call(text_to_image, components=("controlnet",)).arguments == {"control_image": "image"}
    assert make_call(text_to_image).arguments == {"image": "image"}
    assert make_call(image_to_image, components=("controlnet",)).arguments == {
        "image": "image",
        "control_image": "control_image",
    }


def test_further_files_are_columns_of_their_own_names_and_switches_are_none():
    def call(self, image, pose_video, render_images=True, ip_adapter_image=None):
        pass

    assert make_call(call).takes == ("image", "pose_video")


def test_mask_of_sound_is_no_image():
    def call(self, prompt, audio=None, mask=None):
        pass

    assert make_call(call).takes == ()


def test_conditions_of_ltx_are_columns_and_have_a_strength():
    call = read_call_inputs(diffusers.LTX2ConditionPipeline)

    assert call.condition.__name__ == "LTX2VideoCondition"
    assert call.takes == ("image", "last_image", "video")
    assert call.takes_strength
    # the strength of a condition leaves out no steps
    assert not call.strength_skips_steps
    assert call.default_strength is None


def test_what_a_call_takes_is_described():
    assert read_call_inputs(diffusers.FluxInpaintPipeline).describe() == (
        "image (needed), mask_image (needed), strength"
    )
    assert read_call_inputs(diffusers.CosmosVideoToWorldPipeline).describe() == (
        "image (needed, or video), video (needed, or image)"
    )


def test_default_strength_is_that_of_the_signature():
    assert read_call_inputs(diffusers.FluxImg2ImgPipeline).default_strength == 0.6
    assert read_call_inputs(diffusers.FluxPipeline).default_strength is None
