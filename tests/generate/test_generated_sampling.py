"""What is recorded of a run is what came out, not what was asked."""

import torch
from PIL import Image

from int8run.generate.generate import Generation
from int8run.generate.generated_sampling import (
    Rounded,
    describe_rounded,
    describe_tiled,
    is_tiled,
    list_rounded,
    read_generated_sampling,
)
from int8run.models.sampling import Sampling


def make_generation(frames: int, size: tuple[int, int], steps: int, samples: int = 1) -> Generation:
    image = Image.new("RGB", size)
    return Generation(
        frames=[[image] * frames] * samples,
        trajectories=[torch.zeros(steps, 1)] * samples,
        step_seconds=[[0.1] * steps],
    )


def test_size_frames_steps_and_batch_are_those_that_came_out() -> None:
    asked = Sampling(steps=10, width=100, height=90, batch=4, extra={"num_frames": 10, "fps": 8})

    generated = read_generated_sampling(asked, make_generation(9, (96, 80), 19, samples=2))

    assert generated == Sampling(steps=19, width=96, height=80, batch=2, extra={"num_frames": 9, "fps": 8})
    assert describe_rounded(list_rounded(asked, generated), "WanPipeline") == (
        "WanPipeline rounded sampler.width=100 to 96, sampler.height=90 to 80, sampler.steps=10 to 19, "
        "sampler.extra.num_frames=10 to 9; there are fewer images than sampler.batch=4, and a call makes 2; "
        "what was generated is recorded"
    )


def test_what_was_not_asked_is_filled_in_and_not_rounded() -> None:
    generated = read_generated_sampling(Sampling(), make_generation(1, (64, 32), 4))

    assert generated == Sampling(steps=4, width=64, height=32)
    assert list_rounded(Sampling(), generated) == []


def test_steps_of_several_tiles_are_those_that_were_asked_for() -> None:
    tiled, scheduler = Rounded("sampler.steps", 2, 8), Rounded("sampler.steps", 10, 19)
    arguments = ["video", "tiles_batch_size"]

    assert is_tiled(tiled, arguments)
    assert not is_tiled(tiled, ["video"])
    assert not is_tiled(scheduler, arguments)
    assert describe_tiled(tiled, "Kandinsky6SRPipeline") == (
        "Kandinsky6SRPipeline takes sampler.steps=2 for each of 4 tiles"
    )


def test_latents_alone_have_no_size() -> None:
    generation = Generation(trajectories=[torch.zeros(2, 1)], step_seconds=[[0.1, 0.1]])

    assert read_generated_sampling(Sampling(width=100), generation) == Sampling(width=100, steps=2)
