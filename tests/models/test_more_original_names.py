"""Names of families whose authors' files only diffusers' scripts read: both ways, against those scripts."""

import re
from math import prod

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_animate_2_transformer_to_diffusers
from families.instances_modular import wan_animate_2_transformer
from support.more_original_families import SCRIPTS
from torch import Tensor

from int8run.errors import ConfigError, FileError
from int8run.lora.module_names import NameTable
from int8run.lora.row_slices import ModuleTarget
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.original_names import to_original
from int8run.models.state_dict_adapter import to_model


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


UP, GATE = (f"double_blocks.0.img_mlp.{name}_proj.weight" for name in ("up", "gate"))
WAN_ANIMATE_2 = "WanAnimate2Transformer3DModel"
JOINED = "transformer_blocks.0.ff.net.0.proj"


def test_half_of_a_module_alone_is_missing() -> None:
    class_name, tensors = number_tensors("ovis_image")
    file = write_original(class_name, tensors)
    del file[UP]

    found = to_model(get_shapes(file), get_shapes(tensors), class_name)

    assert (found.unused, found.missing) == ((), (f"{JOINED}.weight",))


def test_half_of_a_module_beside_the_whole_is_held_twice() -> None:
    class_name, tensors = number_tensors("ovis_image")
    file = write_original(class_name, tensors)
    del file[UP]
    file[f"{JOINED}.weight"] = tensors[f"{JOINED}.weight"]

    with pytest.raises(FileError, match=rf"holds {JOINED}\.weight of the {class_name} twice: as "):
        to_model(get_shapes(file), get_shapes(tensors), class_name)


def test_half_of_a_module_of_another_size_is_refused() -> None:
    class_name, tensors = number_tensors("ovis_image")
    file = write_original(class_name, tensors)
    file[GATE] = torch.cat([file[GATE], file[GATE]])

    with pytest.raises(
        FileError, match=rf"{GATE} of the file has the shape \[512, 64\], .* need \[256, 64\]"
    ):
        to_model(get_shapes(file), get_shapes(tensors), class_name)


def test_module_that_has_no_halves_is_not_written_as_two() -> None:
    class_name, tensors = number_tensors("ovis_image")
    shapes = get_shapes(tensors)
    shapes[f"{JOINED}.weight"] = (511, 64)

    with pytest.raises(ConfigError, match=r"net\.0\.proj\.weight \[511, 64\] cannot be 2 tensors: "):
        to_original(shapes, class_name)


def test_half_of_a_module_that_would_be_called_like_another_is_refused() -> None:
    class_name, tensors = number_tensors("ovis_image")
    shapes = get_shapes(tensors) | {GATE: (256, 64)}

    for order in (shapes, dict(reversed(shapes.items()))):
        with pytest.raises(ConfigError, match=rf"this {class_name} would both be called {GATE}: "):
            to_original(order, class_name)


def test_change_of_half_a_module_is_placed_in_its_rows() -> None:
    with torch.device("meta"):
        table = NameTable.from_model(SCRIPTS["ovis_image"][0]())

    found = [table.find_targets(f"double_blocks.0.img_mlp.{name}_proj") for name in ("up", "gate")]

    assert found == [
        (ModuleTarget(JOINED, start=0, total=512),),
        (ModuleTarget(JOINED, start=256, total=512),),
    ]


@pytest.mark.parametrize("level", ["", "block."], ids=["ComfyUI", "Alibaba"])
def test_wan_animate_2_is_read_as_diffusers_reads_it(level: str) -> None:
    with torch.device("meta"):
        shapes = get_shapes(wan_animate_2_transformer().state_dict())
    # each key, and the parameter that it is
    file = {}
    for key, (part,) in to_original(shapes, WAN_ANIMATE_2).items():
        file[re.sub(r"^(blocks\.\d+\.)", rf"\1{level}", key)] = part.key

    found = to_model({key: shapes[name] for key, name in file.items()}, shapes, WAN_ANIMATE_2)
    ours = {name: file[part.key] for name, (part,) in found.parts.items()}

    assert (found.unused, found.missing) == ((), ())
    assert ours == convert_wan_animate_2_transformer_to_diffusers(dict(file)) == {n: n for n in shapes}


FAMILY = {"hunyuan_image_distilled": "hunyuan_image", "joyimage_edit": "joyimage"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_file_is_detected_by_both_namings(name: str) -> None:
    class_name, tensors = number_tensors(name)
    families = load_families().values()

    for keys in (tensors, write_original(class_name, tensors)):
        found = detect_denoiser(keys, families, None)
        assert found is not None
        assert (found[0].name, found[1]) == (FAMILY.get(name, name), class_name)
