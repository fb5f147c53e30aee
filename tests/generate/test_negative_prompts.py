"""Negative prompts of samples: where they go, and what is said where they cannot work."""

import inspect
import re

import diffusers
import pytest
import torch
from support.tiny_pipeline import random_pipeline

from int8run.config.compose import compose_jobs, create_run_spec
from int8run.errors import ConfigError
from int8run.generate.image_parameters import format_parameters
from int8run.generate.input_files import read_samples
from int8run.generate.negative_prompts import (
    Guidance,
    explain_unused_negative_prompt,
    find_negative_prompts,
    read_guidance,
)
from int8run.generate.pipeline_call import call_pipeline
from int8run.generate.prompts import PromptSet, Sample, build_samples
from int8run.models.sampling import Sampling


class Guided:
    def __call__(self, prompt, negative_prompt=None, guidance_scale=5.0): ...


class Distilled:
    """Like FLUX: its guidance is an input of the model, and a negative prompt needs a second one."""

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=1.0, guidance_scale=3.5): ...


class WithoutNegative:
    def __call__(self, prompt, guidance_scale=4.0): ...


def make_samples(*negative_prompts):
    return [Sample("a", 0, "a", text) for text in negative_prompts]


def test_every_sample_has_the_negative_prompt_of_its_set(tmp_path):
    prompts = PromptSet(["a", "b"], seeds_per_prompt=2, negative_prompt="blurry")
    samples = read_samples(prompts, seed=0, folder=tmp_path)
    assert [sample.negative_prompt for sample in samples] == ["blurry"] * 4
    assert build_samples(["a"], 1, 0)[0].negative_prompt is None


@pytest.mark.parametrize("value", [1984, True, ["blurry"]])
def test_a_negative_prompt_that_is_no_text_is_refused(value):
    with pytest.raises(ConfigError, match=r"prompts\.negative_prompt is .*, which is no text; quote it"):
        PromptSet(prompts=["a"], negative_prompt=value)


def test_samples_of_one_batch_may_differ():
    sampling = Sampling(extra={"negative_prompt": "ugly"})
    mixed = make_samples("blurry", None, "")
    assert find_negative_prompts(Guided(), mixed, sampling) == [
        "blurry",
        "ugly",
        "",
    ]
    assert find_negative_prompts(Guided(), make_samples("blurry", None), Sampling()) == ["blurry", ""]
    # the sampling's own is passed as it is
    assert find_negative_prompts(Guided(), make_samples(None, None), sampling) is None


def test_a_pipeline_without_one_refuses_it():
    message = r"^WithoutNegative takes no negative prompt; leave prompts\.negative_prompt out"
    with pytest.raises(ConfigError, match=message):
        find_negative_prompts(WithoutNegative(), make_samples("blurry"), Sampling())
    assert find_negative_prompts(WithoutNegative(), make_samples(None), Sampling()) is None


class Model:
    """A denoiser or a pipeline, as far as its config tells of its guidance."""

    def __init__(self, **config):
        self.config = config


class Embedding(WithoutNegative):
    """Like FLUX.2: the guidance is an input of the model, and there is no other one."""

    transformer = Model(guidance_embeds=True)


class LatentConsistency(Guided):
    """A latent consistency model in Stable Diffusion's pipeline."""

    unet = Model(time_cond_proj_dim=256)


class NotEmbedding(Guided):
    """A model whose config says that it takes no guidance."""

    transformer = Model(guidance_embeds=False)
    unet = Model(time_cond_proj_dim=None)


class Klein(Model, WithoutNegative):
    """FLUX.2 klein, whose distilled version ignores the guidance."""


class Krea(Model, Guided):
    """Krea 2, whose distilled version has a guidance all the same."""


