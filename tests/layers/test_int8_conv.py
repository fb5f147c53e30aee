"""INT8 convolutions: against torch's own, in every geometry that has one, with branches, and their limits."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import randn
from torch import nn

from int8run.backends import convolution
from int8run.backends.convolution import ReferenceConv, TritonConv, choose_conv_backend, read_geometry
from int8run.kernels.int8_conv.reference import int8_conv as REFERENCE_KERNEL
from int8run.layers.int8_conv import Int8Conv, find_conv_obstacle, get_layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.padding_conv import put_inside
from int8run.layers.plan import CONV, plan_layers
from int8run.outlier.base import fit_convolution
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.weight import quantize_weight, sqnr_db

NO_OUTLIER = NoOutlier()
REFERENCE, CPU = ReferenceConv(), choose_conv_backend(torch.device("cpu"), "auto")
GEOMETRIES = {
    "1x1": nn.Conv2d(8, 6, 1),
    "3x3": nn.Conv2d(8, 6, 3, padding=1),
    "stride 2": nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "groups": nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "odd channels, no bias": nn.Conv2d(7, 5, 3, bias=False),
    "padding=same": nn.Conv2d(8, 6, (3, 5), padding="same"),
    "video": nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)),
}


# a rotation for geometries whose groups have 4 or 8 channels
ROTATED = {"3x3": ConvRot(4), "groups": ConvRot(4), "stride 2": QuaRot(8), "video": QuaRot(2)}


def make_int8(conv, backend=REFERENCE, dtype=torch.float32, method=NO_OUTLIER):
    weight = conv.weight.detach().flatten(1)
    transform = fit_convolution(method, weight, conv.weight[0, 0].numel())
    quantized = quantize_weight(transform.transform_weight(weight))
    return Int8Conv(QuantizedLayer(quantized, transform, conv.bias), backend, conv, dtype)


def draw_input(conv, batch=2, size=6):
    return randn(batch, conv.in_channels, *[size] * len(conv.kernel_size))


@pytest.mark.parametrize("conv", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_an_int8_convolution_is_near_the_float_one(conv):
    x = draw_input(conv)

    y = make_int8(conv)(x)

    expected = conv(x)
    assert y.shape == expected.shape and y.dtype == x.dtype
    assert sqnr_db(expected, y) > 32


@pytest.mark.parametrize("conv", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_the_integers_come_back_out_of_a_layer(conv):
    weight = quantize_weight(conv.weight.detach().flatten(1))

    for backend in (REFERENCE, CPU):
        read = make_int8(conv, backend).read_quantized_weight()

        assert torch.equal(read.qdata, weight.qdata) and torch.equal(read.scale, weight.scale)


@pytest.mark.parametrize("conv", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_the_kernels_of_the_cpu_compute_what_the_definition_does(conv):
    x = draw_input(conv)

    assert sqnr_db(make_int8(conv)(x), make_int8(conv, CPU)(x)) > 90


@pytest.mark.parametrize(("name", "method"), ROTATED.items(), ids=ROTATED)
@torch.no_grad()
def test_a_rotated_convolution_is_near_the_float_one_on_every_backend(name, method):
    conv = GEOMETRIES[name]
    x = draw_input(conv)

    by_definition = make_int8(conv, method=method)(x)

    assert sqnr_db(conv(x), by_definition) > 32
    assert sqnr_db(by_definition, make_int8(conv, CPU, method=method)(x)) > 90


@torch.no_grad()
def test_a_rotation_brings_what_channel_outliers_cost():
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv2d(256, 16, 3, padding=1)
    conv.weight.normal_(generator=generator)
    x = torch.randn(1, 256, 8, 8, generator=generator)
    x[:, 5] *= 50

    plain = sqnr_db(conv(x), make_int8(conv, CPU)(x))
    rotated = sqnr_db(conv(x), make_int8(conv, CPU, method=ConvRot(256))(x))

    assert rotated > plain + 4


@torch.no_grad()
def test_a_rotated_convolution_in_half_precision_runs_by_the_definition():
    conv = GEOMETRIES["3x3"]
    layer = make_int8(conv, method=QuaRot(8)).to(torch.bfloat16)

    y = layer(draw_input(conv).bfloat16())

    assert sqnr_db(conv(draw_input(conv)), y.float()) > 28


@torch.no_grad()
def test_images_of_one_pixel_no_images_and_one_without_a_batch():
    conv = GEOMETRIES["3x3"]
    layer = make_int8(conv)

    assert sqnr_db(conv(draw_input(conv, size=1)), layer(draw_input(conv, size=1))) > 32
    assert layer(draw_input(conv, batch=0)).shape == (0, 6, 6, 6)
    assert torch.equal(layer(draw_input(conv)[0]), layer(draw_input(conv))[0])


@pytest.mark.parametrize("method", [NO_OUTLIER, ConvRot(4)], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", ["3x3", "groups", "stride 2", "video"])
@torch.no_grad()
def test_a_branch_adds_the_change_of_the_weight(name, method):
    conv = GEOMETRIES[name]
    layer, x = make_int8(conv, method=method), draw_input(conv)
    columns = conv.weight[0].numel()
    lora_A, lora_B = randn(3, columns, seed=1), randn(6, 3, seed=2)
    branch = layer.make_branch([(lora_A, lora_B)])
    before = layer(x)

    layer.set_adapter(branch)
    assert torch.equal(layer(x), before), "at strength 0 it is not there"
    branch.set_strengths([0.5])

    change = (0.5 * lora_B @ lora_A).reshape(conv.weight.shape)
    geometry = read_geometry(conv)
    convolve = F.conv2d if len(geometry.kernel) == 2 else F.conv3d
    added = convolve(x, change, stride=geometry.stride, padding=geometry.padding, groups=geometry.groups)
    torch.testing.assert_close(layer(x), before + added, rtol=1e-4, atol=1e-4)


class Padding(nn.Conv2d):
    """As causal convolutions do it: one side is padded, and the base class convolves."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0, 0, 0)))


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "a transposed convolution"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"a dilated convolution \(dilation 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode=reflect"),
        (nn.Conv2d(4, 4, 3, groups=4), "a depthwise convolution"),
        (nn.Conv1d(4, 4, 3), "a Conv1d, INT8 has Conv2d and Conv3d"),
        (Padding(4, 4, 3), "a Padding, which may compute something else"),
        (nn.Conv2d(4, 4, 2, padding="same"), "differs from side to side"),
    ],
)
def test_other_convolutions_stay_float_and_say_why(conv, reason):
    model = nn.Sequential(conv)

    (plan,) = plan_layers(model, lambda name: None, convolutions="int8")

    assert plan.kind == CONV
    with pytest.raises(AssertionError, match=reason):
        assert plan.skip_reason is None, plan.skip_reason


