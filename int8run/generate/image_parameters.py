"""What an image was made with, as text for its file, so that other programs find prompt, seed and settings.

`format_parameters` writes the form of AUTOMATIC1111's web UI, which ComfyUI and most galleries read, too: the
prompt, a line with the negative prompt, a line of names and values.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from int8run.generate.negative_prompts import Guidance, get_negative_prompt
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import SampleInputs
from int8run.models.sampling import Sampling

# scheduler class of diffusers -> the name of the same sampler in these programs
SAMPLER_NAMES = {
    "DDIMScheduler": "DDIM",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "FlowMatchHeunDiscreteScheduler": "Heun",
    "FlowMatchLCMScheduler": "LCM",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def format_parameters(
    sample: Sample,
    sampling: Sampling,
    *,
    scheduler: str,
    model: str,
    details: Mapping[str, object],
    guidance: Guidance | None = None,
) -> str:
    """The text chunk `parameters`.

    Args:
        sample: prompt and seed.
        sampling: as generated.
        scheduler: class of diffusers.
        model: name of the checkpoint.
        details: further names and values, such as the precision; those that are None are left out.
        guidance: of the pipeline; None: plain classifier-free guidance.
    """
    if guidance is None:
        guidance = Guidance("sampler.guidance", sampling.guidance)
    facts: dict[str, object] = {
        "Steps": sampling.steps,
        "Sampler": SAMPLER_NAMES.get(scheduler, scheduler),
        "CFG scale": format_scale(guidance.scale),
        # as Forge writes the guidance of FLUX
        "Distilled CFG Scale": format_scale(guidance.distilled_scale),
        "Seed": sample.seed,
        "Size": f"{sampling.width}x{sampling.height}",
        "Model": model,
        **describe_inputs(sample.inputs),
        **details,
    }
    settings = ", ".join(f"{name}: {quote(value)}" for name, value in facts.items() if value is not None)
    negative = get_negative_prompt(sample, sampling) if guidance.uses_negative_prompt else ""
    # ComfyUI looks for the second line even where there is nothing to avoid
    return f"{sample.prompt}\nNegative prompt: {negative}\n{settings}"


def describe_inputs(inputs: SampleInputs) -> dict[str, object]:
    """What a sample began with, by names for its file: those of its files alone, without their folders."""
    facts: dict[str, object] = {}
    if inputs.strength is not None:
        facts["Denoising strength"] = format_scale(inputs.strength)
    for column, files in inputs.files.items():
        label = column.replace("_", " ").capitalize()
        facts[label] = ", ".join(file.name for file in files)
    return facts


def collect_input_facts(inputs: SampleInputs) -> dict[str, Any]:
    """What a sample began with, for the text chunk `int8run`; empty of a prompt alone."""
    facts: dict[str, Any] = {}
    if inputs.files:
        names, copies = {}, {}
        for column, files in inputs.files.items():
            names[column] = [file.name for file in files]
            # in the folder of the run, where the copies may have other names
            copies[column] = [file.path.name for file in files]
        facts["inputs"] = names
        facts["input_copies"] = copies
    if inputs.strength is not None:
        facts["strength"] = inputs.strength
    if inputs.arguments:
        facts["arguments"] = dict(inputs.arguments)
    return facts


def format_scale(scale: float | None) -> str | None:
    """A guidance scale without needless zeros; None for none."""
    return None if scale is None else f"{scale:g}"


def quote(value: object) -> str:
    """A value that other values may follow: one with a comma, a colon or a line break stands in quotes."""
    text = str(value)
    needs_quotes = any(character in text for character in ',:\n"')
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text


def describe_sampling(sampling: Sampling, scheduler: str) -> dict[str, Any]:
    """The settings as they were generated, for the text chunk `int8run`, which is JSON."""
    return {**asdict(sampling), "scheduler": scheduler}
