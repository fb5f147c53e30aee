"""Files of other programs as the model: every number format, mixtures, LoRAs; and files of other models."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families.cases import (
    FAMILIES,
    INSTANCES,
    Case,
    Tensors,
    assert_same_tensors,
    collect_contents,
    collect_float_weights,
    find_int8_layers,
    make_case,
    make_lora,
    make_original_state,
    map_original_linears,
    read_file,
    round_rows,
    write_file,
)
from support.rotation import GROUP, make_hadamard, rotate_groups
from support.tiers import slow_except
from torch import Tensor, nn

from int8run.errors import ConfigError, FileError
from int8run.lora.config import Adapter
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.checkpoint_weights import FileWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Foreign:
    """A weight as another program writes it.

    Args:
        tensors: what stands in the file for it, by suffix.
        real: the weight that it stands for, float32 [N, K].
        codes, scale: int8 [N, K] and float32 [N, 1], where they can be taken as they are.
    """

    tensors: Tensors
    real: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None


def encode_text(**fields: object) -> Tensor:
    """A marker."""
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def fp8_native(weight: Tensor) -> Foreign:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return Foreign(
        {"weight": codes, "weight_scale": scale, "comfy_quant": encode_text(format="float8_e4m3fn")},
        codes.float() * scale,
    )


def fp8_legacy(weight: Tensor) -> Foreign:
    scale = weight.abs().max()[None] / 57344
    codes = (weight / scale).to(torch.float8_e5m2)
    return Foreign(
        {"weight": codes, "scale_weight": scale, "scale_input": torch.ones(1)}, codes.float() * scale
    )


def fp8_rows(weight: Tensor) -> Foreign:
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return Foreign({"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None])


def fp8_cast(weight: Tensor) -> Foreign:
    codes = weight.to(torch.float8_e4m3fn)
    return Foreign({"weight": codes}, codes.float())


def int8_grid(weight: Tensor, block: int = 16) -> Foreign:
    n, k = weight.shape
    scale = weight.view(n // block, block, k // block, block).abs().amax((1, 3)) / 127
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    codes = (weight / wide).round().to(torch.int8)
    marker = encode_text(format="int8_blockwise", group_size=block)
    return Foreign({"weight": codes, "weight_scale": scale, "comfy_quant": marker}, codes.float() * wide)


def int8_block3d(weight: Tensor, block: int = 16) -> Foreign:
    n, k = weight.shape
    scale = weight.view(n, k // block, block).abs().amax(2, keepdim=True) / 127
    wide = scale[..., 0].repeat_interleave(block, 1)
    codes = (weight / wide).round().to(torch.int8)
    return Foreign({"weight": codes, "scale": scale}, codes.float() * wide)


def lightx2v(weight: Tensor) -> Foreign:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return Foreign({"weight": codes, "weight_scale": scale}, codes * scale.float(), codes, scale.float())


def lightx2v_comfy(weight: Tensor) -> Foreign:
    scale = weight.abs().max() / 127
    codes = (weight / scale).round().to(torch.int8)
    return Foreign(
        {"weight": codes, "scale_weight": scale}, codes * scale, codes, scale.expand(len(weight), 1)
    )


def rotate_and_round(weight: Tensor, **marker: object) -> Foreign:
    """Rows of the rotated weight, and what they stand for: rotated back."""
    codes, scale = round_rows(rotate_groups(weight))
    real = ((codes * scale).view(len(weight), -1, GROUP) @ make_hadamard()).view_as(weight)
    return Foreign(
        {"weight": codes, "weight_scale": scale, "comfy_quant": encode_text(**marker)}, real, codes, scale
    )


def pre_native(weight: Tensor) -> Foreign:
    return rotate_and_round(weight, convrot=True, convrot_groupsize=16, per_row=True)


def first_node(weight: Tensor) -> Foreign:
    return rotate_and_round(weight, quarot=True, quarot_groupsize=16)


MARK = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
BARE, FULL = "", "model.diffusion_model."
# how a weight is written, the prefix of all keys, what else is in the file, what the log says of the kind
PROGRAMS = {
    "fp8 scaled": (fp8_native, BARE, {}, "float8_e4m3fn scaled, tensor"),
    "fp8 scaled, legacy": (fp8_legacy, FULL, MARK, "float8_e5m2 scaled, tensor"),
    "fp8 by rows": (fp8_rows, BARE, {}, "float8_e4m3fn scaled, row"),
    "fp8 cast": (fp8_cast, FULL, {}, "float8_e4m3fn cast"),
    "int8 in square blocks": (int8_grid, BARE, {}, "int8_blockwise, grid 16"),
    "Wan-INT8": (int8_block3d, BARE, {}, "int8, block3d 16"),
    "lightx2v": (lightx2v, BARE, {}, ""),
    "lightx2v for ComfyUI": (lightx2v_comfy, FULL, MARK, ""),
    "INT8-Fast": (pre_native, FULL, {}, ""),
    "INT8-Fast's first": (first_node, FULL, {}, ""),
}


@pytest.fixture(scope="module", params=slow_except(["flux"], ["flux", "wan"]))
def named_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A family whose authors keep q, k and v in one layer, and one whose authors do not."""
    with pytest.MonkeyPatch.context() as patch:
        yield make_case(request.param, tmp_path_factory.mktemp(request.param), patch)


