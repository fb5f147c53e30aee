"""Codes of 4 and 6 bits from file to file: the bits that the same steps give in memory, in bounded blocks."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.drafts.draft import LAYER
from checkpoints.drafts.grouped import GROUPED_DRAFTS
from safetensors.torch import load_file, save_file
from support.helpers import randn
from torch import Tensor

from int8run.backends.reference import Reference
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError
from int8run.export import stream_blocks
from int8run.export.save_denoiser import keep_own_names as keep_parameter_names
from int8run.export.save_denoiser import write_tensors
from int8run.export.stream_plan import QuantizationRecipe, keep_own_names, plan_targets
from int8run.export.stream_quantizer import write_targets
from int8run.layers.grouped_int8_linear import make_int8_linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.plan import LayerPlan
from int8run.models.tensor_part import TensorPart
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant import codebook
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import AbsMax, Mse, RoundsGroups, round_to_bits

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = [GroupLayout(4), GroupLayout(6), GroupLayout(4, 32)]
BESIDE = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook", "comfy_quant")


def stream(
    source: Path, target: Path, recipe: QuantizationRecipe, names: Mapping[str, tuple[TensorPart, ...]] = {}
) -> tuple[dict[str, LayerPlan], dict[str, Tensor]]:
    """Stream a file. Returns the plans by name, and the new file's tensors."""
    with TensorFiles.open(source) as files:
        stored = read_layers(files)
        planned = plan_targets(
            files, stored, names or keep_own_names(files, stored), lambda key, parts: None, recipe
        )
        write_targets(files, stored, planned, target, {}, recipe)
    return {made.plan.name: made.plan for made in planned if made.plan is not None}, load_file(target)


def make_recipe(layout: GroupLayout, rounding: RoundsGroups | None = None) -> QuantizationRecipe:
    return QuantizationRecipe(ConvRot(), rounding or AbsMax(), layout=layout)  # type: ignore[arg-type]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """A weight of the usual kind, one with heavy tails, and widths that codes do not take."""
    heavy = randn(96, 256, seed=4) * torch.exp(1.5 * randn(96, 256, seed=5))
    return {
        "usual.weight": (randn(70, 512) * 0.02).bfloat16(),
        "usual.bias": randn(70).bfloat16(),
        "heavy.weight": heavy,
        "half.weight": randn(9, 48, seed=2).half(),
        "odd.weight": randn(9, 37, seed=3),
    }


