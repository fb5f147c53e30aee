"""One call of a diffusers pipeline: its arguments, its callback, its noise, and the frames that it returns.

What differs between pipelines is here, so that `generate` and `capture` need not know it.
"""

import random
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from int8run.errors import ConfigError, check_choice
from int8run.generate.call_parameters import get_call_default, list_call_parameters, takes_argument
from int8run.generate.input_arguments import build_input_arguments
from int8run.generate.negative_prompts import NEGATIVE_PROMPT, find_negative_prompts
from int8run.generate.prompts import Sample
from int8run.generate.step_observer import OnStepEnd, observe_steps
from int8run.models.missing_library import raise_if_library_is_missing
from int8run.models.sampling import Sampling
from int8run.utils.text import shorten_error

# What a call may be asked for: images, or latents without decoding.
IMAGE_TYPES = ("pil",)
OUTPUT_TYPES = (*IMAGE_TYPES, "latent")  # latents are for int8run's own calls, which decode nothing
# What pipelines call the images or videos that they return: Kandinsky 5 has one `image` for all.
OUTPUT_FIELDS = ("frames", "images", "image")
# Arguments of a call that are prompts: one for each sample of a batch.
PROMPT_ARGUMENT = re.compile(r"(negative_)?prompt(_\d+)?")
# Arguments of a call that are settings, and the fields of a Sampling.
SETTING_ARGUMENTS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "height": "height",
    "width": "width",
}
# Arguments that would make several images of one prompt.
SEVERAL_PER_PROMPT = re.compile(r"num_\w+_per_prompt")
PIPELINES_FOLDER = Path(diffusers.__file__).parent / "pipelines"
SCHEDULERS_FOLDER = Path(diffusers.__file__).parent / "schedulers"
# Frames per second of a video whose pipeline has no such argument: that of Wan.
DEFAULT_FRAME_RATE = 16.0


def call_pipeline(
    pipe: DiffusionPipeline, batch: Sequence[Sample], sampling: Sampling, on_step_end: OnStepEnd
) -> Any:
    """Call the pipeline once.

    Each sample has its own generator, so that an image does not depend on its batch. Schedulers that add
    noise between steps (LCM) draw it from torch's global generator; pipelines have no other way to give it to
    them. It is seeded for the call by the first sample, so that both denoisers get the same noise, and is
    restored afterwards.

    Args:
        pipe: the pipeline to call.
        batch: what to generate.
        sampling: how.
        on_step_end: takes the arguments of diffusers' `callback_on_step_end`.

    Returns:
        What the pipeline returns, for `extract_frames`.

    Raises:
        ConfigError: when the pipeline cannot use the scheduler, is asked for arrays in place of images, or
            needs a library that is not installed.
    """
    arguments = build_arguments(pipe, batch, sampling)
    if arguments["output_type"] not in OUTPUT_TYPES:
        check_choice("sampler.extra.output_type", arguments["output_type"], IMAGE_TYPES)
    check_one_per_prompt(sampling)
    generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
    generator: Any = generators
    if len(batch) == 1:
        generator = generators[0]
        arguments |= unwrap_prompts(arguments)
    device = get_execution_device(pipe)
    try:
        with kept_random_state(device):
            # Not the seed itself: it gives the noise that the image begins with.
            torch.manual_seed(choose_noise_seed(batch[0]))
            with observe_steps(pipe, on_step_end) as callback:
                return pipe(**arguments, **callback, generator=generator)
    except (ValueError, TypeError) as error:
        raise_refusal(pipe, sampling, error)
        raise
    except (ImportError, NameError) as error:
        raise_if_library_is_missing(type(pipe).__name__, error)
        raise


def choose_noise_seed(first: Sample) -> int:
    """The seed of the noise that a scheduler adds between the steps of a call, by its first sample."""
    return random.Random(f"noise between steps {first.seed}").getrandbits(63)


