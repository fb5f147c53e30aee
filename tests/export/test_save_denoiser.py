"""Writing a denoiser: both layouts hold what the model computes, read by nothing but safetensors and the
published formulas.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.helpers import randn, shipped, to_int8
from support.tiny_pipeline import random_pipeline
from torch import nn

from int8run.checkpoints.data_hash import DATA_HASH, check_data
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.export.save_denoiser import keep_own_names, save_denoiser, write_tensors
from int8run.layers.int8_linear import Int8Linear
from int8run.models.tensor_part import TensorPart
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant

pytestmark = pytest.mark.usefixtures("one_thread")
FLUX = shipped("model_type")["flux"]
KEPT = tuple(
    n
    for n, m in random_pipeline().transformer.named_modules()
    if isinstance(m, nn.Linear) and FLUX.find_skip_reason(n)
)


def made(outlier: OutlierMethod | None = None, **options: Any) -> tuple[nn.Module, dict[str, Int8Linear]]:
    """The float model, and its INT8 layers."""
    model = random_pipeline().transformer.eval().requires_grad_(False)
    int8, _ = to_int8(model, outlier=outlier, keep_float=KEPT, **options)
    return model, {name: m for name, m in int8.named_modules() if isinstance(m, Int8Linear)}


def seen(model: nn.Module) -> dict[str, LayerStatistics]:
    """Activations for methods that look at them, other ones for each layer."""
    found = {}
    for number, (name, linear) in enumerate(
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)
    ):
        sample = randn(2, 8, linear.in_features, seed=number)
        found[name] = LayerStatistics(sample, sample.abs().amax((0, 1)), linear.weight.abs().amax(0))
    return found


# -- a reader of our own -------------------------------------------------------------------------------------


def hadamard(size: int, sylvester: bool) -> np.ndarray:
    """The matrix of the formats' descriptions: Kronecker powers of a 4x4 block (regular) or of [[1, 1], [1,
    -1]].
    """
    block = (
        np.array([[1, 1], [1, -1]])
        if sylvester
        else np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    )
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, block)
    return matrix / size**0.5


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Every weight as the float64 numbers that it stands for, and the markers."""
    with safe_open(path, "np") as file:
        raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    markers = {
        key.removesuffix(".comfy_quant"): json.loads(raw.pop(key).tobytes())
        for key in list(raw)
        if key.endswith(".comfy_quant")
    }
    for name, marker in markers.items():
        codes, scale = raw[f"{name}.weight"], raw.pop(f"{name}.weight_scale")
        assert (
            codes.dtype == np.int8
            and scale.dtype == np.float32
            and scale.shape == (len(codes), 1)
            and codes.min() >= -127
        )
        weight = codes.astype(np.float64) * scale
        size = marker.get("convrot_groupsize") if marker.get("convrot") else marker.get("group_size")
        if size:
            grouped = (
                weight.reshape(len(weight), -1, size)
                @ hadamard(size, marker.get("rotation") == "sylvester").T
            )
            weight = grouped.reshape(weight.shape)
        if (factor := raw.pop(f"{name}.pre_quant_scale", None)) is not None:
            weight = weight * factor
        raw[f"{name}.weight"] = weight
    return raw, markers


def by_hand(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FLUX's own names for some parameters, joined and turned by hand."""

    def split(key, *sizes):
        return np.split(tensors[key], np.cumsum(sizes)[:-1])

    block, single = "transformer_blocks.1", "single_transformer_blocks.0"
    q, k, v = split("double_blocks.1.img_attn.qkv.weight", 32, 32, 32)
    one, two, three, mlp = split("single_blocks.0.linear1.weight", 32, 32, 32, 128)
    shift, scale = split("final_layer.adaLN_modulation.1.weight", 32, 32)
    return {
        f"{block}.attn.to_q": q,
        f"{block}.attn.to_k": k,
        f"{block}.attn.to_v": v,
        f"{single}.attn.to_q": one,
        f"{single}.attn.to_k": two,
        f"{single}.attn.to_v": three,
        f"{single}.proj_mlp": mlp,
        f"{block}.ff.net.2": tensors["double_blocks.1.img_mlp.2.weight"],
        "norm_out.linear": np.concatenate([scale, shift]),
        "x_embedder": tensors["img_in.weight"],
        f"{single}.proj_out": tensors["single_blocks.0.linear2.weight"],
    }


@pytest.mark.parametrize(
    "method",
    [NoOutlier(), ConvRot(16), ConvRot(4), QuaRot(16)],
    ids=["none", "convrot16", "convrot4", "quarot"],
)
def test_a_native_file_means_the_models_weights(method: OutlierMethod, tmp_path: Path) -> None:
    model, layers = made(method)
    path = save_denoiser(str(tmp_path / "m.safetensors"), model, layers, {"a": 1}, {})
    tensors, markers = read(path)
    for name, weight in by_hand(tensors).items():
        expected = model.get_submodule(name).weight.double().numpy()
        error = np.sqrt(((weight - expected) ** 2).mean() / (expected**2).mean())
        assert weight.shape == expected.shape and (error < 0.01 if name in layers else error == 0), name
    if method.name in ("none", "convrot"):
        assert {m["format"] for m in markers.values()} == {"int8_tensorwise"}, "ComfyUI reads it"
        assert all(m.get("convrot", False) == (method.name == "convrot") for m in markers.values())
    assert markers["double_blocks.1.img_attn.qkv"] and "img_in" not in markers


@pytest.mark.parametrize("name", [n for n in shipped("outlier") if n != "auto"])
def test_a_folder_means_the_models_weights(name: str, tmp_path: Path) -> None:
    model = random_pipeline().transformer
    model, layers = made(shipped("outlier")[name], statistics=seen(model))
    config = dict(model.config)
    path = save_denoiser(str(tmp_path / "mine"), model, layers, {"a": 1}, config)
    assert path == tmp_path / "mine" / "diffusion_pytorch_model.safetensors"
    tensors, markers = read(path)
    assert set(tensors) == set(model.state_dict()) and set(markers) == set(layers)
    for key, expected in model.state_dict().items():
        error = np.sqrt(((tensors[key] - expected.double().numpy()) ** 2).mean())
        assert (
            error <= 0.02 * expected.double().pow(2).mean().sqrt()
            if key.removesuffix(".weight") in layers
            else error == 0
        ), key
    again = diffusers.FluxTransformer2DModel.from_config(
        json.loads((tmp_path / "mine" / "config.json").read_text())
    )
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["int8run"])
        assert note == {"a": 1, DATA_HASH: note[DATA_HASH]} and file.metadata()["format"] == "pt"
    with TensorFiles.open(path) as files:
        assert check_data(files)