@pytest.fixture
def source(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(weights, path)
    return path


def make_layer(weight: Tensor, layout: GroupLayout, rounding: RoundsGroups) -> Int8Linear:
    """The layer that a run makes."""
    transform = ConvRot().fit(weight)
    rounded = round_to_bits(rounding, transform.transform_rows(weight), None, layout)  # type: ignore[arg-type]
    return make_int8_linear(QuantizedLayer(rounded, transform, None), Reference(), torch.float32)


@pytest.mark.parametrize("block_bytes", [None, 1500])
@pytest.mark.parametrize("rounding", [AbsMax(), Mse()], ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_bits_are_those_of_a_layer_in_memory(
    layout: GroupLayout,
    rounding: RoundsGroups,
    block_bytes: int | None,
    source: Path,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block_bytes is not None:
        monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(codebook, "SAMPLE_SIZE", 4096)  # of a weight, so that some rows decide its levels
    layers = {name: make_layer(weights[f"{name}.weight"], layout, rounding) for name in ("usual", "heavy")}
    saved = tmp_path / "saved.safetensors"
    write_tensors(saved, keep_parameter_names(f"{name}.weight" for name in layers), layers, {}, {})
    in_memory = load_file(saved)

    plans, found = stream(source, tmp_path / "x.safetensors", make_recipe(layout, rounding))

    for name in layers:
        assert plans[name].bits == layout.bits
        assert plans[name].measured["weight_sqnr_db"] > (18 if layout.bits == 4 else 28)
        for suffix in BESIDE:
            key = f"{name}.{suffix}"
            assert (key in found) == (key in in_memory)
            if key in found:
                assert found[key].dtype == in_memory[key].dtype
                assert torch.equal(found[key].view(torch.uint8), in_memory[key].view(torch.uint8)), key


def test_heavy_tails_get_levels_of_their_own(source: Path, tmp_path: Path) -> None:
    weights = load_file(source)
    # in each group of 16 columns one is large, which groups of 4 do not spread over all
    weights["usual.weight"][:, ::16] *= 60
    save_file(weights, source)

    _, found = stream(
        source, tmp_path / "x.safetensors", QuantizationRecipe(ConvRot(4), AbsMax(), layout=GroupLayout(4))
    )

    assert not torch.equal(found["usual.weight_codebook"], found["half.weight_codebook"])


def test_widths_that_codes_do_not_take_have_eight_bits(source: Path, tmp_path: Path) -> None:
    plans, found = stream(source, tmp_path / "x.safetensors", make_recipe(GroupLayout(6)))

    assert {name: plan.bits for name, plan in plans.items()} == {"usual": 6, "heavy": 6, "half": 8, "odd": 8}
    assert "multiples of 32, not 48" in plans["half"].bits_reason
    assert found["half.weight"].shape == (9, 48)
    assert json.loads(bytes(found["usual.comfy_quant"].tolist())) == {
        "format": "asym_w4a8_int8",
        "group_size": 16,
        "convrot": True,
        "convrot_groupsize": 256,
    }


def test_blocks_of_any_size_give_the_same_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for size in (1, 700, 2**20):
        monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", size)
        stream(source, tmp_path / f"{size}.safetensors", make_recipe(GroupLayout(4)))
        files.append((tmp_path / f"{size}.safetensors").read_bytes())

    assert files.count(files[0]) == 3


def test_parts_become_one_weight(source: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    parts = {"a.weight": weights["heavy.weight"][:40], "b.weight": weights["heavy.weight"][40:]}
    save_file({key: part.contiguous() for key, part in parts.items()}, tmp_path / "parts.safetensors")
    names = {"heavy.weight": tuple(TensorPart(key) for key in parts)}

    _, joined = stream(
        tmp_path / "parts.safetensors", tmp_path / "x.safetensors", make_recipe(GroupLayout(4)), names
    )
    _, whole = stream(source, tmp_path / "y.safetensors", make_recipe(GroupLayout(4)))

    for key, tensor in joined.items():
        assert torch.equal(tensor.view(torch.uint8), whole[key].view(torch.uint8)), key


@pytest.mark.parametrize(
    "name", [name for name in GROUPED_DRAFTS if "header" not in name and "both" not in name]
)
def test_codes_of_a_file_are_copied_as_they_are(name: str, tmp_path: Path) -> None:
    draft = GROUPED_DRAFTS[name]()
    path = draft.write(tmp_path / "source.safetensors")

    plans, found = stream(path, tmp_path / "x.safetensors", make_recipe(GroupLayout(4)))

    tensors = load_file(path)
    assert plans[LAYER].rounding == "as in the source" and plans[LAYER].bits == int(name[1])
    for key, tensor in tensors.items():
        if not key.endswith("comfy_quant"):
            assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
    with TensorFiles.open(path) as before, TensorFiles.open(tmp_path / "x.safetensors") as after:
        first, second = read_layers(before)[LAYER], read_layers(after)[LAYER]
        assert first.label == second.label
        assert torch.equal(first.read_weight(before), second.read_weight(after))


def test_numbers_that_are_none_stop_it(source: Path, tmp_path: Path) -> None:
    weights = load_file(source)
    weights["heavy.weight"][3, 5] = torch.nan
    save_file(weights, source)

    with pytest.raises(ConfigError, match="heavy: the weight holds NaN or infinity"):
        stream(source, tmp_path / "x.safetensors", make_recipe(GroupLayout(4)))

    assert not (tmp_path / "x.safetensors").exists()


# -- layers in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [NoOutlier(), QuaRot(64)], ids=lambda method: method.name)
def test_layers_under_other_methods_are_not_saved(method: NoOutlier | QuaRot, tmp_path: Path) -> None:
    weight = randn(16, 64)
    transform = method.fit(weight)
    rounded = AbsMax().round_groups(transform.transform_rows(weight), None, GroupLayout(4))
    layer = make_int8_linear(QuantizedLayer(rounded, transform, None), Reference(), torch.float32)

    with pytest.raises(
        ConfigError, match=r"x.weight cannot be saved with int8.bits=4: .* outlier=convrot, not"
    ):
        write_tensors(tmp_path / "x.safetensors", keep_parameter_names(["x.weight"]), {"x": layer}, {}, {})


def test_parts_with_other_bits_or_levels_are_no_one_layer(tmp_path: Path) -> None:
    names = {"ab.weight": (TensorPart("a.weight"), TensorPart("b.weight"))}
    first = make_layer(randn(16, 64), GroupLayout(4), AbsMax())
    other_bits = make_layer(randn(16, 64), GroupLayout(6), AbsMax())
    levels = first.read_stored_weight().codebook * 0.99  # type: ignore[union-attr, operator]
    weight = replace(first.read_stored_weight(), codebook=levels)  # type: ignore[arg-type]
    other_levels = make_int8_linear(QuantizedLayer(weight, first.transform, None), Reference(), torch.float32)

    with pytest.raises(ConfigError, match=r"its parts have different bits \(4, 6\); save to a folder"):
        write_tensors(tmp_path / "x.safetensors", names, {"a": first, "b": other_bits}, {}, {})
    with pytest.raises(ConfigError, match="its parts have codes of other levels; save to a folder"):
        write_tensors(tmp_path / "x.safetensors", names, {"a": first, "b": other_levels}, {}, {})
