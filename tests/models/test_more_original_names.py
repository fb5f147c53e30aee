"""Names of families whose authors' files only diffusers' scripts read: both ways, against those scripts."""

from math import prod

import pytest
import torch
from support.more_original_families import SCRIPTS
from torch import Tensor

from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.state_dict_adapter import to_model, to_original


def number_tensors(name: str) -> tuple[str, dict[str, Tensor]]:
    """The class of a model, and its state dict with another number in every place."""
    make = SCRIPTS[name][0]
    with torch.device("meta"):
        model = make()
    numbers, first = {}, 0
    for key, value in model.state_dict().items():
        numbers[key] = torch.arange(first, first + prod(value.shape), dtype=torch.int32).reshape(value.shape)
        first += prod(value.shape)
    return type(model).__name__, numbers


def get_shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def write_original(class_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their authors' names."""
    file = {}
    for key, parts in to_original(get_shapes(tensors), class_name).items():
        file[key] = torch.cat([part.extract(tensors[part.key]) for part in parts])
    return file


@pytest.mark.parametrize("name", SCRIPTS)
def test_diffusers_script_reads_written_files(name: str) -> None:
    class_name, tensors = number_tensors(name)

    converted = SCRIPTS[name][1].convert(write_original(class_name, tensors))

    assert converted.keys() == tensors.keys()
    assert [key for key in tensors if not torch.equal(converted[key], tensors[key])] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_original_file_becomes_the_model(name: str) -> None:
    class_name, tensors = number_tensors(name)
    file = write_original(class_name, tensors)

    found = to_model(get_shapes(file), get_shapes(tensors), class_name)

    assert (found.unused, found.missing) == ((), ())
    for key, parts in found.parts.items():
        made = torch.cat([part.extract(file[part.key]) for part in parts])
        assert torch.equal(made, tensors[key]), key


@pytest.mark.parametrize("name", ["hunyuan_video15", "hunyuan_image"])
def test_joined_query_key_value_of_hunyuan_is_read(name: str) -> None:
    class_name, tensors = number_tensors(name)
    file = write_original(class_name, tensors)
    prefix = "double_blocks.0.img_attn_"
    parts = [file.pop(f"{prefix}{letter}.weight") for letter in "qkv"]
    file[f"{prefix}qkv.weight"] = torch.cat(parts)

    found = to_model(get_shapes(file), get_shapes(tensors), class_name)

    assert (found.unused, found.missing) == ((), ())
    (part,) = found.parts["transformer_blocks.0.attn.to_k.weight"]
    assert torch.equal(part.extract(file[part.key]), tensors["transformer_blocks.0.attn.to_k.weight"])


FAMILY = {"hunyuan_image_distilled": "hunyuan_image", "joyimage_edit": "joyimage"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_file_is_detected_by_both_namings(name: str) -> None:
    class_name, tensors = number_tensors(name)
    families = load_families().values()

    for keys in (tensors, write_original(class_name, tensors)):
        found = detect_denoiser(keys, families, None)
        assert found is not None
        assert (found[0].name, found[1]) == (FAMILY.get(name, name), class_name)
