"""The text about an image, read back as the programs do that it is for."""

import json
import re
from dataclasses import replace

import pytest

from int8run.generate.image_parameters import SAMPLER_NAMES, format_parameters
from int8run.generate.negative_prompts import Guidance
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling

SAMPLING = Sampling(steps=4, guidance=3.5, width=96, height=64, extra={"negative_prompt": "blurry, dark"})


def format_sample(prompt: str, sampling: Sampling = SAMPLING, **details: object) -> str:
    return format_parameters(
        Sample(prompt, 7, "key"), sampling, scheduler="EulerDiscreteScheduler", model="tiny", details=details
    )


def read_as_web_ui(text: str) -> tuple[str, str, dict[str, str]]:
    """The prompt, the negative prompt and the settings, as the web UI takes them apart.

    The last line holds names and values, of which one in quotes is JSON; the negative prompt begins with its
    own line.
    """
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    return prompt, negative.strip(), settings


def read_as_comfyui(text: str) -> tuple[str, str, dict[str, str]]:
    """The same, from the ends of the text: ComfyUI looks for the last `Steps:` and `Negative prompt:`."""
    steps = text.rindex("\nSteps:")
    negative = text.rindex("\nNegative prompt:", 0, steps)
    last = text[steps:].split("\n")[1]
    pairs = re.findall(r'\s*([^:]+):\s*([^"{].*?|".*?"|\{.*?\})\s*(?:,|$)', last)
    return text[:negative].strip(), text[negative + 18 : steps].strip(), dict(pairs)


@pytest.mark.parametrize("prompt", ["fox", "a (red:1.2) fox, 4k", "two\nlines", "рыжая лиса", 'say "hi"'])
def test_prompt_and_settings_come_back(prompt: str) -> None:
    text = format_sample(prompt, Precision="INT8", LoRAs="ink: 1, gloss: 0.5")

    expected = {
        "Steps": "4",
        "Sampler": "Euler",
        "CFG scale": "3.5",
        "Seed": "7",
        "Size": "96x64",
        "Model": "tiny",
        "Precision": "INT8",
        "LoRAs": "ink: 1, gloss: 0.5",
    }
    assert read_as_web_ui(text) == (prompt, "blurry, dark", expected)
    comfy_prompt, negative, settings = read_as_comfyui(text)
    assert (comfy_prompt, negative) == (prompt, "blurry, dark")
    assert {name: settings[name] for name in ("Seed", "Size", "CFG scale")} == {
        "Seed": "7",
        "Size": "96x64",
        "CFG scale": "3.5",
    }


def test_the_line_of_the_negative_prompt_is_there_without_one() -> None:
    assert read_as_comfyui(format_sample("fox", Sampling(steps=1)))[:2] == ("fox", "")


def test_the_guidance_of_a_distilled_model_has_its_own_name() -> None:
    text = format_parameters(
        Sample("fox", 7, "key"),
        SAMPLING,
        scheduler="EulerDiscreteScheduler",
        model="tiny",
        details={},
        guidance=Guidance("sampler.extra.true_cfg_scale", 4.0, distilled_scale=3.5),
    )

    _, negative, settings = read_as_web_ui(text)
    assert negative == "blurry, dark"
    assert (settings["CFG scale"], settings["Distilled CFG Scale"]) == ("4", "3.5")


def test_a_negative_prompt_without_effect_is_left_out() -> None:
    text = format_sample("fox", replace(SAMPLING, guidance=1.0))

    assert read_as_web_ui(text)[1] == read_as_comfyui(text)[1] == ""


def test_what_is_not_known_is_left_out() -> None:
    settings = read_as_web_ui(format_sample("fox", Sampling(steps=1), Outlier=None))[2]

    assert not {"CFG scale", "Outlier"} & set(settings)


def test_samplers_are_those_of_diffusers() -> None:
    import diffusers

    assert [name for name in SAMPLER_NAMES if not hasattr(diffusers, name)] == []


def test_a_scheduler_without_another_name_keeps_its_own() -> None:
    text = format_parameters(Sample("a", 0, "k"), SAMPLING, scheduler="MyScheduler", model="m", details={})

    assert read_as_web_ui(text)[2]["Sampler"] == "MyScheduler"
