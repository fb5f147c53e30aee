"""Generate with one denoiser or several in turn, and keep what the metrics need: pictures or videos, latents, step times."""

import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from int8run.errors import ConfigError, check_choice
from int8run.generate.prompts import Sample
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.sampling import Sampling
from int8run.utils.timing import read_clock


@dataclass
class Generation:
    """What one denoiser made. Latents are float32 on the CPU, one [steps, ...] tensor per sample."""

    frames: list[list[Image]] = field(default_factory=list)  # per sample; a picture is a video of one frame
    trajectories: list[Tensor] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)  # per batch, per step
    image_seconds: list[float] = field(
        default_factory=list
    )  # per picture or video, text encoding and decoding included
    has_sound: bool = False  # the pipeline made sound as well, which is not kept

    @property
    def images(self) -> list[Image]:
        """The picture of each sample; of a video the first frame."""
        return [frames[0] for frames in self.frames]

    @property
    def is_video(self) -> bool:
        """Whether any sample has more than one frame."""
        return any(len(frames) > 1 for frames in self.frames)

    @property
    def nbytes(self) -> int:
        """Memory of the frames and latents."""
        return sum(t.nbytes for t in self.trajectories) + sum(
            3 * im.width * im.height for frames in self.frames for im in frames
        )


# encoded prompts that are remembered; of FLUX, each takes 4 MB on the device
MAX_CACHED_PROMPTS = 64
SAME_ENCODERS: Mapping[str, Mapping[str, nn.Module]] = MappingProxyType({})
# called with the fraction of the steps that is done, before the step that comes next
OnFraction = Callable[[float], None]
# what a call may be asked for: pictures, or no decoding at all
OUTPUT_TYPES = ("pil", "latent")
# arguments of a call that are a prompt: one for each sample of a batch
PROMPT_ARGUMENT = re.compile(r"(negative_)?prompt(_\d+)?")
# frames per second of a video whose pipeline says nothing else: that of Wan
DEFAULT_FRAME_RATE = 16.0
# encoded prompts are remembered by such arguments alone, or by lists of them: two equal ones mean the same text
PLAIN_TYPES = (str, int, float, NoneType, torch.device, torch.dtype)


class StepClock:
    """Times the steps of one pipeline call from step end to step end, and keeps the latents of each.

    The first step counts from the start of the call, text encoding included. A hook on the denoiser would separate the
    two, but it cannot be compiled with it.

    Args:
        between: called between two steps; its time is nobody's.
    """

    def __init__(self, device: torch.device, between: OnFraction = lambda fraction: None):
        self.device, self.on_fraction = device, between
        self.started = self.last = read_clock(device)
        self.seconds: list[float] = []
        self.paused_seconds = 0.0
        self.latents: list[Tensor] = []

    def on_step_end(
        self, pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """diffusers' `callback_on_step_end`."""
        ended = read_clock(self.device)
        self.seconds.append(ended - self.last)
        self.latents.append(tensors["latents"].detach().to("cpu", torch.float32, copy=True))
        # not every pipeline counts its steps; those that do may stop before the scheduler's last one
        self.on_fraction((step + 1) / (getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)))
        self.last = read_clock(self.device)
        self.paused_seconds += self.last - ended
        return {}


