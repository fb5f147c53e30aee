"""Steps that are seen at the scheduler are those that a callback reports: their latents, their number."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, SchedulerMixin
from families.instances_b import INSTANCES
from support.tiny_pipeline import random_pipeline

from int8run.generate.generate import generate
from int8run.generate.prompts import Sample
from int8run.generate.step_observer import count_steps, observe_steps, watch_scheduler
from int8run.models.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = [Sample("a b", 1, "a"), Sample("b", 2, "b")]


class Seen:
    """What was reported: steps, timesteps, latents, and the fractions that were done."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.timesteps: list[float] = []
        self.latents: list[torch.Tensor] = []
        self.fractions: list[float] = []

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        self.steps.append(step)
        self.timesteps.append(float(timestep))
        self.latents.append(tensors["latents"].clone())
        self.fractions.append((step + 1) / count_steps(pipe))
        return {}


def call_twice(pipe: Any, arguments: dict[str, Any]) -> tuple[Seen, Seen]:
    """What the callback reports of a call, and what the scheduler shows of another."""
    pipe.set_progress_bar_config(disable=True)
    reported, watched = Seen(), Seen()

    def seed():
        return torch.Generator().manual_seed(3)

    pipe(**arguments, generator=seed(), callback_on_step_end=reported.on_step_end, output_type="latent")
    with watch_scheduler(pipe, watched.on_step_end):
        pipe(**arguments, generator=seed(), output_type="latent")
    return reported, watched


@pytest.mark.parametrize("scheduler", [None, HeunDiscreteScheduler, DDIMScheduler])
def test_the_scheduler_shows_what_the_callback_reports(scheduler: type[SchedulerMixin] | None) -> None:
    pipe = INSTANCES["sd15"].build()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    reported, watched = call_twice(
        pipe, {"prompt": "a b", "num_inference_steps": 3, "height": 32, "width": 32}
    )

    assert (watched.steps, watched.timesteps) == (reported.steps, reported.timesteps)
    assert watched.fractions == reported.fractions and watched.fractions[-1] == 1.0
    assert all(map(torch.equal, watched.latents, reported.latents))


class SilentPipeline(type(random_pipeline())):
    """FLUX without a callback, as a modular pipeline is."""

    def __call__(self, prompt: Any, num_inference_steps: int, height: int, **rest: Any) -> Any:
        return super().__call__(prompt, num_inference_steps=num_inference_steps, height=height, **rest)


def test_a_pipeline_without_a_callback_is_measured_like_the_others() -> None:
    plain = random_pipeline()
    silent = SilentPipeline(**plain.components)
    sampling = Sampling(steps=3, height=16, width=16, batch=2, extra={"max_sequence_length": 8})
    made = []
    for pipe in (plain, silent):
        pipe.set_progress_bar_config(disable=True)
        made.append(generate(pipe, "transformer", {"": pipe.transformer}, SAMPLES, sampling)[""])

    assert [len(steps) for steps in made[1].step_seconds] == [3]
    assert all(map(torch.equal, made[0].trajectories, made[1].trajectories))
    assert [image.tobytes() for image in made[0].images] == [image.tobytes() for image in made[1].images]
    assert "step" not in vars(silent.scheduler)


def take_step(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    timestep = scheduler.timesteps[0]
    return scheduler.step(torch.ones_like(latents), timestep, latents, return_dict=False)[0]


def make_pipe(scheduler: Any) -> Any:
    return type("Pipe", (), {"scheduler": scheduler})()


def test_a_copy_of_the_scheduler_steps_by_itself_and_is_not_seen() -> None:
    pipe, seen = make_pipe(FlowMatchEulerDiscreteScheduler()), Seen()
    pipe.scheduler.set_timesteps(2)
    latents = torch.zeros(1, 2)
    with watch_scheduler(pipe, seen.on_step_end):
        copied = copy.deepcopy(pipe.scheduler)
        of_copy = take_step(copied, latents)
        assert pipe.scheduler.step_index is None and copied.step_index == 1
        own = take_step(pipe.scheduler, latents)

    assert torch.equal(own, of_copy) and len(seen.latents) == 1


def test_pipelines_find_in_the_watched_step_what_the_scheduler_takes() -> None:
    pipe = make_pipe(DDIMScheduler())
    own = inspect.signature(pipe.scheduler.step)
    with watch_scheduler(pipe, print):
        assert inspect.signature(pipe.scheduler.step) == own


def test_steps_are_counted_from_where_an_image_begins() -> None:
    pipe = make_pipe(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.set_begin_index(3)

    assert count_steps(pipe) == 1


def test_the_scheduler_is_as_before_when_a_call_fails() -> None:
    silent = SilentPipeline(**random_pipeline().components)
    with pytest.raises(ValueError, match="shape"), observe_steps(silent, print) as callback:
        assert callback == {} and "step" in vars(silent.scheduler)
        raise ValueError("shape")

    assert "step" not in vars(silent.scheduler)
