"""Schedulers that add noise between steps: both denoisers get the same; torch's generator is unchanged."""

import pytest
import torch
from support.tiny_pipeline import random_pipeline

from int8run.generate.generate import generate
from int8run.generate.prompts import build_samples
from int8run.models.sampling import Sampling
from int8run.models.schedulers import set_scheduler

NOISY = Sampling(
    steps=3, height=16, width=16, scheduler="FlowMatchLCMScheduler", extra={"max_sequence_length": 8}
)


@pytest.fixture(scope="module")
def pipe():
    made = random_pipeline()
    made.set_progress_bar_config(disable=True)
    for part in (made.text_encoder, made.text_encoder_2, made.transformer):
        part.eval()  # a dropout would draw from the same generator
    set_scheduler(made, made.scheduler, NOISY)
    return made


def test_both_denoisers_get_the_same_noise(pipe):
    made = generate(
        pipe,
        "transformer",
        {"a": pipe.transformer, "b": pipe.transformer},
        build_samples(["a", "b"], 1, 0),
        NOISY,
    )

    assert all(map(torch.equal, made["a"].trajectories, made["b"].trajectories))


def test_another_seed_is_another_noise(pipe):
    first, second = (
        generate(pipe, "transformer", {"": pipe.transformer}, build_samples(["a"], 1, seed), NOISY)[
            ""
        ].trajectories[0]
        for seed in (0, 1)
    )

    # the last step is far from the first noise, and the noise on the way is new
    assert not torch.equal(first[-1], second[-1])


def test_torchs_global_generator_is_unchanged(pipe):
    before = torch.random.get_rng_state()
    generate(pipe, "transformer", {"": pipe.transformer}, build_samples(["a"], 1, 7), NOISY)

    assert torch.equal(torch.random.get_rng_state(), before)