class EncodedPrompt(NamedTuple):
    """One answer of a pipeline's `encode_prompt`, and what it was asked."""

    made: Any
    seconds: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class PromptCache:
    """A pipeline's `encode_prompt` that remembers: equal prompts are encoded once, for both denoisers and all jobs of a sweep.

    What was saved is counted, so that speeds stay those of a pipeline that encodes every time. `which` names the text encoders that
    the pipeline has now, where it has some in turn.
    """

    def __init__(self, encode: Callable[..., Any], device: torch.device):
        self.encode, self.device = encode, device
        self.encoder_key = ""
        self.entries: dict[str, dict[str, EncodedPrompt]] = {}  # by text encoders, by arguments
        self.requested: set[str] = set()  # arguments, since somebody emptied it
        self.saved = 0.0

    @staticmethod
    def for_pipeline(pipe: DiffusionPipeline) -> "PromptCache":
        """The pipeline's cache, put in place at the first call; a pipeline without `encode_prompt` is left as it is."""
        encode = getattr(pipe, "encode_prompt", None)
        if isinstance(encode, PromptCache):
            return encode
        cache = PromptCache(encode or (lambda: None), get_execution_device(pipe))
        if encode is not None:
            pipe.encode_prompt = cache
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`encode_prompt` itself; a call that brings tensors or pictures of its own is not remembered."""
        if not all(map(is_plain, [*args, *kwargs.values()])):
            return self.encode(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        self.requested.add(key)
        known = self.entries.setdefault(self.encoder_key, {})
        if key in known:
            self.saved += known[key].seconds
            return known[key].made
        started = read_clock(self.device)
        found = self.encode(*args, **kwargs)
        known[key] = EncodedPrompt(found, read_clock(self.device) - started, args, kwargs)
        if len(known) > MAX_CACHED_PROMPTS:  # the oldest goes first
            del known[next(iter(known))]
        return found

    def iter_pairs(self, other: str) -> Iterator[tuple[Any, Any]]:
        """What the text encoders of now and others make of the prompts that were asked for."""
        for encoded in [found for key, found in self.entries.get(other, {}).items() if key in self.requested]:
            yield self(*encoded.args, **encoded.kwargs), encoded.made

    def clear(self) -> None:
        """Forget all: the text encoders have changed."""
        self.entries.clear()


def is_plain(value: object) -> bool:
    """Whether a value's text says all about it."""
    return all(map(is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN_TYPES)


def generate(
    pipe: DiffusionPipeline,
    component: str,
    denoisers: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    sampling: Sampling,
    on_batch: Callable[[str, Sequence[Sample], "Generation"], None] = lambda name, batch, made: None,
    on_fraction: OnFraction = lambda fraction: None,
    text_encoders: Mapping[str, Mapping[str, nn.Module]] = SAME_ENCODERS,
) -> dict[str, Generation]:
    """Run every batch of samples through each denoiser in turn, so that both meet the same machine.

    The order alternates from batch to batch. The pipeline keeps the last denoiser.

    Args:
        component: name of the pipeline's denoiser component.
        denoisers: by name, modules that can take that component's place, or Experts that take several.
        on_batch: called after each batch with the denoiser's name, the samples and the Generation so far.
        on_fraction: called before each step with the fraction of the steps that is done.
        text_encoders: by the name of a denoiser the components that go with it, where they are not the same for all.
    """
    made = {name: Generation() for name in denoisers}
    device = get_execution_device(pipe)
    batches = [samples[i : i + sampling.batch] for i in range(0, len(samples), sampling.batch)]
    for number, batch in enumerate(batches):
        order = list(denoisers.items())
        for name, denoiser in order if number % 2 == 0 else reversed(order):
            set_denoiser(pipe, denoiser, component)
            use_text_encoders(pipe, name, text_encoders.get(name, {}))
            texts = PromptCache.for_pipeline(pipe)
            saved = texts.saved
            on_fraction(0.0)
            clock = StepClock(device, on_fraction)
            output = call_pipeline(pipe, batch, sampling, clock.on_step_end)
            # as if every call had encoded its own text
            seconds = read_clock(device) - clock.started - clock.paused_seconds + texts.saved - saved
            generation = made[name]
            generation.frames += extract_frames(output)
            generation.has_sound |= getattr(output, "audio", None) is not None
            generation.trajectories += list(torch.stack(clock.latents).unbind(dim=1))
            generation.step_seconds.append(clock.seconds)
            generation.image_seconds += [seconds / len(batch)] * len(batch)
            on_batch(name, batch, generation)
    return made


def use_text_encoders(pipe: DiffusionPipeline, which: str, encoders: Mapping[str, nn.Module]) -> None:
    """Let the pipeline read prompts by these; without any it keeps those that it has."""
    for name, encoder in encoders.items():
        if getattr(pipe, name, None) is not encoder:  # one that is there may have hooks for its offloading
            pipe.register_modules(**{name: encoder})
    if encoders:
        PromptCache.for_pipeline(pipe).encoder_key = which


def call_pipeline(
    pipe: DiffusionPipeline, batch: Sequence[Sample], sampling: Sampling, step_end: Callable[..., object]
) -> Any:
    """One pipeline call; each sample has its own generator, so that a picture does not depend on its batch.

    Schedulers that add noise on the way (LCM) take it from torch's own generator, which the pipelines give them no other way: it is
    seeded by the first sample for the call, so that both denoisers meet the same noise, and left as it was.

    Returns:
        what the pipeline returns, for `frames_of`.

    Raises:
        ConfigError: when the pipeline cannot use the scheduler, or is asked for arrays in place of pictures.
    """
    common = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
    }
    arguments = {
        "prompt": [s.prompt for s in batch],
        "output_type": "pil",  # pipelines of videos give arrays otherwise
        **{k: v for k, v in common.items() if v is not None},
        **{
            k: [v] * len(batch) if PROMPT_ARGUMENT.fullmatch(k) and isinstance(v, str) else v
            for k, v in sampling.extra.items()
        },
        **build_step_callback(pipe, step_end),
    }
    check_choice("sampler.extra.output_type", arguments["output_type"], OUTPUT_TYPES)
    device = get_execution_device(pipe)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            # not the seed itself: that is the noise which the picture begins with
            torch.manual_seed(random.Random(f"noise between steps {batch[0].seed}").getrandbits(63))
            return pipe(
                **arguments,
                generator=[torch.Generator().manual_seed(s.seed) for s in batch],
            )
    except ValueError as error:
        if sampling.scheduler is None or "scheduler" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"sampler.scheduler={sampling.scheduler} cannot be used with {type(pipe).__name__}: {reason}; choose another one"
        ) from error


def get_execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes; offloaded modules lie elsewhere between their turns, and so would the pipeline's `device`."""
    return getattr(pipe, "_execution_device", pipe.device)


def build_step_callback(
    pipe: DiffusionPipeline, step_end: Callable[..., object]
) -> dict[str, Callable[..., object]]:
    """The argument by which this pipeline tells of the end of each step.

    PixArt's pipelines have only diffusers' older one, whose function is given `(step, timestep, latents)`.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if "callback" in known and "callback_on_step_end" not in known:
        return {
            "callback": lambda step, timestep, latents: step_end(pipe, step, timestep, {"latents": latents})
        }
    return {"callback_on_step_end": step_end}


def extract_frames(output: Any) -> list[list[Image]]:
    """The frames of each sample, from what a pipeline returned; none where it was asked for latents alone."""
    made = output.frames if hasattr(output, "frames") else output.images
    if isinstance(made, Tensor):
        return []
    return [list(sample) if isinstance(sample, list) else [sample] for sample in made]


def get_frame_rate(pipe: DiffusionPipeline, sampling: Sampling) -> float:
    """Frames per second of this pipeline's videos."""
    argument = inspect.signature(type(pipe).__call__).parameters.get("frame_rate")
    return float(sampling.extra.get("frame_rate") or (argument.default if argument else DEFAULT_FRAME_RATE))


def find_unknown_arguments(pipe: DiffusionPipeline, sampling: Sampling) -> list[str]:
    """Names in `sampling.extra` that the pipeline's call does not have."""
    return [name for name in sampling.extra if name not in inspect.signature(type(pipe).__call__).parameters]
