"""INT8 weights of convolutions in files: read as they are, or refused by a line that says why."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import randn

from int8run.checkpoints.comfy_int8 import encode_int8_marker, is_conv_shape
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.outlier.base import OutlierTransform, fit_convolution
from int8run.outlier.convrot import ConvRot
from int8run.outlier.quarot import QuaRot
from int8run.quant.weight import quantize_weight, sqnr_db

KERNEL = (3, 2, 3, 3)


def write(folder, shape=KERNEL, name="int8run_conv", rotation=None, **parts):
    """A file with one INT8 kernel; a part that is None is left out."""
    marker = {"format": name, "per_row": True, **(rotation or {})}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv.weight": torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator),
        "conv.weight_scale": torch.rand(shape[0], 1, generator=generator) + 0.1,
        "conv.comfy_quant": torch.tensor(list(json.dumps(marker).encode())).byte(),
    }
    for part, value in parts.items():
        tensors[f"conv.{part}"] = value
    path = folder / "x.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return TensorFiles.open(path), tensors


@pytest.mark.parametrize("shape", [KERNEL, (3, 2, 2, 3, 3)], ids=["image", "video"])
def test_a_kernel_is_read_as_it_is(tmp_path, shape):
    files, tensors = write(tmp_path, shape)

    layer = read_layers(files)["conv"]

    assert layer.is_usable_as_is and layer.label == "int8run_conv, row"
    made = layer.read_int8_layer(files)
    assert torch.equal(made.weight.qdata, tensors["conv.weight"].flatten(1))
    scale = tensors["conv.weight_scale"]
    expected = tensors["conv.weight"] * scale.view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(layer.read_weight(files), expected)


ROTATED = {"outlier": "convrot", "settings": {"group_size": 4}, "rotation": "regular", "group_size": 4}


@pytest.mark.parametrize("method", [ConvRot(16), QuaRot(8)], ids=["convrot", "quarot"])
def test_a_rotated_kernel_comes_back_with_its_method(tmp_path, method):
    weight = randn(3, 16, 3, 2)
    transform = fit_convolution(method, weight.flatten(1), taps=6)
    quantized = quantize_weight(transform.transform_weight(weight.flatten(1)))
    entries = {
        "conv.weight": quantized.qdata.view_as(weight),
        "conv.weight_scale": quantized.scale,
        "conv.comfy_quant": torch.tensor(list(encode_int8_marker(transform, is_conv=True))).byte(),
    }
    save_file(entries, tmp_path / "x.safetensors")
    files = TensorFiles.open(tmp_path / "x.safetensors")

    layer = read_layers(files)["conv"]

    made = layer.read_int8_layer(files)
    assert made.transform.label == transform.label and made.transform.taps == 6
    assert made.transform.has_same_input_transform(transform)
    assert torch.equal(made.weight.qdata, quantized.qdata)
    assert layer.label == f"int8run_conv, row, {method.name} {method.group_size}"
    assert sqnr_db(weight, layer.read_weight(files)) > 40, "the rotation is undone"


def test_a_kernel_without_a_method_has_the_marker_of_earlier_files():
    marker = json.loads(encode_int8_marker(OutlierTransform(taps=9), is_conv=True))

    assert marker == {"format": "int8run_conv", "per_row": True}


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (ROTATED | {"group_size": 3}, "names groups of 3; rotated are groups of a power of 2"),
        (ROTATED | {"group_size": 8}, "names groups of 8; a regular matrix needs a power of 4"),
        (ROTATED, r"names groups of 4; rotated are groups of up to 1024 that divide its 2 channels"),
        (ROTATED | {"rotation": "random"}, "says int8run_conv and lacks what such a marker holds"),
        ({"outlier": "convrot"}, "says int8run_conv and lacks what such a marker holds"),
        (ROTATED | {"settings": {"group_size": "4"}}, "says int8run_conv and lacks what"),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(tmp_path, rotation, message):
    files, _ = write(tmp_path, rotation=rotation)

    with pytest.raises(FileError, match=message):
        read_layers(files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": (3, 2)},
            r"conv.weight is I8 \[3, 2\] and marked int8run_conv; such a weight is \[N, C, height",
        ),
        ({"weight_scale": None}, "has no weight_scale; such a weight has a weight_scale and a marker alone"),
        ({"pre_quant_scale": torch.ones(2)}, "has conv.pre_quant_scale; such a weight"),
        ({"weight_scale": torch.zeros(3, 1)}, "conv.weight_scale"),
        ({"weight_scale": torch.ones(1)}, "conv.weight_scale"),
        (
            {"name": "int8_tensorwise"},
            r"conv.weight is I8 \[3, 2, 3, 3\]; int8run reads int8 weights \[N, K\]",
        ),
    ],
)
def test_what_is_no_such_kernel_is_refused(tmp_path, changes, message):
    files, _ = write(tmp_path, **changes)

    with pytest.raises(FileError, match=message):
        read_layers(files)


@pytest.mark.parametrize(
    ("shape", "is_conv"),
    [
        ((3, 2), False),
        ((3, 2, 3), False),
        (KERNEL, True),
        ((3, 2, 1, 3, 3), True),
        ((3, 2, 1, 1, 3, 3), False),
    ],
    ids=str,
)
def test_kernels_over_images_and_videos_are_those_of_convolutions(shape, is_conv):
    # a Conv1d and the experts of a mixture have three dimensions, and stay float from file to file
    assert is_conv_shape(shape) == is_conv