def test_the_home_folder_may_stand_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model, layers = made()
    assert save_denoiser("~/deep/m.safetensors", model, layers, {}, {}) == tmp_path / "deep" / "m.safetensors"


# -- what cannot be one tensor -------------------------------------------------------------------------------


def test_parts_of_which_only_some_are_int8_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model, layers = made()
    del layers["transformer_blocks.0.attn.to_k"]
    message = (
        r"^double_blocks\.0\.img_attn\.qkv\.weight is one layer in the file, "
        r"and transformer_blocks\.0\.attn\.to_k\.weight of it is float "
        r"where the rest is INT8; save to a folder, which keeps diffusers' own layers: save=my-int8/$"
    )
    with pytest.raises(ConfigError, match=message):
        save_denoiser(str(tmp_path / "m.safetensors"), model, layers, {}, {})
    assert list(tmp_path.iterdir()) == []
    save_denoiser(str(tmp_path / "m"), model, layers, {}, {})


def test_parts_that_were_treated_differently_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = random_pipeline().transformer
    model, layers = made(SmoothQuant(0.5), statistics=seen(model))
    message = (
        r"qkv\.weight is one layer in the file, and its parts were "
        r"treated differently \(smoothquant alpha=0\.5\); save to a folder"
    )
    with pytest.raises(ConfigError, match=message):
        save_denoiser(str(tmp_path / "m.safetensors"), model, layers, {}, {})
    _, others = made(ConvRot(16))
    mixed = made()[1] | {"transformer_blocks.0.attn.to_v": others["transformer_blocks.0.attn.to_v"]}
    with pytest.raises(ConfigError, match=r"treated differently \(none, convrot group_size=16\)"):
        save_denoiser(str(tmp_path / "m.safetensors"), model, mixed, {}, {})
    assert list(tmp_path.iterdir()) == []


# -- tensors -------------------------------------------------------------------------------------------------


def test_tensors_of_any_layout_and_dtype_are_written_as_they_are(tmp_path: Path) -> None:
    shared = randn(5)
    state = {
        "norm.weight": randn(4, 6).bfloat16().T,
        "count": torch.tensor(3),
        "tied": shared,
        "tied_to": shared,
        "view": randn(4, 4)[1:3, ::2],
        "half": randn(2).half(),
        "flag": torch.tensor([True, False]),
        "wide": randn(2).double(),
        "byte": torch.tensor([1, 2], dtype=torch.uint8),
    }
    write_tensors(tmp_path / "m.safetensors", keep_own_names(state), {}, state, {})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        for key, tensor in state.items():
            back = file.get_tensor(key)
            assert torch.equal(back, tensor) and back.dtype == tensor.dtype, key


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_parts_of_several_dtypes_take_the_widest(order: tuple[int, ...], tmp_path: Path) -> None:
    tensors = [randn(2, 3), randn(1, 3, seed=1).bfloat16(), randn(3, 3, seed=2).bfloat16()]
    state = {name: tensors[n] for name, n in zip("abc", order, strict=True)}
    write_tensors(tmp_path / "m.safetensors", {"abc.weight": tuple(map(TensorPart, "abc"))}, {}, state, {})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("abc.weight"), torch.cat([t.float() for t in state.values()]))


def test_swapped_halves_are_written_swapped_with_their_scales(tmp_path: Path) -> None:
    _, layers = made()
    layer = layers["transformer_blocks.0.attn.to_q"]
    names = {"x.weight": (TensorPart("transformer_blocks.0.attn.to_q.weight", swap_halves=True),)}
    write_tensors(tmp_path / "m.safetensors", names, layers, {}, {})
    tensors, _ = read(tmp_path / "m.safetensors")
    expected = layer.read_quantized_weight().dequantize().double().numpy()
    np.testing.assert_allclose(tensors["x.weight"], np.concatenate([expected[16:], expected[:16]]), rtol=1e-6)


def test_a_place_that_cannot_be_written_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    model, layers = made()
    with pytest.raises(FileError, match=r"m\.safetensors cannot be written: "):
        save_denoiser(str(tmp_path / "m.safetensors"), model, layers, {}, {})
