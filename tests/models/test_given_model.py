"""What a program hands over as its model: a denoiser, a wrapper around one, a pipeline."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from support.tiny_pipeline import random_pipeline
from torch import nn

from int8run.errors import ConfigError
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.given_model import take_denoiser, take_text_encoders, unwrap_text_encoders


class Expert(nn.Linear):
    """A denoiser of a pipeline with two."""


class TwoExperts(DiffusionPipeline):
    def __init__(self, transformer: Expert, transformer_2: Expert, text_encoder: Expert):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, text_encoder=text_encoder)


class Decoder(DiffusionPipeline):
    def __init__(self, decoder: Expert):
        super().__init__()
        self.register_modules(decoder=decoder)


def test_wrappers_are_taken_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager")
    assert take_denoiser(model, "x") is model
    assert take_denoiser(compiled, "x") is model
    assert take_denoiser(torch.compile(nn.DataParallel(model), backend="eager"), "x") is model


def test_module_with_a_child_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert take_denoiser(model, "x") is model


def test_pipeline_has_its_denoiser_and_text_encoders() -> None:
    pipe = random_pipeline()
    assert take_denoiser(pipe, "x") is pipe.transformer
    assert take_text_encoders(pipe) == {
        "text_encoder": pipe.text_encoder,
        "text_encoder_2": pipe.text_encoder_2,
    }
    assert take_text_encoders(pipe.transformer) == {}


def test_two_denoisers_are_taken_as_one() -> None:
    first, second, text = Expert(2, 2), Expert(2, 2), Expert(2, 2)
    pipe = TwoExperts(first, second, text)
    denoiser = take_denoiser(pipe, "x")
    assert isinstance(denoiser, DualDenoiser)
    assert dict(denoiser.named_children()) == {"transformer": first, "transformer_2": second}
    assert take_text_encoders(pipe) == {"text_encoder": text}


def test_text_encoders_are_modules_or_left_out() -> None:
    encoder = Expert(2, 2)
    given = {"text_encoder": torch.compile(encoder, backend="eager"), "text_encoder_2": None}
    assert unwrap_text_encoders(given) == {"text_encoder": encoder}
    with pytest.raises(ConfigError, match=r"^text_encoders has a str as text_encoder; it takes modules by"):
        unwrap_text_encoders({"text_encoder": "clip"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SimpleNamespace(), "quantize_ takes a denoiser, such as .*, or its pipeline, not a SimpleNamespace"),
        ("pipe", "quantize_ takes a denoiser, such as .*, or its pipeline, not a str"),
        (Decoder(Expert(2, 2)), f"Decoder has no {' or '.join(DENOISER_COMPONENTS)}; give the module that"),
    ],
)
def test_what_is_no_model_is_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_denoiser(given, "quantize_")
