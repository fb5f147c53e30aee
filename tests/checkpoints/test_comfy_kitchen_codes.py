"""Codes of 4 and 6 bits that comfy-kitchen 0.2.40 made are read as it reads them, bit by bit.

`experiments/w4a8/exchange.py --golden` wrote them, and compares more where the package is installed.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles

GOLDEN = Path(__file__).parents[1] / "data" / "comfy_kitchen_codes.safetensors"
NUMBERS = range(10)


@pytest.mark.parametrize("number", NUMBERS)
def test_codes_are_read_as_their_maker_reads_them(number: int, tmp_path: Path) -> None:
    golden = load_file(GOLDEN)
    name = f"layer{number}"
    own = {key: tensor for key, tensor in golden.items() if key.startswith(f"{name}.")}
    save_file(own, tmp_path / "file.safetensors")

    with TensorFiles.open(tmp_path / "file.safetensors") as files:
        layer = read_layers(files)[name]
        integers = layer.read_grouped_weight(files, slice(0, layer.rows)).decode().qdata
        weight = layer.read_weight(files)

    assert torch.equal(integers, golden[f"expected{number}.int8"])
    # a rotation sums in the order of the CPU's matrix product
    assert torch.allclose(weight, golden[f"expected{number}.weight"], rtol=1e-5, atol=1e-8)
    error = (weight - golden["float"]).norm() / golden["float"].norm()
    assert error < 0.13