def write_foreign_file(
    case: Case, how: Callable[[Tensor], Foreign], prefix: str, others: Tensors, path: Path
) -> dict[str, Foreign]:
    """Write the denoiser so, with every layer of its blocks and the last modulation quantized.

    Returns:
        What each Linear of the model has to become.
    """
    file, found = make_original_state(case.denoiser, ""), {}
    for name, parts in map_original_linears(case.denoiser).items():
        weight = file[f"{name}.weight"]
        if not re.search(r"blocks|final_layer\.adaLN", name) or weight.shape[0] % 16:
            continue
        written = how(weight)
        del file[f"{name}.weight"]
        file |= {f"{name}.{suffix}": value for suffix, value in written.tensors.items()}
        first = 0
        for part in parts:
            last = first + case.denoiser.get_submodule(part.key).out_features
            turn = (last - first) // 2 if part.swap_halves else 0
            rows = [t if t is None else t[first:last].roll(turn, 0) for t in (written.codes, written.scale)]
            found[part.key] = Foreign({}, written.real[first:last].roll(turn, 0), *rows)
            first = last
    write_file({prefix + key: value.contiguous() for key, value in (file | others).items()}, path)
    return found


def check_contents(case: Case, built: BuiltModel, expected: Mapping[str, Foreign]) -> None:
    """Check that integers are kept where possible, all else is rounded where it is INT8."""
    held, layers, floats = collect_contents(built), find_int8_layers(built), collect_float_weights(case)
    family = FAMILIES[case.name]
    for name, foreign in expected.items():
        if foreign.codes is not None and foreign.scale is not None:
            assert torch.equal(held[f"{name}.q"], foreign.codes)
            assert torch.equal(held[f"{name}.scale"], foreign.scale)
            layer = layers[name]
            torch.testing.assert_close(
                layer.transform.restore_weight(layer.read_quantized_weight().dequantize()), foreign.real
            )
        elif family.find_skip_reason(name) is None:
            q, scale = round_rows(foreign.real)
            assert torch.equal(held[f"{name}.q"], q)
            assert torch.equal(held[f"{name}.scale"], scale)
        else:
            assert torch.equal(held[f"{name}.weight"], foreign.real)
    assert len(expected) > 15
    assert set(layers) == {
        n for n, f in expected.items() if f.codes is not None or family.find_skip_reason(n) is None
    }
    same = [name for name in floats if name.removesuffix(".weight") not in expected]
    assert_same_tensors({name: held[name] for name in same}, {name: floats[name] for name in same})