def unwrap_prompts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts of a call with one sample, each alone: some pipelines of videos take no lists of one.

    Args:
        arguments: of the call.
    """
    prompts = {name: value for name, value in arguments.items() if PROMPT_ARGUMENT.fullmatch(name)}
    return {name: value[0] for name, value in prompts.items() if isinstance(value, list) and len(value) == 1}


def check_one_per_prompt(sampling: Sampling) -> None:
    """Raise ConfigError where a call would make several images of a prompt."""
    for name, value in sampling.extra.items():
        if SEVERAL_PER_PROMPT.fullmatch(name) and value not in (None, 1):
            raise ConfigError(
                f"sampler.extra.{name} is {value!r}; one image of each prompt and seed is compared; "
                f"prompts.seeds_per_prompt={value} makes several of each prompt"
            )


def raise_refusal(pipe: DiffusionPipeline, sampling: Sampling, error: ValueError | TypeError) -> None:
    """Raise ConfigError for what a pipeline has against its settings; return for an error of another place.

    Most pipelines check their arguments in a method of their own, some where they are used.

    Args:
        pipe: that was called.
        sampling: the settings.
        error: that it raised.
    """
    name = type(pipe).__name__
    reason = shorten_error(error)
    if sampling.scheduler is not None and is_about_scheduler(error):
        raise ConfigError(
            f"sampler.scheduler={sampling.scheduler} cannot be used with {name}: {reason}; choose another one"
        ) from error
    if isinstance(error, TypeError):
        return
    if not is_raised_in(error, PIPELINES_FOLDER):
        return
    raise ConfigError(
        f"{name} cannot generate this: {reason.rstrip('.')}; change the prompt, sampler.height, "
        "sampler.width or sampler.extra"
    ) from error


def is_about_scheduler(error: ValueError | TypeError) -> bool:
    """Whether an error of a call says that its scheduler does not suit the pipeline.

    A TypeError that only names a scheduler is a mistake somewhere else, unless diffusers raised it.
    """
    text = str(error)
    if "scheduler" not in text.lower():
        return False
    if not isinstance(error, TypeError) or "set_timesteps" in text:
        return True
    return is_raised_in(error, PIPELINES_FOLDER) or is_raised_in(error, SCHEDULERS_FOLDER)


def is_raised_in(error: Exception, folder: Path) -> bool:
    """Whether the source file that raised an error is in a folder."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and folder in Path(frames[-1].filename).parents


def build_arguments(pipe: DiffusionPipeline, batch: Sequence[Sample], sampling: Sampling) -> dict[str, Any]:
    """The arguments of a call. Settings that are not set are left to the pipeline.

    A checkpoint's own settings that another pipeline for it does not take are left out; the user's own were
    refused before.

    Raises:
        ConfigError: when a sample has a negative prompt, and the pipeline takes none.
        FileError: when an input cannot be read.
    """
    prompts = {"prompt": [sample.prompt for sample in batch]}
    settings = {}
    for name, field in SETTING_ARGUMENTS.items():
        if getattr(sampling, field) is not None:
            settings[name] = getattr(sampling, field)
    for name, value in sampling.extra.items():
        is_prompt = PROMPT_ARGUMENT.fullmatch(name) is not None and isinstance(value, str)
        settings[name] = [value] * len(batch) if is_prompt else value
    arguments: dict[str, Any] = {"output_type": "pil"}  # pipelines of videos return arrays otherwise
    for name, value in {**prompts, **settings}.items():
        if takes_argument(pipe, name):
            arguments[name] = value
    # a sample with inputs is alone in its batch
    arguments |= build_input_arguments(pipe, batch[0].inputs, arguments)
    negative_prompts = find_negative_prompts(pipe, batch, sampling)
    if negative_prompts is not None:
        arguments[NEGATIVE_PROMPT] = negative_prompts
    return arguments


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's random state as it was, on the CPU and on the GPU that computes."""
    with ExitStack() as stack:
        if device.type in ("cuda", "xpu"):
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        else:
            stack.enter_context(torch.random.fork_rng([]))
        if device.type == "mps":  # fork_rng passes a device, which torch's functions for Apple do not take
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


def get_execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes.

    Offloaded modules are elsewhere between their turns, and the pipeline's `device` would name that place.
    """
    device: torch.device = getattr(pipe, "_execution_device", pipe.device)
    return device


def extract_frames(output: Any) -> list[list[Image]]:
    """The frames of each sample in a pipeline's output; none where it was asked for latents."""
    samples = next(getattr(output, name) for name in OUTPUT_FIELDS if hasattr(output, name))
    if isinstance(samples, Tensor):
        return []
    return [list(sample) if isinstance(sample, list) else [sample] for sample in samples]


def get_frame_rate(pipe: DiffusionPipeline, sampling: Sampling) -> float:
    """Frames per second of this pipeline's videos."""
    default = get_call_default(pipe, "frame_rate") or DEFAULT_FRAME_RATE
    return float(sampling.extra.get("frame_rate") or default)


def find_unknown_arguments(pipe: DiffusionPipeline, sampling: Sampling) -> list[str]:
    """The names in `sampling.extra` that the pipeline's call does not have."""
    parameters = list_call_parameters(pipe)
    return [name for name in sampling.extra if name not in parameters]
