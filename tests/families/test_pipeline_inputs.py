"""Every input that a pipeline takes reaches its call, in float and in INT8, for two steps."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
)
from families import instances_edit, instances_video
from families.cases import FAMILIES
from families.instance_sets import INSTANCES
from families.instances_edit import make_image, make_mask, reuse
from families.test_families import quantize_model
from torch import nn

from int8run.backends.reference import Reference
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.capture import capture_step
from int8run.generate.generate import generate
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import SampleInputs, read_input_file

# arguments of the instances that are inputs here
MEDIA = (
    "image",
    "mask_image",
    "control_image",
    "last_image",
    "video",
    "mask",
    "reference_images",
    "conditions",
    "driving_video",
)


@dataclass(frozen=True)
class InputCase:
    """A pipeline and the inputs of its sample.

    Args:
        instance: whose family and settings it has.
        columns: given, with the number of files.
        build: makes the pipeline; None: the instance's own.
        strength: of the sample.
    """

    instance: str
    columns: dict[str, int]
    build: Callable[[], DiffusionPipeline] | None = None
    strength: float | None = None


def reuse_instance(name: str, cls: type, **others: Callable[[DiffusionPipeline], Any]) -> Callable[[], Any]:
    """Builds another pipeline of an instance's components, and of those that are made here."""

    def build() -> DiffusionPipeline:
        pipe = INSTANCES[name].build()
        made = reuse(pipe, cls, **{part: make(pipe) for part, make in others.items()})
        made.set_progress_bar_config(disable=True)
        return made

    return build


def make_flux_controlnet(pipe: DiffusionPipeline) -> nn.Module:
    controlnet = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4
    )
    return randomize(controlnet)


def make_unet_controlnet(pipe: DiffusionPipeline) -> nn.Module:
    return randomize(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32)))


