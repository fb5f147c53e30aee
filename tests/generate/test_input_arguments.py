"""The arguments of a call for the inputs of a sample, as different pipelines of diffusers take them."""

import diffusers
import pytest
import torch
from PIL import Image

from int8run.generate.input_arguments import build_input_arguments, make_frame_tensor
from int8run.generate.pipeline_call import build_arguments
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs, read_input_file
from int8run.generate.step_count import count_asked_steps, count_taken_steps, get_strength
from int8run.models.sampling import Sampling

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def make_file(tmp_path):
    """An image of one color, or a video of several."""

    def make(*colors):
        frames = [Image.new("RGB", (16, 8), color) for color in colors]
        path = tmp_path / f"{'_'.join(colors)}.png"
        frames[0].save(path, save_all=len(frames) > 1, append_images=frames[1:])
        return read_input_file(path)

    return make


def make_pipe(name):
    """A pipeline of this class without components: its call is not made."""
    cls = getattr(diffusers, name)
    return cls.__new__(cls)


def build(name, files=None, strength=None, settings=None, **arguments):
    inputs = SampleInputs(files or {}, strength, arguments)
    return build_input_arguments(make_pipe(name), inputs, settings or {})


def get_color(image):
    return image.getpixel((0, 0))


def test_prompt_alone_adds_nothing():
    assert build_input_arguments(make_pipe("FluxImg2ImgPipeline"), NO_INPUTS, {}) == {}


def test_image_mask_and_strength_are_given_as_they_are(make_file):
    files = {"image": (make_file("red"),), "mask_image": (make_file("white"),)}

    arguments = build("FluxInpaintPipeline", files, 0.5, padding_mask_crop=8)

    assert list(arguments) == ["image", "mask_image", "strength", "padding_mask_crop"] or set(arguments) == {
        "image",
        "mask_image",
        "strength",
        "padding_mask_crop",
    }
    assert get_color(arguments["image"]) == COLORS["red"]
    assert (arguments["mask_image"].mode, get_color(arguments["mask_image"])) == ("L", 255)
    assert (arguments["strength"], arguments["padding_mask_crop"]) == (0.5, 8)


def test_image_and_references_are_one_list_where_a_pipeline_takes_several(make_file):
    files = {"reference_images": (make_file("blue"),), "image": (make_file("red"),)}

    (images,) = build("QwenImageEditPlusPipeline", files).values()

    assert [get_color(image) for image in images] == [COLORS["red"], COLORS["blue"]]


def test_images_of_one_prompt_are_nested_where_a_call_has_several_prompts(make_file):
    ((images,),) = build("OmniGenPipeline", {"image": (make_file("red"),)}).values()

    assert [get_color(image) for image in images] == [COLORS["red"]]


def test_control_image_of_a_controlnet_is_its_image(make_file):
    arguments = build("StableDiffusionControlNetPipeline", {"control_image": (make_file("red"),)})

    assert get_color(arguments["image"]) == COLORS["red"]


def test_mask_of_a_video_is_repeated_for_each_frame(make_file):
    files = {
        "mask_image": (make_file("white"),),
        "video": (make_file("red", "blue"),),
        "reference_images": (make_file("red"),),
    }

    arguments = build("WanVACEPipeline", files, settings={"num_frames": 9})

    assert [get_color(frame) for frame in arguments["video"]] == [COLORS["red"], COLORS["blue"]]
    assert len(arguments["mask"]) == 2
    assert len(arguments["reference_images"]) == 1


def test_conditions_of_ltx2_are_at_the_first_and_the_last_frame_of_the_latents(make_file):
    files = {"image": (make_file("red"),), "last_image": (make_file("blue"),)}

    (conditions,) = build("LTX2ConditionPipeline", files, 0.7).values()

    assert [(get_color(c.frames), c.index, c.strength) for c in conditions] == [
        (COLORS["red"], 0, 0.7),
        (COLORS["blue"], -1, 0.7),
    ]


@pytest.mark.parametrize(("settings", "last"), [({"num_frames": 17}, 16), ({}, 160)])
def test_conditions_of_ltx_are_at_frames_of_the_video(make_file, settings, last):
    files = {"video": (make_file("red", "blue"),), "last_image": (make_file("blue"),)}

    (conditions,) = build("LTXConditionPipeline", files, settings=settings).values()

    image, video = conditions
    assert (len(video.video), video.image, video.frame_index, video.strength) == (2, None, 0, 1.0)
    assert (get_color(image.image), image.video, image.frame_index) == (COLORS["blue"], None, last)


def test_reference_video_becomes_an_object(make_file):
    (references,) = build("LTX2InContextPipeline", {"reference_video": (make_file("red", "blue"),)}).values()

    assert [len(reference.frames) for reference in references] == [2]


def test_frames_as_a_tensor_are_between_0_and_1():
    frames = [Image.new("RGB", (4, 2), color) for color in COLORS.values()]

    tensor = make_frame_tensor(frames)

    assert tensor.shape == (1, 3, 2, 2, 4)
    assert torch.equal(tensor[0, :, :, 0, 0].T, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))


def test_call_has_the_settings_that_its_pipeline_takes_alone():
    sampling = Sampling(steps=3, guidance=2.0, height=64, width=32, extra={"num_frames": 9, "fps": 7})

    arguments = build_arguments(
        make_pipe("StableDiffusionXLImg2ImgPipeline"), [Sample("a", 0, "0")], sampling
    )

    assert arguments == {
        "prompt": ["a"],
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "output_type": "pil",
    }


# -- steps -------------------------------------------------------------------------------------------


def make_samples(*strengths):
    return [Sample("a", 0, "0", inputs=SampleInputs(strength=strength)) for strength in strengths]


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.6), (4, 0.1), (2, 0.29), (29, 0.29), (2, 1.0)])
def test_enough_steps_are_asked_for_that_some_are_taken(steps, strength):
    pipe, samples = make_pipe("FluxImg2ImgPipeline"), make_samples(strength)

    asked = count_asked_steps(pipe, samples, Sampling(), steps)

    assert count_taken_steps(asked, strength) == steps or count_taken_steps(asked - 1, strength) < steps
    assert count_taken_steps(asked, strength) >= steps
    # as diffusers' own pipelines count: FLUX rounds what it leaves out, Stable Diffusion what it takes
    assert asked - int(asked - asked * strength) >= steps


def test_strength_is_the_samples_then_the_samplings_then_the_pipelines():
    from int8run.generate.call_inputs import read_call_inputs

    call = read_call_inputs(diffusers.FluxImg2ImgPipeline)

    assert get_strength(call, make_samples(0.9, 0.3), Sampling()) == 0.3
    assert get_strength(call, make_samples(None), Sampling(extra={"strength": 0.5})) == 0.5
    assert get_strength(call, make_samples(None), Sampling()) == 0.6
    assert get_strength(read_call_inputs(diffusers.FluxPipeline), make_samples(None), Sampling()) == 1


def test_pipeline_without_a_strength_takes_the_steps_that_it_is_told():
    assert count_asked_steps(make_pipe("FluxPipeline"), make_samples(None), Sampling(), 2) == 2
