"""Generate with one denoiser or several in turn, and keep what the metrics need: pictures, latents, step times."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from int8run.generate.prompts import Sample
from int8run.models.family import Sampling


@dataclass
class Generation:
    """What one denoiser made. Latents are float32 on the CPU, one [steps, ...] tensor per sample."""

    images: list[Image] = field(default_factory=list)
    trajectories: list[Tensor] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)  # per batch, per step
    image_seconds: list[float] = field(default_factory=list)  # per image, text encoding and decoding included


class StepClock:
    """Times the steps of one pipeline call from step end to step end, and keeps the latents of each.

    The first step counts from the start of the call, text encoding included. A hook on the denoiser would separate the
    two, but it cannot be compiled with it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = [now(device)]
        self.latents: list[Tensor] = []

    def step_end(self, pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' `callback_on_step_end`."""
        self.marks.append(now(self.device))
        self.latents.append(tensors["latents"].detach().float().cpu())
        return {}

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def now(device: torch.device) -> float:
    """A device-synchronised clock, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def generate(
    pipe: DiffusionPipeline,
    component: str,
    denoisers: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    sampling: Sampling,
    on_batch: Callable[[str, Sequence[Sample], "Generation"], None] = lambda name, batch, made: None,
) -> dict[str, Generation]:
    """Run every batch of samples through each denoiser in turn, so that both meet the same machine.

    The order alternates from batch to batch. The pipeline keeps the last denoiser.

    Args:
        component: name of the pipeline's denoiser component.
        denoisers: by name, modules that can take that component's place.
        on_batch: called after each batch with the denoiser's name, the samples and the Generation so far.
    """
    made = {name: Generation() for name in denoisers}
    device = pipe.device
    batches = [samples[i : i + sampling.batch] for i in range(0, len(samples), sampling.batch)]
    for number, batch in enumerate(batches):
        order = list(denoisers.items())
        for name, denoiser in order if number % 2 == 0 else reversed(order):
            pipe.register_modules(**{component: denoiser})
            clock = StepClock(device)
            images = call(pipe, batch, sampling, clock.step_end)
            seconds = now(device) - clock.marks[0]
            generation = made[name]
            generation.images += images
            generation.trajectories += list(torch.stack(clock.latents).unbind(dim=1))
            generation.step_seconds.append(clock.seconds)
            generation.image_seconds += [seconds / len(batch)] * len(batch)
            on_batch(name, batch, generation)
    return made


def call(pipe: DiffusionPipeline, batch: Sequence[Sample], sampling: Sampling, step_end: Callable[..., object]) -> list[Image]:
    """One pipeline call; each sample has its own generator, so that a picture does not depend on its batch."""
    arguments = {
        "prompt": [s.prompt for s in batch],
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
        **sampling.extra,
    }
    return pipe(
        **{k: v for k, v in arguments.items() if v is not None},
        generator=[torch.Generator().manual_seed(s.seed) for s in batch],
        callback_on_step_end=step_end,
    ).images


def unknown_arguments(pipe: DiffusionPipeline, sampling: Sampling) -> list[str]:
    """Names in `sampling.extra` that the pipeline's call does not have."""
    return [name for name in sampling.extra if name not in inspect.signature(type(pipe).__call__).parameters]