def randomize(model: nn.Module) -> nn.Module:
    """A ControlNet begins with zeros, by which nothing that it is given would be seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


ONE = {"image": 1}
INPAINT = {"image": 1, "mask_image": 1}
CONTROL = {"control_image": 1}
CASES = {
    "flux_img2img": InputCase("flux", ONE, reuse_instance("flux", FluxImg2ImgPipeline), 0.6),
    "flux_inpaint": InputCase("flux", INPAINT, reuse_instance("flux", FluxInpaintPipeline), 0.9),
    "flux_controlnet": InputCase(
        "flux", CONTROL, reuse_instance("flux", FluxControlNetPipeline, controlnet=make_flux_controlnet)
    ),
    "sd15_img2img": InputCase("sd15", ONE, reuse_instance("sd15", StableDiffusionImg2ImgPipeline), 0.5),
    "sd15_controlnet": InputCase(
        "sd15",
        CONTROL,
        reuse_instance("sd15", StableDiffusionControlNetPipeline, controlnet=make_unet_controlnet),
    ),
    "sdxl_inpaint": InputCase("sdxl", INPAINT, reuse_instance("sdxl", StableDiffusionXLInpaintPipeline), 0.8),
    "sdxl_controlnet": InputCase(
        "sdxl",
        CONTROL,
        reuse_instance("sdxl", StableDiffusionXLControlNetPipeline, controlnet=make_unet_controlnet),
    ),
    "flux_kontext": InputCase("flux_kontext", ONE),
    "flux_fill": InputCase("flux_fill", INPAINT),
    "flux_control": InputCase("flux_control", CONTROL),
    "flux2_klein": InputCase("flux2_klein_edit", {"image": 1, "reference_images": 1}),
    "fibo_edit": InputCase("fibo_edit", {"image": 1, "reference_images": 1}),
    "fibo_edit_mask": InputCase("fibo_edit", INPAINT),
    "qwen_image_edit_plus": InputCase("qwen_image_edit_plus", {"image": 2}),
    "wan_i2v": InputCase("wan_i2v", ONE),
    "wan_flf2v": InputCase("wan_flf2v", {"image": 1, "last_image": 1}),
    "wan_vace": InputCase("wan_vace", {"video": 1, "mask_image": 1, "reference_images": 1}),
    "ltx2_i2v": InputCase("ltx2_i2v", ONE),
    "ltx2_condition": InputCase("ltx2_condition", {"image": 1, "last_image": 1}),
    "ltx2_condition_video": InputCase("ltx2_condition", {"video": 1}, strength=0.9),
    "ltx25_first_and_last": InputCase("ltx25", {"image": 1, "last_image": 1}),
    "wan_animate_2": InputCase("wan_animate_2", {"image": 1, "video": 1}),
}
NEEDS_PYAV = ("ltx2_condition", "ltx25")  # its images are compressed as the frames of a video are
QUICK = ("flux_img2img", "flux_inpaint", "flux_controlnet", "sd15_img2img", "sdxl_inpaint")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@functools.cache
def build_pipeline(name: str) -> DiffusionPipeline:
    case = CASES[name]
    return case.build() if case.build is not None else INSTANCES[case.instance].build()


def make_inputs(case: InputCase, folder: Any, shade: int = 0) -> SampleInputs:
    """Files for all columns, each of another color."""
    if case.instance in NEEDS_PYAV:
        pytest.importorskip("av")
    files = {}
    for number, (column, count) in enumerate(case.columns.items()):
        paths = []
        for index in range(count):
            path = folder / f"{column}_{index}_{shade}.png"
            image = make_image(64, shade=(shade + 60 * number + 90 * index) % 256)
            if column == "mask_image":
                make_mask(64).save(path)
            elif column == "video":
                image.save(path, save_all=True, append_images=[make_image(64, shade=i) for i in range(4)])
            else:
                image.save(path)
            paths.append(read_input_file(path))
        files[column] = tuple(paths)
    return SampleInputs(files, case.strength)


def get_sampling(name: str):
    """The settings of the instance, without its own images."""
    sampling = INSTANCES[CASES[name].instance].sampling
    extra = {key: value for key, value in sampling.extra.items() if key not in MEDIA}
    steps = 2 if CASES[name].strength is None else 4
    return replace(sampling, steps=steps, extra=extra)


def find_component(pipe: DiffusionPipeline) -> str:
    return next(c for c in ("transformer", "unet") if isinstance(pipe.components.get(c), nn.Module))


def run(name: str, inputs: SampleInputs, *, has_int8: bool = False):
    pipe = build_pipeline(name)
    component = find_component(pipe)
    denoiser = build_denoisers(name)["float"]
    denoisers = build_denoisers(name) if has_int8 else {"float": denoiser}
    sample = Sample(INSTANCES[CASES[name].instance].prompt, 7, "0", inputs=inputs)
    return generate(pipe, component, denoisers, [sample], get_sampling(name))


@functools.cache
def build_denoisers(name: str) -> dict[str, nn.Module]:
    pipe = build_pipeline(name)
    denoiser = getattr(pipe, find_component(pipe)).eval().requires_grad_(False)
    family = FAMILIES[INSTANCES[CASES[name].instance].family]
    return {"float": denoiser, "int8": quantize_model(denoiser, family, Reference())}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_input_reaches_float_and_int8(name, tmp_path):
    made = run(name, make_inputs(CASES[name], tmp_path), has_int8=True)

    for generation in made.values():
        assert len(generation.frames) == 1
        assert all(torch.isfinite(latents).all() for latents in generation.trajectories)
        assert len(generation.step_seconds[0]) >= 2
    float_latents, int8_latents = (made[kind].trajectories[0] for kind in ("float", "int8"))
    assert not torch.equal(float_latents, int8_latents)
    error = (float_latents - int8_latents).norm() / float_latents.norm()
    assert error < 0.5


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_other_inputs_make_another_image(name, tmp_path):
    case = CASES[name]
    first = run(name, make_inputs(case, tmp_path))["float"]
    again = run(name, make_inputs(case, tmp_path))["float"]
    other = run(name, make_inputs(case, tmp_path, shade=128))["float"]

    assert torch.equal(first.trajectories[0], again.trajectories[0])
    assert not torch.equal(first.trajectories[0], other.trajectories[0])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_that_the_pipeline_takes(name):
    call = read_call_inputs(type(build_pipeline(name)))

    assert set(CASES[name].columns) <= set(call.takes)
    assert set(call.needs) <= set(CASES[name].columns)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_captured_step_is_one_of_two(name, tmp_path):
    pipe = build_pipeline(name)
    inputs = replace(make_inputs(CASES[name], tmp_path), strength=0.1 if CASES[name].strength else None)
    sample = Sample(INSTANCES[CASES[name].instance].prompt, 7, "0", inputs=inputs)

    calls = capture_step(
        pipe, find_component(pipe), build_denoisers(name)["float"], [sample], get_sampling(name)
    )

    assert len(calls) == 1


def test_instances_of_all_cases_exist():
    named = {*instances_edit.INSTANCES, *instances_video.INSTANCES, *INSTANCES}

    assert {case.instance for case in CASES.values()} <= named
