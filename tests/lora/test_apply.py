"""Bringing LoRAs to a model: matching, merging in float, branches beside INT8 layers."""

from pathlib import Path

import pytest
import torch
from helpers import TinyModel, assert_close, randn, to_int8

from int8run.errors import LoraError
from int8run.layers.linear import LowRank
from int8run.lora.apply import DynamicBranches, FloatMerge, match
from int8run.lora.files import LoraFile
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier

LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]


def lora(model, names, seed=10, rank=3, unknown=(), file="style.safetensors"):
    """A LoRA file for these layers, strong enough to be seen over INT8's rounding."""
    pairs = {}
    for i, name in enumerate(names):
        n, k = model.get_submodule(name).weight.shape
        pairs[name] = LowRank(randn(rank, k, seed=seed + 2 * i), randn(n, rank, seed=seed + 2 * i + 1), 0.02)
    return LoraFile(Path("/loras") / file, pairs, tuple(unknown), {})


def elsewhere(name="nowhere.proj"):
    return {name: LowRank(randn(2, 4), randn(4, 2), 1.0)}


def test_match_says_which_adapter_brings_which_pair():
    model = TinyModel()
    first, second = lora(model, ["proj_in", "blocks.0.1"]), lora(model, ["blocks.0.1"], seed=30)
    matches = match(model, [first, second], strict=True)
    assert {name: [index for index, _ in pairs] for name, pairs in matches.by_module.items()} == {"proj_in": [0], "blocks.0.1": [0, 1]}
    assert matches.by_module["blocks.0.1"][1][1] is second.pairs["blocks.0.1"] and matches.unmatched == ()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize(
    ("pairs", "unknown", "words"),
    [
        (elsewhere(), (), r"none of its 1 modules is in the model \(first: nowhere\.proj\)"),
        ({}, ("a.lokr_w1", "a.lokr_w2"), r"none of its 2 modules is in the model \(first: a\.lokr_w1\)"),
        ({}, (), r"none of its 0 modules is in the model \(first: none\)"),
    ],
    ids=["other names", "no known kind", "empty file"],
)
def test_zero_matches_are_an_error(pairs, unknown, words, strict):
    file = LoraFile(Path("/loras/style.safetensors"), pairs, unknown, {})
    with pytest.raises(LoraError, match=rf"^style\.safetensors: {words}; the LoRA was made for another architecture$"):
        match(TinyModel(), [file], strict)


def test_zero_matches_of_one_file_are_not_hidden_by_another():
    model = TinyModel()
    with pytest.raises(LoraError, match=r"^other\.safetensors: none of its 1 modules"):
        match(model, [lora(model, LINEARS), LoraFile(Path("other.safetensors"), elsewhere(), (), {})], strict=False)


def test_names_of_modules_that_are_no_linear_do_not_match():
    model = TinyModel()
    file = LoraFile(Path("style.safetensors"), elsewhere("blocks.0.0"), (), {})
    with pytest.raises(LoraError, match=r"none of its 1 modules is in the model \(first: blocks\.0\.0\)"):
        match(model, [file], strict=False)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_a_wrong_shape_is_an_error(strict):
    model = TinyModel()
    file = lora(model, ["proj_in"])
    file.pairs["blocks.0.1"] = LowRank(randn(3, 64), randn(128, 3), 1.0)
    words = r"^style\.safetensors: blocks\.0\.1 changes a 128x64 weight, the model's is 96x64; the LoRA was made for another base model$"
    with pytest.raises(LoraError, match=words):
        match(model, [file], strict)


def test_strict_refuses_keys_without_a_place():
    model = TinyModel()
    file = lora(model, ["proj_in"], unknown=("proj_in.dora_scale",))
    file.pairs.update(elsewhere())
    words = r"^style\.safetensors: 2 of 3 keys have no place in the model \(first: proj_in\.dora_scale\); lora\.strict=false applies"
    with pytest.raises(LoraError, match=words):
        match(model, [file], strict=True)