@pytest.mark.parametrize("kind", PROGRAMS)
def test_file_of_another_program_becomes_the_model(
    named_case: Case, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    how, prefix, others, said = PROGRAMS[kind]
    path = named_case.home / f"{kind}.safetensors"
    expected = write_foreign_file(named_case, how, prefix, others, path)

    with caplog.at_level("INFO"):
        built = named_case.build(path)

    check_contents(named_case, built, expected)
    assert named_case.generate_latents(built).isfinite().all()
    if said:
        layers = {
            key
            for key, value in read_file(path).items()
            if value.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
        }
        assert f"{len(layers - {'model.diffusion_model.scaled_fp8'})} × {said}" in caplog.text
    else:
        assert f"{len(expected)} INT8 layers come from {path}" in caplog.text

    # from file to file it becomes the same
    named_case.quantize(path, named_case.home / "new.safetensors")

    assert_same_tensors(
        collect_contents(named_case.build(named_case.home / "new.safetensors")), collect_contents(built)
    )


def test_file_of_mixed_formats_becomes_the_model(named_case: Case) -> None:
    """Every second layer can be taken as it is."""
    path, turns = named_case.home / "mixed.safetensors", itertools.count()

    def either(weight: Tensor) -> Foreign:
        return (
            fp8_native(weight)
            if next(turns) % 2
            else rotate_and_round(weight, format="int8_tensorwise", convrot=True, convrot_groupsize=16)
        )

    expected = write_foreign_file(named_case, either, BARE, {}, path)
    built = named_case.build(path)

    check_contents(named_case, built, expected)
    assert {name for name, layer in find_int8_layers(built).items() if layer.transform.method == "none"} == {
        name
        for name, foreign in expected.items()
        if foreign.codes is None and FAMILIES[named_case.name].find_skip_reason(name) is None
    }


def test_baking_a_lora_into_integers_is_an_error(named_case: Case) -> None:
    lora = make_lora(named_case.denoiser, named_case.name).save_with_original_names(
        named_case.home / "lora.safetensors"
    )
    saved = named_case.get_saved("file")

    with pytest.raises(ConfigError, match=r"dynamic.*stochastic"):
        named_case.build(saved.location, loras=[Adapter("a", str(lora))], mode="bake")

    beside = named_case.build(saved.location, loras=[Adapter("a", str(lora))])

    assert beside.loras.layers_by_mode == {"dynamic": len(find_int8_layers(beside))}
    assert not torch.equal(named_case.generate_latents(beside), saved.latents)


def test_lora_is_baked_into_dequantized_layers(named_case: Case) -> None:
    path, changes = named_case.home / "fp8.safetensors", make_lora(named_case.denoiser, named_case.name)
    expected = write_foreign_file(named_case, fp8_native, BARE, {}, path)
    built = named_case.build(
        path,
        loras=[Adapter("a", str(changes.save_with_original_names(named_case.home / "lora.safetensors")))],
        mode="bake",
    )

    held = collect_contents(built)

    for name in find_int8_layers(built):
        weight = expected[name].real + changes.change(name)
        error = (held[f"{name}.q"] * held[f"{name}.scale"] - weight).abs()
        assert (error <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()


# the wrong file

STRANGERS = ["flux", "chroma", "z_image", "lumina2", "wan", "ltx", "sd3", "sd15", "sdxl"]


@pytest.fixture(scope="module")
def stranger_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Denoisers, and files with their float weights that are all called the same."""
    found = {}
    for name in STRANGERS:
        pipe = INSTANCES[name].build()
        model = next(
            pipe.components[c] for c in DENOISER_COMPONENTS if isinstance(pipe.components.get(c), nn.Module)
        )
        found[name] = (
            model,
            write_file(make_original_state(model), tmp_path_factory.mktemp("stranger") / "x.safetensors"),
        )
    return found


@pytest.mark.parametrize("name", STRANGERS)
def test_file_of_another_family_is_an_error_that_names_it(
    stranger_files: dict[str, tuple[nn.Module, Path]], name: str
) -> None:
    for other in STRANGERS:
        if other != name:
            with pytest.raises(FileError) as refused:
                FileWeights(stranger_files[other][1], stranger_files[name][0])
            words, wanted = (
                str(refused.value).replace(str(stranger_files[other][1]), ""),
                type(stranger_files[name][0]).__name__,
            )
            assert wanted in words
            if type(stranger_files[other][0]).__name__ != wanted:  # of one class only the sizes differ
                assert re.search(
                    rf"are those of a {type(stranger_files[other][0]).__name__} \({other}\)", words
                )
