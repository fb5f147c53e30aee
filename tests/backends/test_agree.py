"""Every backend that this machine can run computes what `Reference` does."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import full_range, randn, shipped, usable

from int8run.backends.base import run_plain_layer
from int8run.backends.reference import Reference
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.quant.weight import QuantizedWeight, quantize_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
ABLE = [
    pytest.param(
        backend, device, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device.type == "cuda" else []
    )
    for name, backend in shipped("backend").items()
    for device in DEVICES
    if usable(backend, device) and name != "comfy_kitchen"  # it rounds otherwise: test_comfy_kitchen.py
]
# K = 1 is on its own: the transposed weight then has two strides of 1, and torch 2.13's _int_mm writes
# nothing
SHAPES = [
    (1, 1, 1),
    (2, 8, 1),
    (17, 33, 1),
    (1, 5, 7),
    (3, 5, 7),
    (16, 1, 33),
    (17, 33, 130),
    (31, 64, 20),
    (80, 384, 1536),
]
# float32: the order of scales and bias; bfloat16: one more rounding of the output, which may fall to either
# side
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def run(backend, device, x, weight, bias):
    weight = QuantizedWeight(weight.qdata.to(device), weight.scale.to(device))
    x, bias = x.to(device), None if bias is None else bias.to(device)
    y = run_plain_layer(
        backend,
        x,
        backend.pack_weight(weight),
        weight.scale[:, 0].contiguous(),
        None if bias is None else bias.float(),
    )
    assert y.dtype == x.dtype
    return y.cpu()


def expect_agreement(backend, device, x, weight, bias):
    expected = run_plain_layer(Reference(), x, weight.qdata, weight.scale[:, 0], bias)
    assert_close(backend.name, run(backend, device, x, weight, bias), expected, TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_awkward_shapes(backend, device, m, n, k, with_bias, dtype):
    bias = randn(n, seed=2, dtype=dtype) if with_bias else None
    expect_agreement(backend, device, randn(m, k, dtype=dtype), quantize_weight(randn(n, k, seed=1)), bias)


@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_float16(backend, device):
    x, weight, bias = (
        randn(5, 40, dtype=torch.float16),
        quantize_weight(randn(6, 40, seed=1)),
        randn(6, seed=2, dtype=torch.float16),
    )
    expected = run_plain_layer(Reference(), x, weight.qdata, weight.scale[:, 0], bias)
    assert_close(backend.name, run(backend, device, x, weight, bias), expected, 5e-4)


@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_zero_rows_give_the_bias_exactly(backend, device):
    x, weight, bias = randn(4, 36), quantize_weight(randn(10, 36, seed=1)), randn(10, seed=2)
    x[[0, 2]] = 0
    y = run(backend, device, x, weight, bias)

    assert torch.equal(y[0], bias) and torch.equal(y[2], bias)

    expect_agreement(backend, device, x, weight, bias)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [2, 130, 4096, 16385])
@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_the_largest_sums_do_not_saturate(backend, device, k, sign):
    # 16-bit sums of byte products stop at 32767; unsigned activations reach 255 * 127 * 2
    weight = QuantizedWeight(torch.full((8, k), 127 * sign, dtype=torch.int8), torch.ones(8, 1))
    expect_agreement(backend, device, torch.ones(5, k), weight, None)
    expect_agreement(backend, device, -torch.ones(5, k), weight, None)


@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_integers_over_the_full_range_are_exact(backend, device):
    x, weight = full_range(9, 520).float(), QuantizedWeight(full_range(12, 520, seed=1), torch.ones(12, 1))
    x[:, 0] = 127
    assert torch.equal(run(backend, device, x, weight, None), x @ weight.qdata.float().T)


ROTATIONS = {
    "regular 64": Rotation(regular_hadamard(64)),
    "Sylvester 8": Rotation(sylvester_hadamard(8), sylvester=True),
    "Sylvester 128": Rotation(sylvester_hadamard(128), sylvester=True),
}


def run_rotated(backend, device, x, weight, rotation, factor, gelu_from):
    weight = QuantizedWeight(weight.qdata.to(device), weight.scale.to(device))
    rotation = rotation._replace(matrix=rotation.matrix.to(device))
    quantized = backend.quantize(
        x.to(device),
        factor=None if factor is None else factor.to(device),
        rotation=rotation,
        gelu_from=gelu_from,
    )
    return backend.linear(
        quantized, backend.pack_weight(weight), weight.scale[:, 0].contiguous(), dtype=x.dtype
    ).cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["alone", "after GELU and factor"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_rotations(backend, device, rotation, before, dtype):
    x, weight, factor = (
        2 * randn(9, 384),
        quantize_weight(randn(20, 384, seed=1)),
        randn(384, seed=2).abs() + 0.5,
    )
    steps = (weight, ROTATIONS[rotation], factor if before else None, 100 if before else None)
    y, expected = (
        run_rotated(backend, device, x.to(dtype), *steps),
        run_rotated(Reference(), "cpu", x.to(dtype).float(), *steps),
    )

    # a sum in another order moves an integer at a tie now and then; the eager backends round to bfloat16
    # between the steps
    assert_close(backend.name, y, expected, {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype])


STRIDED = {
    "transposed": lambda: randn(24, 6).T,
    "every second column": lambda: randn(6, 48)[:, ::2],
    # the stride of a size-1 dimension is free; torch._int_mm took it for the row length (pytorch issue
    # 195066)
    "one row, stride 0": lambda: randn(1, 24).as_strided((1, 24), (0, 1)),
    "one row, stride 1": lambda: randn(1, 24).as_strided((1, 24), (1, 1)),
    "one expanded row": lambda: randn(1, 24).expand(6, 24),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_inputs_that_are_not_contiguous(backend, device, layout):
    expect_agreement(
        backend, device, STRIDED[layout](), quantize_weight(randn(10, 24, seed=1)), randn(10, seed=2)
    )


@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_no_rows_at_all(backend, device):
    assert run(backend, device, torch.zeros(0, 12), quantize_weight(randn(5, 12)), None).shape == (0, 5)


@pytest.mark.parametrize(("backend", "device"), ABLE)
def test_the_input_is_left_as_it_was(backend, device):
    x = randn(4, 20)
    before = x.clone()
    run(backend, device, x, quantize_weight(randn(3, 20, seed=1)), None)

    assert torch.equal(x, before)


def test_the_reference_is_among_them():
    assert "reference" in [param.values[0].name for param in ABLE]