@pytest.mark.parametrize(
    ("pipe", "guidance"),
    [
        (Embedding(), Guidance(None, 1.0, distilled_scale=2.5)),
        (LatentConsistency(), Guidance(None, 1.0, distilled_scale=2.5)),
        (NotEmbedding(), Guidance("sampler.guidance", 2.5)),
        (WithoutNegative(), Guidance("sampler.guidance", 2.5)),
        (Distilled(), Guidance("sampler.extra.true_cfg_scale", 1.0, distilled_scale=2.5)),
        (Klein(is_distilled=True), Guidance(None, 1.0)),
        (Klein(is_distilled=False), Guidance("sampler.guidance", 2.5)),
        (Krea(is_distilled=True), Guidance("sampler.guidance", 2.5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_guidance_is_what_the_model_makes_of_the_number(pipe, guidance):
    assert read_guidance(pipe, Sampling(guidance=2.5)) == guidance


@pytest.mark.parametrize(
    ("pipeline_class", "transformer_class", "is_embedded"),
    [
        (diffusers.Flux2Pipeline, diffusers.Flux2Transformer2DModel, True),
        (diffusers.Flux2KleinPipeline, diffusers.Flux2Transformer2DModel, False),
        (diffusers.SanaSprintPipeline, diffusers.SanaTransformer2DModel, True),
        (diffusers.SanaPipeline, diffusers.SanaTransformer2DModel, False),
    ],
)
def test_real_pipelines_say_by_their_denoiser_whether_the_guidance_is_distilled(
    pipeline_class, transformer_class, is_embedded
):
    """The pipelines' signatures are the same with both: only the denoiser's config differs."""
    pipe = pipeline_class.__new__(pipeline_class)
    config = inspect.signature(transformer_class).parameters
    assert "guidance_embeds" in config, "the name by which diffusers says it"
    object.__setattr__(pipe, "transformer", Model(guidance_embeds=is_embedded))

    guidance = read_guidance(pipe, Sampling(guidance=4.0))

    if is_embedded:
        assert guidance == Guidance(None, 1.0, distilled_scale=4.0)
    else:
        assert guidance == Guidance("sampler.guidance", 4.0)


def test_the_parameters_name_a_distilled_guidance_as_such():
    sampling = Sampling(steps=4, guidance=4.0, height=64, width=64)
    sample = Sample("a", 0, "a", "blurry")

    text = format_parameters(
        sample,
        sampling,
        scheduler="FlowMatchEulerDiscreteScheduler",
        model="FLUX.2-dev",
        details={},
        guidance=read_guidance(Embedding(), sampling),
    )

    assert text == (
        "a\nNegative prompt: \n"
        "Steps: 4, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 4, Seed: 0, Size: 64x64, "
        "Model: FLUX.2-dev"
    )


UNUSED = {
    "guidance off": (
        Guided(),
        Sampling(guidance=0.0),
        r"with sampler\.guidance above 1, and it is 0$",
    ),
    "distilled": (
        Distilled(),
        Sampling(guidance=7.0),
        r"with sampler\.extra\.true_cfg_scale above 1",
    ),
    "embedded": (LatentConsistency(), Sampling(guidance=8.0), r"with this model has a distilled guidance"),
    "distilled, off": (Distilled(), Sampling(extra={"true_cfg_scale": 1.0}), r"and it is 1$"),
}
USED = {
    "the pipeline's own guidance": (Guided(), Sampling()),
    "guidance": (Guided(), Sampling(guidance=1.5)),
    "distilled": (Distilled(), Sampling(extra={"true_cfg_scale": 4.0})),
}


@pytest.mark.parametrize(("pipe", "sampling", "message"), UNUSED.values(), ids=UNUSED)
def test_a_negative_prompt_without_effect_is_said(pipe, sampling, message):
    line = explain_unused_negative_prompt(pipe, [None, "blurry"], sampling)
    assert line is not None and line.startswith("the negative prompt has no effect: ")
    assert re.search(message, line)
    assert explain_unused_negative_prompt(pipe, [None, ""], sampling) is None


@pytest.mark.parametrize(("pipe", "sampling"), USED.values(), ids=USED)
def test_nothing_is_said_where_it_works(pipe, sampling):
    assert explain_unused_negative_prompt(pipe, ["blurry"], sampling) is None


def test_a_real_pipeline_generates_with_it():
    """The image is that of the same text as an argument of the call, and another one than without."""
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def generate_latents(sample_text, extra_text=None):
        extra = {"true_cfg_scale": 4.0, "max_sequence_length": 16, "output_type": "latent"}
        if extra_text is not None:
            extra["negative_prompt"] = extra_text
        sampling = Sampling(steps=2, height=32, width=32, extra=extra)
        output = call_pipeline(pipe, make_samples(sample_text), sampling, lambda *arguments: {})
        return output.images

    with torch.no_grad():
        of_the_sample = generate_latents("blurry")
        of_the_call = generate_latents(None, "blurry")
        without = generate_latents(None)
    assert torch.equal(of_the_sample, of_the_call)
    assert not torch.equal(of_the_sample, without)


def test_a_command_has_it_in_one_place():
    words = ["device=cpu", "prompts.negative_prompt=blurry"]
    (config,) = compose_jobs(words)[1]
    assert create_run_spec(config).prompts.negative_prompt == "blurry"
    (config,) = compose_jobs([*words, "sampler.extra.negative_prompt=ugly"])[1]
    with pytest.raises(ConfigError, match=r"are the same thing; give prompts\.negative_prompt alone"):
        create_run_spec(config)


def test_the_image_file_has_it():
    (sample,) = make_samples("blurry")
    sampling = Sampling(steps=1, extra={"negative_prompt": "ugly"})
    text = format_parameters(sample, sampling, scheduler="x", model="m", details={})
    assert "\nNegative prompt: blurry\n" in text
