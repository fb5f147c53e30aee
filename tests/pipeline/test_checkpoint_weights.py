"""A checkpoint by the names of a model's parameters: whatever it calls them, wherever its rows lie, however
they are stored.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import CPU, randn
from support.tiny_pipeline import random_pipeline
from torch import Tensor, nn

from int8run.errors import FileError
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.original_names import to_original
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.utils.paths import ASSETS_FOLDER

PLAIN = {"format": "int8_tensorwise", "per_row": True}
QKV = "double_blocks.0.img_attn.qkv"
ATTENTION = "transformer_blocks.0.attn."


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_pipeline().transformer.requires_grad_(False)


def native(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The model's weights by its authors' names."""
    state = model.state_dict()
    names = to_original({k: tuple(t.shape) for k, t in state.items()}, type(model).__name__)
    return {
        prefix + key: torch.cat([part.extract(state[part.key]) for part in parts]).contiguous()
        for key, parts in names.items()
    }


def to_int8(
    tensors: dict[str, Tensor], name: str, marker: dict[str, object] = PLAIN, per: str = "row"
) -> Tensor:
    """Replace a weight by integers, a scale and a marker; the float numbers that they mean come back."""
    weight = tensors[f"{name}.weight"]
    scale = (weight.abs().amax(1, keepdim=True) if per == "row" else weight.abs().amax()) / 127
    codes = (weight / scale).round().to(torch.int8)
    text = json.dumps(marker).encode()
    tensors |= {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
    }
    return codes * scale


