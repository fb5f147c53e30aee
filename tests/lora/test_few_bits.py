"""LoRAs on layers whose weights have 4 or 6 bits: in every mode, and undone to the bit."""

import pytest
import torch
from lora.test_stack import LINEARS, X, make_lora
from support.compare import assert_close
from support.helpers import TinyModel, on_int8, randn, to_int8

from int8run.layers.grouped_int8_linear import GroupedInt8Linear
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.ia3 import IA3
from int8run.outlier.convrot import ConvRot

MODES = ["dynamic", "bake", "stochastic"]
# what a change of the weights may be off by
ERRORS = {4: 0.15, 6: 0.06}


def count_grouped(int8):
    return sum(isinstance(module, GroupedInt8Linear) for module in int8.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("strengths", [[0.8, 0.4], [-1.5, 1.0]], ids=str)
def test_every_mode_agrees_with_the_merged_float_model(strengths, bits, mode):
    model = TinyModel()
    stack = [make_lora(model, LINEARS), make_lora(model, LINEARS[1:4], seed=30)]
    int8, _ = to_int8(model, outlier=ConvRot(), bits=bits)
    assert count_grouped(int8) >= 4
    loras = on_int8(model, int8, stack, mode)

    loras.set_strengths(strengths)

    # two random roundings beside each other
    factor = 2.5 if mode == "stochastic" else 1
    assert_close(mode, int8(X), model(X), factor * ERRORS[bits])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 6])
def test_strengths_change_without_a_rebuild_and_back(bits, mode):
    model = TinyModel()
    int8, _ = to_int8(model, outlier=ConvRot(), bits=bits)
    plain, layers = int8(X), dict(int8.named_modules())
    loras = on_int8(model, int8, [make_lora(model, LINEARS)], mode)

    assert torch.equal(int8(X), plain)

    loras.set_strengths([1.0])
    strong = int8(X)
    assert not torch.equal(strong, plain)

    loras.set_strengths([0.0])
    assert torch.equal(int8(X), plain), "undone to the bit"

    loras.set_strengths([-2.0])
    loras.set_strengths([1.0])
    assert torch.equal(int8(X), strong), "the way there has no say"
    assert all(int8.get_submodule(name) is module for name, module in layers.items())


def test_row_factors_scale_a_correction_too():
    model = TinyModel()
    int8, _ = to_int8(model, bits=4)
    name = "blocks.0.1"
    layer = int8.get_submodule(name)
    rows, groups = layer.out_features, layer.in_features // 16
    layer.correction = 0.1 * randn(groups, rows, seed=8)
    x = randn(5, layer.in_features)
    plain = layer(x) - layer.bias
    before = layer.correction.clone()
    factor = randn(rows, seed=9)
    loras = on_int8(model, int8, [{name: LoraChange(IA3(factor))}], "dynamic", float_weights=False)

    loras.set_strengths([0.5])
    assert_close("rows", layer(x) - layer.bias, plain * (1 + 0.5 * factor), 1e-4)

    loras.set_strengths([0.0])
    assert torch.equal(layer.correction, before)