def test_not_strict_applies_the_rest_and_says_so(caplog):
    model = TinyModel()
    file = lora(model, ["proj_in"])
    file.pairs.update(elsewhere())
    matches = match(model, [file], strict=False)
    assert list(matches.by_module) == ["proj_in"] and matches.unmatched == ("nowhere.proj",)
    assert "style.safetensors: 1 keys have no place in the model and are left out (first: nowhere.proj)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_adds_up_in_float32_and_rounds_once(dtype):
    model = TinyModel(dtype=dtype)
    before = {name: model.get_submodule(name).weight.clone() for name in LINEARS}
    first, second = lora(model, LINEARS[:3]), lora(model, LINEARS[2:5], seed=30)
    FloatMerge(model, match(model, [first, second], strict=True)).set_strengths([0.8, -0.5])
    for name in LINEARS:
        wanted = before[name].float()
        for file, strength in ((first, 0.8), (second, -0.5)):
            if name in file.pairs:
                wanted = wanted + strength * file.pairs[name].delta()
        assert torch.equal(model.get_submodule(name).weight, wanted.to(dtype)), name
        assert torch.equal(model.get_submodule(name).weight, before[name]) == (name == "proj_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_undone_exactly_and_does_not_drift(dtype):
    model = TinyModel(dtype=dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    merge = FloatMerge(model, match(model, [lora(model, LINEARS)], strict=True))
    merge.set_strengths([0.7])
    once = {name: weight.clone() for name, weight in model.named_parameters()}
    for strength in (20.0, -0.3, 0.7):
        merge.set_strengths([strength])
    assert all(torch.equal(weight, once[name]) for name, weight in model.named_parameters())
    merge.set_strengths([0])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot()], ids=lambda m: m.name)
@pytest.mark.parametrize("strengths", [[0.8, 0.4], [1.0, 0.0], [-1.5, 1.0]], ids=str)
def test_branches_agree_with_quantizing_the_merged_weights(outlier, strengths):
    x = randn(9, 7)
    merged, base = TinyModel(), TinyModel()
    stack = [lora(base, LINEARS), lora(base, LINEARS[1:4], seed=30)]
    FloatMerge(merged, match(merged, stack, strict=True)).set_strengths(strengths)
    baked, _ = to_int8(merged, outlier=outlier)
    dynamic, _ = to_int8(base, outlier=outlier)
    DynamicBranches(dynamic, match(base, stack, strict=True)).set_strengths(strengths)
    # the LoRA is far outside the tolerance
    assert (merged(x) - base(x)).norm() > 0.3 * base(x).norm()
    assert_close("dynamic, float", dynamic(x), merged(x), 0.04)
    assert_close("dynamic, baked", dynamic(x), baked(x), 0.05)


def test_branches_follow_new_strengths_without_a_rebuild():
    model, x = TinyModel(), randn(9, 7)
    int8, _ = to_int8(model)
    plain, layers = int8(x), dict(int8.named_modules())
    branches = DynamicBranches(int8, match(model, [lora(model, LINEARS)], strict=True))
    assert torch.equal(int8(x), plain)
    branches.set_strengths([1.0])
    strong = int8(x)
    assert not torch.equal(strong, plain)
    branches.set_strengths([0.0])
    assert torch.equal(int8(x), plain)
    branches.set_strengths([1.0])
    assert torch.equal(int8(x), strong)
    assert all(int8.get_submodule(name) is module for name, module in layers.items())


def test_layers_that_stay_float_carry_the_merge():
    model, x = TinyModel(), randn(9, 7)
    stack = [lora(model, LINEARS)]
    matches = match(model, stack, strict=True)
    merge = FloatMerge(model, matches)
    int8, _ = to_int8(model, keep_float=("proj_in", "proj_out"))
    branches = DynamicBranches(int8, matches)
    assert len(branches.branches) == 4
    for strength in (1.0, -0.5):
        # the copy shares the float weights, so the merge reaches them; the INT8 ones were made before it
        merge.set_strengths([strength])
        branches.set_strengths([strength])
        assert_close(f"strength {strength}", int8(x), model(x), 0.04)