def opened(tensors: dict[str, Tensor], path: Path, model: nn.Module, is_partial: bool = False) -> FileWeights:
    save_file(tensors, path)
    return FileWeights(path, model, is_partial=is_partial)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_parameter_is_found_under_the_authors_names(
    prefix: str, model: nn.Module, tmp_path: Path
) -> None:
    file = opened(native(model, prefix), tmp_path / "m.safetensors", model)
    assert QKV + ".weight" in {key.removeprefix(prefix) for key in file.files}
    assert file.path == tmp_path / "m.safetensors" and file.prefix == prefix
    for name, tensor in model.state_dict().items():
        assert torch.equal(file.read_tensor(name), tensor), name
    assert file.find_int8_layers() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_come_in_the_files_own_dtype(dtype: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
    file = opened({k: t.to(dtype) for k, t in native(model).items()}, tmp_path / "m.safetensors", model)
    assert (
        file.read_tensor("proj_out.weight").dtype == dtype
        and file.read_tensor(ATTENTION + "to_k.weight").dtype == dtype
    )


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_a_fused_int8_layer_is_split_with_its_scales(per: str, model: nn.Module, tmp_path: Path) -> None:
    tensors = native(model)
    meant = to_int8(tensors, QKV, PLAIN if per == "row" else {"format": "int8_tensorwise"}, per)
    file = opened(tensors, tmp_path / "m.safetensors", model)
    names = [ATTENTION + name for name in ("to_q", "to_k", "to_v")]
    assert set(file.find_int8_layers()) == set(names)
    for name, expected in zip(names, meant.split(32), strict=True):
        layer = file.read_int8_layer(name)
        assert (
            layer.bias is None
            and layer.weight.scale.shape == (32, 1)
            and layer.weight.qdata.dtype == torch.int8
        )
        torch.testing.assert_close(layer.weight.dequantize(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(file.read_tensor(f"{name}.weight"), expected, rtol=1e-6, atol=0)
        assert torch.equal(file.read_tensor(f"{name}.bias"), model.get_submodule(name).bias)


def test_swapped_halves_take_their_scales_along(model: nn.Module, tmp_path: Path) -> None:
    tensors = native(model)
    meant = to_int8(
        tensors, "final_layer.adaLN_modulation.1"
    )  # shift and scale, which diffusers has the other way round
    layer = opened(tensors, tmp_path / "m.safetensors", model).read_int8_layer("norm_out.linear")
    half = len(meant) // 2
    torch.testing.assert_close(
        layer.weight.dequantize(), torch.cat([meant[half:], meant[:half]]), rtol=1e-6, atol=0
    )
    assert layer.weight.dequantize().sub(model.norm_out.linear.weight).abs().max() < 0.01


def test_parts_that_were_treated_differently_are_no_layer(tmp_path: Path) -> None:
    # nobody writes such a file: one Linear of diffusers that is two in the file, one of them rotated
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(16, 8, bias=False)

    tensors = {"a.weight": randn(4, 16), "b.weight": randn(4, 16, seed=1)}
    to_int8(tensors, "a")
    to_int8(
        tensors, "b", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "per_row": True}
    )
    file = opened(tensors, tmp_path / "m.safetensors", Two(), is_partial=True)
    from dataclasses import replace

    from int8run.models.tensor_part import TensorPart

    file.layout = replace(
        file.layout, parts={"both.weight": (TensorPart("a.weight"), TensorPart("b.weight"))}
    )
    assert set(file.find_int8_layers()) == {"both"}
    with pytest.raises(
        FileError,
        match=(
            r"m\.safetensors: the parts of both were transformed "
            r"differently \(none, convrot group_size=16\)$"
        ),
    ):
        file.read_int8_layer("both")
    file.layout = replace(
        file.layout, parts={"both.weight": (TensorPart("a.weight"), TensorPart("a.weight"))}
    )
    assert file.read_int8_layer("both").weight.qdata.shape == (8, 16) and file.read_tensor(
        "both.weight"
    ).shape == (8, 16)


def test_a_lora_or_a_text_encoder_as_the_model_is_named(model: nn.Module, tmp_path: Path) -> None:
    lora = {f"transformer.{ATTENTION}to_q.lora_{part}.weight": randn(32, 32) for part in "AB"}
    with pytest.raises(
        FileError, match=r"It is a LoRA: lora=file lora\.adapters\.0\.path=/.*m\.safetensors$"
    ):
        opened(lora, tmp_path / "m.safetensors", model)
    encoder = load_file(ASSETS_FOLDER / "tiny" / "text_encoder_2" / "model.safetensors")
    with pytest.raises(FileError, match=r"It is a text encoder: clip=auto clip\.path=/.*m\.safetensors$"):
        opened(encoder, tmp_path / "m.safetensors", model)


def test_a_file_for_another_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    tensors = native(model)
    del tensors[QKV + ".weight"]
    message = (
        rf"m\.safetensors does not hold 3 of the \d+ tensors of "
        rf"FluxTransformer2DModel \(first: {ATTENTION}to_[qkv]\.weight\); it is for"
    )
    with pytest.raises(FileError, match=message):
        opened(tensors, tmp_path / "m.safetensors", model)
    assert (
        ATTENTION + "to_q.weight"
        in opened(tensors, tmp_path / "m.safetensors", model, is_partial=True).layout.missing
    )
    wide = native(model) | {"img_in.weight": randn(32, 9)}
    with pytest.raises(FileError, match=r"img_in\.weight of the file has the shape \[32, 9\]"):
        opened(wide, tmp_path / "m.safetensors", model)


def test_tensors_without_a_place_are_said_once(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(native(model), tmp_path / "m.safetensors", model)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        opened(
            native(model) | {"mine.weight": randn(2), "mine.bias": randn(2)},
            tmp_path / "m.safetensors",
            model,
        )
    (said,) = caplog.records
    assert said.getMessage().endswith(
        "m.safetensors: 2 tensors have no place in FluxTransformer2DModel, not used (first: mine.bias)"
    ) or (said.getMessage().endswith("(first: mine.weight)"))


# -- several denoisers ---------------------------------------------------------------------------------------


def test_each_expert_has_its_own_file(model: nn.Module, tmp_path: Path) -> None:
    other = random_pipeline(seed=1).transformer
    one, two = native(model), native(other)
    meant = to_int8(two, QKV)
    files = {
        "transformer.": opened(one, tmp_path / "1.safetensors", model),
        "transformer_2.": opened(two, tmp_path / "2.safetensors", other),
    }
    both = DenoiserWeights(files)
    assert torch.equal(both.read_tensor("transformer.proj_out.weight"), model.proj_out.weight)
    assert torch.equal(both.read_tensor("transformer_2.proj_out.weight"), other.proj_out.weight)
    assert set(both.find_int8_layers()) == {
        f"transformer_2.{ATTENTION}{name}" for name in ("to_q", "to_k", "to_v")
    }
    torch.testing.assert_close(
        both.read_int8_layer(f"transformer_2.{ATTENTION}to_k").weight.dequantize(),
        meant[32:64],
        rtol=1e-6,
        atol=0,
    )
    assert (
        both.paths == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
        and both.read_provenance() == {}
    )
    empty = DualDenoiser(
        {
            "transformer": random_pipeline().transformer.to("meta"),
            "transformer_2": random_pipeline().transformer.to("meta"),
        }
    )
    names = [
        f"{part}.{name}"
        for part in ("transformer", "transformer_2")
        for name in model.state_dict()
        if QKV not in name
    ]
    both.fill_parameters(empty, names, CPU)
    assert not any(p.is_meta or p.requires_grad for p in empty.parameters())
    assert torch.equal(empty.transformer_2.proj_out.weight, other.proj_out.weight)


def test_filling_takes_the_models_dtype(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 3, dtype=torch.bfloat16, device="meta")
            self.register_buffer("count", torch.empty((), dtype=torch.int64, device="meta"))
            self.register_buffer("table", torch.empty(2, dtype=torch.float16, device="meta"))

    held = {"a.weight": randn(3, 2), "a.bias": randn(3), "count": torch.tensor(7), "table": randn(2)}
    made = Small()
    DenoiserWeights({"": opened(held, tmp_path / "m.safetensors", made)}).fill_parameters(made, held, CPU)
    for name, tensor in made.state_dict().items():
        wanted = {"count": torch.int64, "table": torch.float16}.get(name, torch.bfloat16)
        assert tensor.dtype == wanted and torch.equal(tensor, held[name].to(wanted))
    assert isinstance(made.a.weight, nn.Parameter) and "count" in dict(made.named_buffers())


def test_a_float_tensor_that_is_not_finite_is_named(tmp_path):
    model = random_pipeline().transformer
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["x_embedder.weight"][1, 2] = float("inf")
    save_file(state, tmp_path / "m.safetensors")
    weights = DenoiserWeights({"": FileWeights(tmp_path / "m.safetensors", model)})
    with pytest.raises(
        FileError, match=r"m\.safetensors: x_embedder\.weight holds NaN or infinity; the file is damaged"
    ):
        weights.fill_parameters(model, ["x_embedder.bias", "x_embedder.weight"], torch.device("cpu"))


NOT_FLOAT = [torch.bool, torch.int8, torch.int16, torch.int64, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", NOT_FLOAT, ids=str)
def test_bias_that_is_no_float_is_refused_by_name(
    dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    tensors = native(model)
    tensors["img_in.bias"] = torch.ones_like(tensors["img_in.bias"]).to(dtype)
    with pytest.raises(FileError, match=r"m.safetensors: img_in.bias is \w+(; allowed are F32| and not)"):
        opened(tensors, tmp_path / "m.safetensors", model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
def test_bias_of_any_float_is_read(dtype: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
    tensors = native(model)
    tensors["img_in.bias"] = tensors["img_in.bias"].to(dtype)
    weights = DenoiserWeights({"": opened(tensors, tmp_path / "m.safetensors", model)})
    target = random_pipeline().transformer
    weights.fill_parameters(target, ["x_embedder.bias"], CPU)
    assert torch.equal(target.x_embedder.bias, tensors["img_in.bias"].float())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1e6, r"x_embedder.bias holds numbers up to 1e\+06, too large for float16"),
        (math.inf, "holds NaN or inf"),
    ],
)
def test_number_that_the_models_dtype_cannot_hold_is_refused(
    value: float, words: str, model: nn.Module, tmp_path: Path
) -> None:
    tensors = native(model)
    tensors["img_in.bias"][0] = value
    weights = DenoiserWeights({"": opened(tensors, tmp_path / "m.safetensors", model)})
    target = random_pipeline().transformer.half()
    with pytest.raises(FileError, match=words):
        weights.fill_parameters(target, ["x_embedder.bias"], CPU)
