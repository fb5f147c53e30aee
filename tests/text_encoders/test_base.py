"""The settings behind `clip=`: what goes together, and what is refused before anything is read."""

from typing import Any

import pytest
from support.parameter_ids import name_parameter
from torch import nn

from int8run.errors import ConfigError
from int8run.models.given_model import find_text_encoders
from int8run.quant.formats import FORMATS
from int8run.text_encoders.base import TextEncoders, list_kernel_backends


def test_is_quantized_unless_encoders_stay_as_they_are() -> None:
    assert not TextEncoders().is_quantized
    assert TextEncoders() == TextEncoders("keep", None, "auto", None)
    assert not TextEncoders("auto").is_quantized
    assert TextEncoders("auto", path="x").is_quantized
    assert TextEncoders("auto", path={"a": "x"}).is_quantized
    assert all(TextEncoders(name).is_quantized for name, form in FORMATS.items() if not form.is_read_only)
    assert all(TextEncoders(name, path="x").is_quantized for name in FORMATS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int3"}, r"^clip\.format is 'int3'; choose from auto, .*keep.*nvfp4"),
        (
            {"kernel_backend": "cuda"},
            r"^clip\.kernel_backend is 'cuda'; choose from auto, .*dequantize.*reference.*scaled_mm",
        ),
        (
            {"path": "x"},
            r"^clip=keep leaves the text encoders as they are, and clip\.path=x names another; set "
            r"clip=auto$",
        ),
        (
            {"format": "auto", "path": "x", "components": ["text_encoder"]},
            r"^clip\.components says which .* clip\.path names files; set one$",
        ),
        (
            {"format": "nvfp4_modelopt"},
            r"^clip=nvfp4_modelopt is a format that is read and not written; .*w6a8, or set clip\.path$",
        ),
        ({"format": "mxfp8_rows"}, r"^clip=mxfp8_rows is a format that is read"),
        (
            {"format": "nvfp4", "components": "vae"},
            r"^clip\.components is 'vae'; it takes a list, such as \[text_encoder_2\]; null: all$",
        ),
        ({"format": "nvfp4", "components": []}, r"^clip\.components is \[\]; it takes a list"),
        ({"format": "auto", "path": {}}, r"^clip\.path is \{\}; it takes a file, or a mapping"),
    ],
    ids=name_parameter,
)
def test_contradictory_settings_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextEncoders(**settings)


def test_error_does_not_suggest_read_only_formats() -> None:
    with pytest.raises(ConfigError) as found:
        TextEncoders("nvfp4_modelopt")
    assert "mxfp8_rows" not in str(found.value)
    assert str(found.value).count("nvfp4_modelopt") == 1


def test_kernel_backends_are_the_int8_ones_and_two_more() -> None:
    assert {"auto", "reference", "triton", "cpu", "dequantize", "scaled_mm"} <= set(list_kernel_backends())
    assert all(
        TextEncoders("nvfp4", kernel_backend=name).kernel_backend == name for name in list_kernel_backends()
    )


def test_text_encoders_are_modules_with_that_name() -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    parts = {
        "vae": a,
        "text_encoder": a,
        "text_encoder_3": b,
        "text_encoder_2": None,
        "tokenizer": object(),
        "transformer": b,
    }

    assert find_text_encoders(parts) == {"text_encoder": a, "text_encoder_3": b}
