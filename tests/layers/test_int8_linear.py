"""`Int8Linear` beside the `nn.Linear` it replaces, and the low-rank branch."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from support.helpers import CPU, randn, shipped, usable
from torch import nn
from torch._dynamo.testing import CompileCounter

from int8run.backends.base import run_plain_layer
from int8run.backends.reference import Reference
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.weight import quantize_weight

METHODS = [NoOutlier(), ConvRot(), QuaRot(64), HadaNorm(16)]
ABLE = [backend for backend in shipped("backend").values() if usable(backend, CPU)]
INT8_ERR = 0.02
K, N = 64, 40


def linear(bias=True, dtype=torch.float32):
    layer = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(randn(N, K, seed=1))
    if bias:
        layer.bias.copy_(randn(N, seed=2))
    return layer


def int8(layer, outlier=METHODS[0], float_rows=0, backend=None):
    transform = outlier.fit(layer.weight)
    weight = quantize_weight(transform.transform_weight(layer.weight))
    return Int8Linear(
        QuantizedLayer(weight, transform, layer.bias), backend or Reference(), layer.weight.dtype, float_rows
    )


def low_rank(rank, seed, scale=0.5):
    return randn(rank, K, seed=seed), scale * randn(N, rank, seed=seed + 1)


def delta(part):
    lora_A, lora_B = part
    return lora_B @ lora_A


def with_branch(layer, *parts, strengths):
    layer.adapter = LowRankBranch(parts, layer.dtype, torch.device("cpu"))
    layer.adapter.set_strengths(strengths)
    return layer


@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (2, 1, 3, K)], ids=str)
@pytest.mark.parametrize("float_rows", [0, 16], ids=["int8", "float fallback"])
def test_close_to_the_linear_it_replaces(shape, bias, outlier, float_rows):
    layer, x = linear(bias), randn(*shape)
    assert_close("Int8Linear", int8(layer, outlier, float_rows)(x), layer(x), INT8_ERR)


@pytest.mark.parametrize("float_rows", [0, 16], ids=["int8", "float fallback"])
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)], ids=str)
def test_no_rows(shape, float_rows):
    assert int8(linear(), float_rows=float_rows)(torch.zeros(shape)).shape == (*shape[:-1], N)


def test_leading_dimensions_are_only_rows():
    layer, x = int8(linear()), randn(2, 3, K)
    assert torch.equal(layer(x), layer(x.reshape(6, K)).reshape(2, 3, N))
    # not contiguous, as after an attention's transpose
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))


def test_bfloat16_in_bfloat16_out():
    layer, x = linear(dtype=torch.bfloat16), randn(5, K, dtype=torch.bfloat16)
    y = int8(layer)(x)

    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y, layer(x), INT8_ERR)


@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
def test_few_rows_use_the_dequantized_weight_exactly(outlier):
    layer = linear()
    transform = outlier.fit(layer.weight)
    weight = quantize_weight(transform.transform_weight(layer.weight))
    ours, x = int8(layer, outlier, float_rows=4), randn(5, K)
    few = x[:4]

    assert torch.equal(ours(few), F.linear(transform.transform_input(few), weight.dequantize(), layer.bias))
    # one row more goes to the backend
    assert torch.equal(
        ours(x),
        run_plain_layer(
            Reference(), transform.transform_input(x), weight.qdata, weight.scale[:, 0], layer.bias
        ),
    )
    assert not torch.equal(ours(x)[:4], ours(few))


def test_a_float_weight_is_kept_only_where_the_fallback_needs_it():
    assert int8(linear()).float_weight is None and int8(linear(), float_rows=1).float_weight is not None


@pytest.mark.parametrize("float_rows", [0, 16], ids=["int8", "float fallback"])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)], ids=str)
def test_a_branch_adds_its_explicit_product(shape, float_rows):
    part, x = low_rank(4, seed=3), randn(*shape)
    plain, adapted = (
        int8(linear(), float_rows=float_rows),
        with_branch(int8(linear(), float_rows=float_rows), part, strengths=[0.8]),
    )
    product = 0.8 * x @ part[0].T @ part[1].T

    assert_close("branch", adapted(x) - plain(x), product, 1e-5)


def test_two_adapters_are_concatenated_and_add_up():
    first, second, x = low_rank(4, seed=3), low_rank(2, seed=5, scale=2.0), randn(5, K)
    adapted = with_branch(int8(linear()), first, second, strengths=[0.5, -1.5])

    assert adapted.adapter.ranks == (4, 2)
    assert_close(
        "sum", adapted(x) - int8(linear())(x), x @ (0.5 * delta(first) - 1.5 * delta(second)).T, 1e-5
    )


def test_strength_0_is_no_branch_at_all():
    first, second, x = low_rank(4, seed=3), low_rank(2, seed=5), randn(5, K)
    adapted = with_branch(int8(linear()), first, second, strengths=[0, 1.0])

    assert_close("one of two", adapted(x), with_branch(int8(linear()), second, strengths=[1.0])(x), 1e-6)

    adapted.adapter.set_strengths([0, 0.0])

    assert adapted.adapter.is_idle and torch.equal(adapted(x), int8(linear())(x))


def test_a_new_strength_leaves_the_layer_as_it_is():
    part, x = low_rank(4, seed=3), randn(5, K)
    layer = with_branch(int8(linear()), part, strengths=[1.0])
    packed, branch = layer.packed.data_ptr(), layer.adapter
    for strength in (0.0, -2.0, 0.25):
        branch.set_strengths([strength])
        assert torch.equal(layer(x), with_branch(int8(linear()), part, strengths=[strength])(x))

    assert layer.packed.data_ptr() == packed and layer.adapter is branch


def test_every_part_needs_a_strength():
    branch = LowRankBranch([low_rank(4, seed=3), low_rank(2, seed=5)], torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        branch.set_strengths([1.0])


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
def test_the_branch_sees_the_untransformed_input(outlier, shape):
    part, x = low_rank(4, seed=3, scale=0.2), randn(*shape)
    layer = linear()
    adapted = with_branch(int8(layer, outlier), part, strengths=[1.0])

    assert_close(outlier.name, adapted(x), layer(x) + x @ delta(part).T, INT8_ERR)


@pytest.mark.parametrize("backend", ABLE, ids=lambda b: b.name)
@pytest.mark.parametrize("outlier", METHODS, ids=lambda m: m.name)
def test_a_branch_inside_the_product_takes_part_in_the_transform(outlier, backend):
    part, x = low_rank(4, seed=3, scale=0.2), randn(2, 9, K) + 3 * randn(2, 1, K, seed=7)
    layer = linear()
    adapted = with_branch(int8(layer, outlier, backend=backend), part, strengths=[0.8])
    adapted.adapter.fuse_into_backend(backend, adapted.transform)

    assert_close(
        f"{outlier.name} on {backend.name}", adapted(x), layer(x) + 0.8 * x @ delta(part).T, INT8_ERR
    )


@pytest.mark.parametrize("backend", [b for b in ABLE if b.name != "comfy_kitchen"], ids=lambda b: b.name)
@pytest.mark.parametrize("outlier", [NoOutlier(), HadaNorm(16)], ids=lambda m: m.name)
def test_another_batch_compiles_once_more_and_then_never_again(outlier, backend):
    ours = int8(linear(), outlier, backend=backend)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 9, 40):
            x = randn(batch, 7, K)
            assert torch.equal(compiled(x), ours(x))

    assert graphs.frame_count <= 2, "the first shape and, from the second on, any"
