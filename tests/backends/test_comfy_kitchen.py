"""`backend=comfy_kitchen`: the optional package computes our layer, with its own roundings."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import CPU, randn, usable

from int8run.backends.base import run_plain_layer
from int8run.backends.comfy_kitchen import ComfyKitchen
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.kernels.quantize_rowwise.reference import transform_rows
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.weight import quantize_weight

needs_package = pytest.mark.skipif(
    not usable(ComfyKitchen(), CPU), reason="; ".join(ComfyKitchen.limits.unsupported_reasons(CPU))
)


@needs_package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot(), QuaRot()], ids=lambda m: m.name)
def test_close_to_the_float_layer(outlier, dtype):
    x, weight, bias = randn(20, 256, dtype=dtype), randn(40, 256, seed=1), randn(40, seed=2)
    transform = outlier.fit(weight)
    layer = Int8Linear(
        QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, bias),
        ComfyKitchen(),
        dtype,
    )

    assert_close("layer", layer(x).float(), x.float() @ weight.T + bias, 0.02)


@needs_package
def test_close_to_the_definition():
    x, weight = randn(5, 40), quantize_weight(randn(16, 40, seed=1))
    expected = (x @ weight.dequantize().T).float()
    assert_close(
        "product",
        run_plain_layer(ComfyKitchen(), x, weight.qdata, weight.scale[:, 0].contiguous(), None),
        expected,
        0.02,
    )


def test_the_product_is_left_a_regular_rotation_and_no_other():
    x, factor = randn(5, 256), randn(256, seed=1)
    regular, sylvester = Rotation(regular_hadamard(64)), Rotation(sylvester_hadamard(128), sylvester=True)
    left, done = (
        ComfyKitchen().quantize(x, factor=factor, rotation=rotation, gelu_from=0)
        for rotation in (regular, sylvester)
    )

    assert left.rotation == 64 and torch.equal(left.q, transform_rows(x, factor, None, 0))
    assert done.rotation == 0 and torch.equal(done.q, transform_rows(x, factor, sylvester, 0))


def test_without_the_package_the_reason_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        "needs the Python package comfy_kitchen (pip install comfy-kitchen)"
        in ComfyKitchen.limits.unsupported_reasons(CPU)
    )
