"""Negative prompts: what an image shall not show, where the pipeline takes one and its guidance uses it.

The call of a pipeline takes them from here, the log says where they have no effect, and the text in the file
of an image leaves those out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from int8run.errors import ConfigError
from int8run.generate.call_parameters import list_call_parameters
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling

NEGATIVE_PROMPT = "negative_prompt"
DENOISERS = ("transformer", "unet")
# the guidance that a negative prompt belongs to: of models with a distilled guidance it has a name of its own
TRUE_GUIDANCE, GUIDANCE = "true_cfg_scale", "guidance_scale"


def find_negative_prompts(
    pipe: DiffusionPipeline, batch: Sequence[Sample], sampling: Sampling
) -> list[str] | None:
    """The negative prompt of each sample of a batch; None where no sample has one of its own.

    Args:
        pipe: to be called.
        batch: what to generate. A sample without a negative prompt of its own has that of the sampling.
        sampling: how.

    Raises:
        ConfigError: when the pipeline takes no negative prompt.
    """
    if all(sample.negative_prompt is None for sample in batch):
        return None
    if NEGATIVE_PROMPT not in list_call_parameters(pipe):
        raise ConfigError(
            f"{type(pipe).__name__} takes no negative prompt; leave prompts.negative_prompt out, and say in "
            "the prompt what the image shows"
        )
    return [get_negative_prompt(sample, sampling) for sample in batch]


def get_negative_prompt(sample: Sample, sampling: Sampling) -> str:
    """The negative prompt of a sample: its own, else that of the sampling; empty where neither has one."""
    if sample.negative_prompt is not None:
        return sample.negative_prompt
    return str(sampling.extra.get(NEGATIVE_PROMPT) or "")


@dataclass(frozen=True)
class Guidance:
    """The guidance of a call.

    Args:
        setting: that the scale of the classifier-free guidance is given by; None: the call has none.
        scale: of it; a negative prompt counts where it is above 1. None: not known.
        distilled_scale: number that a model with a distilled guidance is given; None: it takes none.
    """

    setting: str | None
    scale: float | None
    distilled_scale: float | None = None

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether a negative prompt changes the image."""
        return self.scale is None or self.scale > 1


def read_guidance(pipe: DiffusionPipeline, sampling: Sampling) -> Guidance:
    """The guidance that a pipeline generates with.

    Args:
        pipe: to be called.
        sampling: with all defaults filled in.
    """
    parameters = list_call_parameters(pipe)
    if TRUE_GUIDANCE in parameters:
        setting = f"sampler.extra.{TRUE_GUIDANCE}"
        true_scale = sampling.extra.get(TRUE_GUIDANCE)
        if true_scale is None:
            true_scale = parameters[TRUE_GUIDANCE].default
        return Guidance(setting, as_scale(true_scale), distilled_scale=sampling.guidance)
    scale: object = None
    if GUIDANCE in parameters:
        scale = parameters[GUIDANCE].default if sampling.guidance is None else sampling.guidance
    if is_scale_embedded(pipe):
        return Guidance(None, 1.0, distilled_scale=as_scale(scale))
    # FLUX.2 klein; a distilled pipeline that does take a negative prompt, as Krea's, still has the guidance
    is_ignored = bool(get_config(pipe).get("is_distilled")) and NEGATIVE_PROMPT not in parameters
    if is_ignored:
        return Guidance(None, 1.0)
    return Guidance("sampler.guidance", as_scale(scale))


def is_scale_embedded(pipe: DiffusionPipeline) -> bool:
    """Whether the scale is an input of the denoiser, which then runs once per step: a distilled guidance.

    `guidance_embeds` is how the configs of transformers say it (FLUX, FLUX.2, Sana Sprint), and an embedding
    of a condition beside the time is how those of UNets do (latent consistency models).
    """
    for name in DENOISERS:
        config = get_config(getattr(pipe, name, None))
        if config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None:
            return True
    return False


def get_config(part: object) -> Mapping[str, Any]:
    """The config of a pipeline or model; empty where it has none."""
    config = getattr(part, "config", None)
    return config if isinstance(config, Mapping) else {}


def as_scale(value: object) -> float | None:
    """A number as it is; None for a parameter without a default, and for everything else."""
    return value if isinstance(value, int | float) else None


def explain_unused_negative_prompt(
    pipe: DiffusionPipeline, texts: Sequence[str | None], sampling: Sampling
) -> str | None:
    """Why negative prompts change nothing, in one line; None where they do, or where there are none.

    diffusers' pipelines leave them out without a word where the guidance is 1 or less.

    Args:
        pipe: to be called.
        texts: the negative prompts that somebody asked for; None and empty ones are none.
        sampling: with all defaults filled in.
    """
    if not any(texts):
        return None
    guidance = read_guidance(pipe, sampling)
    if guidance.uses_negative_prompt:
        return None
    if guidance.setting is None:
        return (
            f"the negative prompt has no effect: {type(pipe).__name__} with this model has a distilled "
            "guidance, which uses none"
        )
    return (
        f"the negative prompt has no effect: {type(pipe).__name__} uses it with {guidance.setting} above 1, "
        f"and it is {guidance.scale:g}"
    )
