"""Generate with one denoiser or several in turn, and keep what the metrics need.

Called by the run, by calibration and by the mixed precision search. `pipeline_call` knows the pipelines, this
module only the order of things and their times.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.pipeline_call import call_pipeline, extract_frames, get_execution_device
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.prompts import Sample, split_batches
from int8run.generate.step_counts import StepCounts
from int8run.generate.step_denoisers import StepDenoisers
from int8run.generate.step_observer import count_steps
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.sampling import Sampling
from int8run.utils.plurals import count_noun
from int8run.utils.timing import read_clock

# Called before each step with the fraction of the steps that is done.
OnFraction = Callable[[float], None]
# The same; returns which of several denoisers computes the step, empty where there is one.
BeginStep = Callable[[float], str]


@dataclass
class Generation:
    """What one denoiser generated.

    Args:
        frames: of each sample; an image is a video of one frame.
        trajectories: the latents of each sample after every step, [steps, ...], float32 on the CPU.
        step_seconds: of each batch, by step.
        step_denoisers: of each batch, by step, the name of the denoiser that computed it; empty where one
            computes all.
        image_seconds: of each image or video, text encoding and decoding included.
        has_sound: whether the pipeline also generated sound, which is not kept.
        peak_bytes: largest memory while it generated, where the caller measures it; else 0.
        joules: energy that it took, where the caller measures it; else 0; NaN where a batch was not measured.
        step_counts: what a step cache skipped; None: every step was computed.
    """

    frames: list[list[Image]] = field(default_factory=list)
    trajectories: list[Tensor] = field(default_factory=list)
    step_seconds: list[list[float]] = field(default_factory=list)
    step_denoisers: list[list[str]] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)
    has_sound: bool = False
    peak_bytes: float = 0.0
    joules: float = 0.0
    step_counts: StepCounts | None = None

    @property
    def images(self) -> list[Image]:
        """The image of each sample; of a video the first frame."""
        return [frames[0] for frames in self.frames]

    @property
    def is_video(self) -> bool:
        """Whether any sample has more than one frame."""
        return any(len(frames) > 1 for frames in self.frames)

    @property
    def steps_by_denoiser(self) -> Mapping[str, float]:
        """How many steps of a call each of several denoisers computed, mean over the batches."""
        counts = Counter(name for batch in self.step_denoisers for name in batch)
        return {name: count / len(self.step_denoisers) for name, count in counts.items()}

    @property
    def nbytes(self) -> int:
        """Memory of the frames, as RGB, and the latents."""
        frame_bytes = sum(3 * frame.width * frame.height for frames in self.frames for frame in frames)
        return frame_bytes + sum(latents.nbytes for latents in self.trajectories)


class StepClock:
    """Times the steps of one pipeline call from step end to step end, and keeps the latents of each.

    The first step counts from the start of the call, text encoding included. A hook on the denoiser would
    separate the two, but the denoiser could not be compiled with it.

    Args:
        device: where the pipeline computes.
        begin_step: called between two steps; its time does not count.
    """

    def __init__(self, device: torch.device, begin_step: BeginStep = lambda fraction: ""):
        self.device = device
        self.begin_step = begin_step
        self.started = self.last = read_clock(device)
        self.seconds: list[float] = []
        self.denoiser_names: list[str] = []  # of each step that began, one more than ended
        self.paused_seconds = 0.0
        self.latents: list[Tensor] = []

    def start(self) -> None:
        """Announce the first step and begin to count."""
        self.denoiser_names.append(self.begin_step(0.0))
        self.started = self.last = read_clock(self.device)

    def on_step_end(
        self, pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """diffusers' `callback_on_step_end`."""
        ended = read_clock(self.device)
        self.seconds.append(ended - self.last)
        self.latents.append(tensors["latents"].detach().to("cpu", torch.float32, copy=True))
        self.denoiser_names.append(self.begin_step((step + 1) / count_steps(pipe)))
        self.last = read_clock(self.device)
        self.paused_seconds += self.last - ended
        return {}


@dataclass(frozen=True)
class GenerationHooks:
    """What is called while images are generated.

    Args:
        before_batch: called before each batch with the denoiser's name.
        on_batch: called after each batch with the denoiser's name, the samples and the Generation so far.
        on_fraction: called before each step with the fraction of the steps that is done.
    """

    before_batch: Callable[[str], None] = lambda name: None
    on_batch: Callable[[str, Sequence[Sample], Generation], None] = lambda name, batch, generation: None
    on_fraction: OnFraction = lambda fraction: None


@dataclass(frozen=True)
class Differences:
    """In what the calls for several denoisers differ besides the denoiser, by the name of each.

    Args:
        text_encoders: the components that belong to a denoiser, where not all share them.
        samplings: how a denoiser generates, where it does not as the others do.
        components: others that belong to a denoiser, such as its VAE.
        owners: of a denoiser that is another one once more, such as with a step cache, the name of that one,
            whose text encoders and components it has.
        step_denoisers: what takes turns with a denoiser from step to step.
    """

    text_encoders: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)
    samplings: Mapping[str, Sampling] = field(default_factory=dict)
    components: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)
    step_denoisers: Mapping[str, StepDenoisers] = field(default_factory=dict)


NO_HOOKS = GenerationHooks()
NO_DIFFERENCES = Differences()


