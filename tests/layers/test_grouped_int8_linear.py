"""`GroupedInt8Linear` beside the layer of the int8 numbers that its codes decode to."""

from dataclasses import replace

import pytest
import torch
from support.compare import assert_close
from support.helpers import CPU, randn, shipped, usable
from torch import nn
from torch._dynamo.testing import CompileCounter

from int8run.backends import row_decoder
from int8run.backends.base import MultipliesGroupedWeights
from int8run.backends.reference import Reference
from int8run.backends.row_decoder import RowDecoder
from int8run.layers.grouped_int8_linear import GroupedInt8Linear, make_int8_linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.metrics.layers import count_module_bytes
from int8run.outlier.base import LayerStatistics
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.smoothquant import SmoothQuant
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import AbsMax

METHODS = [NoOutlier(), ConvRot(64), HadaNorm(16)]
ABLE = {
    name: backend for name, backend in shipped("backend").items() if usable(backend, CPU) and name != "auto"
}
K, N = 128, 200
LAYOUTS = [GroupLayout(4), GroupLayout(6), GroupLayout(4, 64)]


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Several pieces for a small layer."""
    monkeypatch.setattr(row_decoder, "CHUNK_ELEMENTS", {"cpu": 64 * K, "cuda": 64 * K})


def make_layer(layout=LAYOUTS[0], outlier=METHODS[1], correction=None, seed=1):
    weight = randn(N, K, seed=seed)
    transform = outlier.fit(weight)
    grouped = AbsMax().round_groups(transform.transform_weight(weight), None, layout)
    return QuantizedLayer(replace(grouped, correction=correction), transform, randn(N, seed=2))


def make_both(backend=None, float_rows=0, **layer):
    """The layer of the codes, and that of the int8 numbers that they decode to."""
    quantized = make_layer(**layer)
    decoded = replace(quantized, weight=quantized.weight.decode())
    backend = backend or Reference()
    grouped = make_int8_linear(quantized, backend, torch.float32, float_rows)
    return grouped, Int8Linear(decoded, backend, torch.float32, float_rows)


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (5, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_product_is_that_of_the_decoded_weight(layout, outlier, shape):
    grouped, decoded = make_both(layout=layout, outlier=outlier)
    x = randn(*shape)

    assert isinstance(grouped, GroupedInt8Linear)
    assert grouped.bits == layout.bits
    torch.testing.assert_close(grouped(x), decoded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ABLE)
def test_every_backend_has_the_product(name, layout):
    grouped, decoded = make_both(ABLE[name], layout=layout)
    x = randn(7, K)

    assert isinstance(grouped.multiplier, MultipliesGroupedWeights)
    assert_close(name, grouped(x), decoded(x), 1e-5)


@pytest.mark.parametrize("name", ABLE)
def test_codes_and_scales_come_back_to_the_bit(name):
    quantized = make_layer(layout=GroupLayout(6))
    found = make_int8_linear(quantized, ABLE[name], torch.float32).read_grouped_weight()

    assert torch.equal(found.codes, quantized.weight.codes)
    assert torch.equal(found.group_scale.view(torch.uint8), quantized.weight.group_scale.view(torch.uint8))
    assert torch.equal(found.scale, quantized.weight.scale)
    assert found.group_size == 16


def test_neither_the_int8_nor_a_float_weight_is_kept():
    grouped, decoded = make_both(layout=GroupLayout(4))
    weights = N * K // 2 + N * K // 16
    scales_bias_and_levels = 4 * N + 4 * N + 4 * 16
    matrix = 4 * 64 * 64

    assert count_module_bytes(grouped) == weights + scales_bias_and_levels + matrix
    assert count_module_bytes(decoded) == N * K + 4 * N + 4 * N + matrix


def test_a_float_weight_is_kept_only_where_the_fallback_needs_it():
    grouped, _ = make_both(float_rows=4)
    x = randn(5, K)
    few = grouped.transform.transform_input(x[:4])
    expected = few @ grouped.read_grouped_weight().dequantize().T + grouped.bias

    assert_close("few rows", grouped(x[:4]), expected, 1e-5)
    assert not torch.equal(grouped(x)[:4], grouped(x[:4]))


@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("gelu_from", [None, 32])
def test_a_correction_is_a_product_with_the_sums_of_groups(outlier, gelu_from):
    correction = randn(K // 16, N, seed=5)
    grouped, decoded = make_both(outlier=outlier, correction=correction)
    x = randn(2, 3, K)
    grouped.gelu_from = decoded.gelu_from = None if outlier.name == "hadanorm" else gelu_from
    read = x.clone()
    if grouped.gelu_from is not None:
        read[..., gelu_from:] = nn.functional.gelu(read[..., gelu_from:], approximate="tanh")
    sums = grouped.transform.transform_input(read).unflatten(-1, (-1, 16)).sum(-1)

    assert_close("correction", grouped(x) - decoded(x), sums @ correction, 1e-4)


def test_another_weight_takes_the_place_of_the_old_one():
    grouped, _ = make_both()
    codes, scale = grouped.codes.data_ptr(), grouped.scale.data_ptr()
    other = make_layer(seed=7)
    grouped.set_weight(other.weight)
    x = randn(5, K)

    assert torch.equal(grouped(x), make_int8_linear(other, Reference(), torch.float32)(x))
    assert (grouped.codes.data_ptr(), grouped.scale.data_ptr()) == (codes, scale)


def test_layers_and_weights_of_other_bits_do_not_go_together():
    grouped, decoded = make_both()

    with pytest.raises(TypeError, match=r"a weight of 8 bits is for an Int8Linear"):
        grouped.set_weight(decoded.read_stored_weight())
    with pytest.raises(TypeError, match="a weight of 4 bits is for a GroupedInt8Linear"):
        decoded.set_weight(grouped.read_stored_weight())


@pytest.mark.parametrize("name", ABLE)
def test_a_branch_adds_its_product(name):
    grouped, _ = make_both(ABLE[name])
    lora_A, lora_B = randn(4, K, seed=3), 0.1 * randn(N, 4, seed=4)
    branch = LowRankBranch([(lora_A, lora_B)], torch.float32, CPU)
    if grouped.can_fuse_branch:
        branch.fuse_into_backend(grouped.backend, grouped.transform)
    branch.set_strengths([0.5])
    x = randn(6, K)
    plain = grouped(x)
    grouped.set_adapter(branch)

    assert_close(name, grouped(x) - plain, 0.5 * x @ lora_A.T @ lora_B.T, 0.03)
    assert grouped.can_fuse_branch != isinstance(grouped.multiplier, RowDecoder)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("name", ABLE)
def test_compiled_code_sees_the_whole_layer(name, layout):
    torch._dynamo.reset()
    grouped, _ = make_both(ABLE[name], layout=layout, correction=randn(K // 16, N, seed=5))
    counter = CompileCounter()
    compiled = torch.compile(grouped, backend=counter, fullgraph=True)
    x = randn(6, K)

    assert torch.equal(compiled(x), grouped(x))
    assert counter.frame_count == 1


def test_smooth_factors_are_in_the_weight_and_the_input():
    weight = randn(N, K)
    seen = LayerStatistics(randn(1, 8, K), randn(1, 8, K).abs().amax((0, 1)), weight.abs().amax(0))
    transform = SmoothQuant().fit(weight, seen)
    grouped = AbsMax().round_groups(transform.transform_weight(weight), None, GroupLayout(6))
    layer = make_int8_linear(QuantizedLayer(grouped, transform, None), Reference(), torch.float32)
    x = randn(64, K, seed=3)

    assert_close("smoothquant", layer(x), x @ weight.T, 0.04)
