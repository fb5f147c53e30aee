"""Negative prompts: what an image shall not show, where the pipeline takes one and its guidance uses it."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from int8run.errors import ConfigError
from int8run.generate.call_parameters import list_call_parameters
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling

NEGATIVE_PROMPT = "negative_prompt"
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
    parameters = list_call_parameters(pipe)
    if TRUE_GUIDANCE in parameters:
        scale, setting = sampling.extra.get(TRUE_GUIDANCE), f"sampler.extra.{TRUE_GUIDANCE}"
        default = parameters[TRUE_GUIDANCE].default
    elif GUIDANCE in parameters:
        scale, setting = sampling.guidance, "sampler.guidance"
        default = parameters[GUIDANCE].default
    else:
        return None
    if scale is None:
        scale = default
    if not isinstance(scale, int | float) or scale > 1:
        return None
    return (
        f"the negative prompt has no effect: {type(pipe).__name__} uses it with {setting} above 1, and "
        f"it is {scale:g}"
    )