def generate(
    pipe: DiffusionPipeline,
    component: str,
    denoisers: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    sampling: Sampling,
    *,
    hooks: GenerationHooks = NO_HOOKS,
    differences: Differences = NO_DIFFERENCES,
) -> dict[str, Generation]:
    """Run every batch of samples through each denoiser in turn, so that both meet the same machine.

    The order alternates from batch to batch. The pipeline keeps the last denoiser.

    Args:
        pipe: the pipeline to run.
        component: name of the pipeline's denoiser component.
        denoisers: by name, modules that take that component's place, or `DualDenoiser`s that take those of
            two.
        samples: what to generate.
        sampling: how.
        hooks: called meanwhile.
        differences: between the denoisers.

    Returns:
        A Generation for each denoiser, by its name.
    """
    device = get_execution_device(pipe)
    generations = {name: Generation() for name in denoisers}
    for number, batch in enumerate(split_batches(samples, sampling.batch)):
        names = list(denoisers)
        if number % 2 == 1:
            names.reverse()
        for name in names:
            steps = differences.step_denoisers.get(name)
            if steps is None:
                set_denoiser(pipe, denoisers[name], component)
            owner = differences.owners.get(name, name)
            set_text_encoders(pipe, owner, differences.text_encoders.get(owner, {}))
            set_components(pipe, differences.components.get(owner, {}))
            hooks.before_batch(name)
            clock = StepClock(device, partial(begin_step, pipe, component, steps, hooks.on_fraction))
            own_sampling = differences.samplings.get(name, sampling)
            generate_batch(pipe, batch, own_sampling, clock, generations[name])
            hooks.on_batch(name, batch, generations[name])
    return generations


def begin_step(
    pipe: DiffusionPipeline,
    component: str,
    steps: StepDenoisers | None,
    on_fraction: OnFraction,
    fraction: float,
) -> str:
    """Do what is to be done before a step.

    Args:
        pipe: the pipeline.
        component: name of its denoiser component.
        steps: the denoisers that take turns; None: one computes all steps.
        on_fraction: is called.
        fraction: of the steps that is done.

    Returns:
        The name of the denoiser that computes the step; empty where one computes all.
    """
    on_fraction(fraction)
    return "" if steps is None else steps.install(pipe, component, fraction)


def generate_batch(
    pipe: DiffusionPipeline,
    batch: Sequence[Sample],
    sampling: Sampling,
    clock: StepClock,
    generation: Generation,
) -> None:
    """Call the pipeline for one batch and add the result to a Generation.

    Args:
        pipe: the pipeline, with its denoiser and its text encoders in place.
        batch: what to generate.
        sampling: how.
        clock: of this call.
        generation: receives the result.

    Raises:
        ConfigError: when the call makes another number of images than it has prompts.
    """
    prompt_cache = PromptCache.for_pipeline(pipe)
    saved_before = prompt_cache.saved_seconds
    clock.start()
    output = call_pipeline(pipe, batch, sampling, clock.on_step_end)

    # As if every call had encoded its prompts itself.
    seconds = read_clock(clock.device) - clock.started - clock.paused_seconds
    seconds += prompt_cache.saved_seconds - saved_before
    frames = extract_frames(output)
    trajectories = split_trajectories(clock.latents, len(batch))
    check_count(len(frames) or len(trajectories), len(batch), sampling)
    generation.frames += frames
    generation.has_sound |= getattr(output, "audio", None) is not None
    generation.trajectories += trajectories
    generation.step_seconds.append(clock.seconds)
    denoiser_names = clock.denoiser_names[: len(clock.seconds)]
    if any(denoiser_names):
        generation.step_denoisers.append(denoiser_names)
    generation.image_seconds += [seconds / len(batch)] * len(batch)


def split_trajectories(latents: Sequence[Tensor], num_samples: int) -> list[Tensor]:
    """The latents of each sample after every step.

    Args:
        latents: by step, [batch, ...]; of one sample also rows without a batch, as MiniMax-H3 packs them.
        num_samples: of the call.

    Returns:
        [steps, ...] of each sample.
    """
    steps = torch.stack(list(latents))
    has_no_batch = num_samples == 1 and steps.shape[1] != 1
    return [steps] if has_no_batch else list(steps.unbind(dim=1))


def check_count(num_images: int, num_samples: int, sampling: Sampling) -> None:
    """Raise ConfigError unless a call made one image for each of its prompts.

    Args:
        num_images: that the call made.
        num_samples: prompts of the call.
        sampling: its settings.
    """
    if num_images != num_samples:
        extra = ", ".join(sampling.extra) or "nothing"
        images, prompts = count_noun(num_images, "image"), count_noun(num_samples, "prompt")
        raise ConfigError(
            f"the pipeline made {images} of {prompts} (sampler.extra sets {extra}); "
            "one image per prompt is compared: prompts.seeds_per_prompt=2 makes two of each prompt"
        )


def set_text_encoders(pipe: DiffusionPipeline, encoder_key: str, encoders: Mapping[str, nn.Module]) -> None:
    """Give the pipeline other text encoders; without any it keeps those that it has.

    Args:
        pipe: the pipeline.
        encoder_key: what the prompt cache knows them by.
        encoders: by the name of the component.
    """
    set_components(pipe, encoders)
    if encoders:
        PromptCache.for_pipeline(pipe).encoder_key = encoder_key


def set_components(pipe: DiffusionPipeline, components: Mapping[str, nn.Module]) -> None:
    """Give the pipeline other components, by name; those that are not named stay."""
    for name, component in components.items():
        # One that is in place already may have hooks for its offloading.
        if getattr(pipe, name, None) is not component:
            pipe.register_modules(**{name: component})
