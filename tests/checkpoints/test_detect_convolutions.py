"""INT8 weights of convolutions in files: read as they are, or refused by a line that says why."""

import json

import pytest
import torch
from safetensors.torch import save_file

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

KERNEL = (3, 2, 3, 3)


def write(folder, shape=KERNEL, name="int8run_conv", **parts):
    """A file with one INT8 kernel; a part that is None is left out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv.weight": torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator),
        "conv.weight_scale": torch.rand(shape[0], 1, generator=generator) + 0.1,
        "conv.comfy_quant": torch.tensor(list(json.dumps({"format": name, "per_row": True}).encode())).byte(),
    }
    for part, value in parts.items():
        tensors[f"conv.{part}"] = value
    path = folder / "x.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return TensorFiles.open(path), tensors


@pytest.mark.parametrize("shape", [KERNEL, (3, 2, 2, 3, 3)], ids=["picture", "video"])
def test_a_kernel_is_read_as_it_is(tmp_path, shape):
    files, tensors = write(tmp_path, shape)

    layer = read_layers(files)["conv"]

    assert layer.is_usable_as_is and layer.label == "int8run_conv, row"
    made = layer.read_int8_layer(files)
    assert torch.equal(made.weight.qdata, tensors["conv.weight"].flatten(1))
    scale = tensors["conv.weight_scale"]
    expected = tensors["conv.weight"] * scale.view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(layer.read_weight(files), expected)


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
