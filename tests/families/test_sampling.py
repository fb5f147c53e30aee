"""Every family's pipeline as `generate` calls it: steps, latents, frames, texts, arguments."""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from families import instances, instances_b
from families.instance_sets import DAILY
from support.tiers import slow_except
from torch import Tensor, nn

from int8run.generate.capture import capture_calls
from int8run.generate.generate import GenerationHooks, generate
from int8run.generate.prompts import Sample
from int8run.generate.step_observer import observe_steps
from int8run.metrics.quality import compute_relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
INSTANCES = {**instances.INSTANCES, **instances_b.INSTANCES}
NAMES = slow_except(DAILY, INSTANCES)
BATCH = [Sample("a b", 1, "a"), Sample("b", 2, "b")]
FRAMES = {"wan": 5, "wan22": 5, "ltx": 9, "ltx2": 9}
# what differs from one pipeline of diffusers to the next
BY_POSITION = {"sd15", "sdxl", "z_image", "pixart", "sana"}  # first arguments of the denoiser
UNCOUNTED = {"ernie_image", "pixart"}  # no `num_timesteps`
OLD_CALLBACK = {"pixart"}  # no `callback_on_step_end`


@functools.cache
def build_pipeline(name):
    """The pipeline, the name of its denoiser, the denoiser, and settings for a batch of two."""
    pipe = INSTANCES[name].build()
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
    component = "transformer" if "transformer" in pipe.components else "unet"
    return pipe, component, getattr(pipe, component), replace(INSTANCES[name].sampling, batch=2)


def generate_images(name, samples=BATCH, **changes):
    pipe, component, denoiser, sampling = build_pipeline(name)
    return generate(pipe, component, {"": denoiser}, samples, replace(sampling, **changes))[""]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_give_two_samples(name):
    pipe, component, denoiser, sampling = build_pipeline(name)
    heard = []

    made = generate(
        pipe,
        component,
        {"a": denoiser, "b": denoiser},
        BATCH,
        sampling,
        hooks=GenerationHooks(on_fraction=heard.append),
    )

    assert heard == [0.0, 0.5, 1.0] * 2
    for one in made.values():
        assert [len(frames) for frames in one.frames] == [FRAMES.get(name, 1)] * 2
        assert len(one.step_seconds[0]) == 2
        assert {frame.size for frames in one.frames for frame in frames} == {
            (sampling.width, sampling.height)
        }
        assert one.has_sound == (name == "ltx2")
        for steps in one.trajectories:
            assert steps.dtype == torch.float32
            assert len(steps) == 2
            assert steps.isfinite().all()
            assert not torch.equal(*steps)
    # the second denoiser is given texts that are remembered, and draws the same
    assert all(map(torch.equal, made["a"].trajectories, made["b"].trajectories))


@pytest.mark.parametrize("name", NAMES)
def test_sample_does_not_depend_on_its_batch(name):
    # Qwen-Image 2.1 pads the texts of a batch, and rounds otherwise
    bound = 2e-3 if name == "qwen_image_21" else 1e-5
    both, alone = generate_images(name), generate_images(name, BATCH[1:], batch=1)

    assert compute_relative_error(alone.trajectories[0][-1], both.trajectories[1][-1]) < bound
    assert compute_relative_error(both.trajectories[0][-1], both.trajectories[1][-1]) > 0.1, (
        "samples with seeds of their own"
    )


@pytest.mark.parametrize("name", NAMES)
def test_latents_alone_are_the_same_and_no_image_is_decoded(name):
    alone = generate_images(name, extra={**build_pipeline(name)[3].extra, "output_type": "latent"})

    assert alone.frames == []
    assert all(map(torch.equal, alone.trajectories, generate_images(name).trajectories))


@pytest.mark.parametrize("name", NAMES)
def test_one_negative_prompt_serves_the_batch(name):
    pipe, _, _, sampling = build_pipeline(name)
    if "negative_prompt" not in inspect.signature(type(pipe).__call__).parameters:
        pytest.skip("it has none")
    generate_images(name, extra={**sampling.extra, "negative_prompt": "b b"})


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_arguments_are_named_and_reusable(name):
    pipe, component, denoiser, sampling = build_pipeline(name)
    by_position = []
    hook = denoiser.register_forward_pre_hook(lambda _, args: by_position.append(len(args) > 0))
    calls = capture_calls(pipe, component, denoiser, BATCH, sampling)
    hook.remove()

    assert all(by_position) == any(by_position) == (name in BY_POSITION)
    assert len(calls) >= 1

    known = inspect.signature(denoiser.forward).parameters

    assert all(set(made) <= set(known) for made in calls)

    with torch.no_grad():
        returned = denoiser(**calls[-1])[0]
    tensors = returned if isinstance(returned, list) else [returned]  # Z-Image returns a list

    assert all(isinstance(t, Tensor) and t.isfinite().all() for t in tensors)
    assert isinstance(returned, list) == (name == "z_image")


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_reports_its_steps(name):
    pipe = build_pipeline(name)[0]

    with observe_steps(pipe, print) as callback:
        assert list(callback) == ["callback" if name in OLD_CALLBACK else "callback_on_step_end"]
    assert hasattr(type(pipe), "num_timesteps") == (name not in UNCOUNTED)


def test_sana_sprint_takes_more_steps_without_its_own_timestep():
    pipe, _, _, sampling = build_pipeline("sana")
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    transformer = SanaTransformer2DModel(**{**config, "guidance_embeds": True}).eval()
    parts = {name: part for name, part in pipe.components.items() if name not in ("transformer", "scheduler")}
    sprint = SanaSprintPipeline(**parts, transformer=transformer, scheduler=SCMScheduler())
    sprint.set_progress_bar_config(disable=True)
    more = replace(sampling, steps=3, extra={**sampling.extra, "intermediate_timesteps": None})

    made = generate(sprint, "transformer", {"a": transformer, "b": transformer}, BATCH, more)

    assert [len(steps) for steps in made["a"].trajectories] == [3, 3], "a value of null reaches the pipeline"
    assert all(map(torch.equal, made["a"].trajectories, made["b"].trajectories)), (
        "its scheduler's noise is the same for both"
    )