def test_a_plan_describes_a_convolution():
    model = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.Linear(3, 3))

    plan, _ = plan_layers(model, lambda name: "first" if name == "0" else None, convolutions="auto")

    assert (plan.in_features, plan.out_features, plan.num_weights) == (36, 6, model[0].weight.numel())
    assert (plan.shape, plan.skip_reason) == ("3x3 stride 2 groups 2", "first")
    assert [p.kind for p in plan_layers(model, lambda name: None)] == ["linear"], "float: no plan"


@torch.no_grad()
def test_a_subclass_that_pads_keeps_its_class_and_computes_inside():
    conv = Padding(4, 6, 3)
    assert find_conv_obstacle(conv, known_subclasses=["Padding"]) is None
    x = randn(2, 4, 5, 5)

    inside = put_inside(conv, make_int8(conv))

    assert isinstance(inside, Padding) and list(inside.parameters()) == []
    assert sqnr_db(conv(x), inside(x)) > 32
    assert conv.weight is not None, "the float one stays as it is"

    loaded = pickle.loads(pickle.dumps(inside))
    assert type(loaded) is type(inside) and loaded.int8 is not inside.int8
    assert torch.equal(loaded(x), inside(x))


def test_a_layer_moves_and_keeps_its_numbers():
    layer = make_int8(GEOMETRIES["3x3"])

    layer.to(torch.float16)

    assert (layer.packed.dtype, layer.scale.dtype) == (torch.int8, torch.float32)


def test_the_definition_is_used_where_it_is_asked_for():
    assert isinstance(choose_conv_backend(torch.device("cpu"), "reference"), ReferenceConv)


def test_a_gpu_gets_the_triton_kernels_with_the_geometry(monkeypatch):
    calls = []
    kernel = SimpleNamespace(
        pack_weight=lambda qdata: qdata,
        unpack_weight=lambda packed, shape: packed,
        int8_conv=lambda x, packed, w_scale, bias, *, kernel_shape, groups, tile, **geometry: (
            calls.append((kernel_shape, tile))
            or REFERENCE_KERNEL(x, packed, w_scale, bias, groups=groups, **geometry)
        ),
    )
    monkeypatch.setattr(convolution, "load_triton_kernel", lambda: kernel)
    for conv in GEOMETRIES.values():
        x = draw_input(conv)

        y = make_int8(conv, TritonConv("sm_90"))(x)

        assert torch.equal(y, make_int8(conv)(x))
        assert calls.pop()[0] == tuple(conv.weight.shape)
    x, rotated = draw_input(conv), QuaRot(4)
    assert torch.equal(
        make_int8(conv, TritonConv("sm_90"), method=rotated)(x), make_int8(conv, method=rotated)(x)
    )


def test_a_device_without_kernels_gets_the_definition_and_says_so(caplog):
    convolution.report_definition.cache_clear()
    backends = [choose_conv_backend(torch.device("mps"), "auto") for _ in range(2)]

    assert all(isinstance(backend, ReferenceConv) for backend in backends)
    assert caplog.text.count("INT8 convolutions have none but the slow definition on mps") == 1


def test_only_linears_and_convolutions_are_layers():
    with pytest.raises(TypeError, match="is a ReLU"):
        get_layer(nn.Sequential(nn.ReLU()), "0")


def test_sizes_of_outputs_are_those_of_torch():
    conv = nn.Conv3d(4, 4, (3, 2, 1), stride=(2, 1, 3), padding=(1, 0, 2))
    x = randn(1, 4, 7, 8, 9)

    assert read_geometry(conv).compute_output_size(x.shape[2:]) == conv(x).shape[2:]
    assert replace(read_geometry(conv), stride=(1, 1, 1)).label == "3x2x1 stride 1"
