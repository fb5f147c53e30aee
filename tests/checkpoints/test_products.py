"""Scales and codes that are finite and whose product is not: refused by layer, or read where it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

N, K = 6, 64
CODES = torch.arange(N * K).reshape(N, K) % 255 - 127
E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def make_int8(scale: Tensor) -> dict[str, Tensor]:
    return {"a.weight": CODES.to(torch.int8), "a.weight_scale": scale}


def make_fp8(scale: Tensor, dtype: torch.dtype = E4M3) -> dict[str, Tensor]:
    return {"a.weight": CODES.float().to(dtype), "a.weight_scale": scale}


def make_rows(value: float) -> Tensor:
    scale = torch.full((N, 1), 0.01)
    scale[3] = value
    return scale


OVERFLOWS = {
    "int8, one row": make_int8(make_rows(3e38)),
    "int8, the whole weight": make_int8(torch.tensor(3e38)),
    "int8, products that are finite and sums that are not": make_int8(make_rows(2e36)),
    "int8, double precision": make_int8(make_rows(3e38).double()),
    "int8, groups": make_int8(make_rows(3e38).expand(N, 4).contiguous()),
    "int8, [in, out]": {
        "a.weight": CODES.T.contiguous().to(torch.int8),
        "a.weight_scale": make_rows(3e38).T.contiguous(),
    },
    "int8, a small factor": make_int8(make_rows(0.01)) | {"a.pre_quant_scale": torch.full((K,), 1e-38)},
    "e4m3, one row": make_fp8(make_rows(3e38)),
    "e4m3, the whole weight": make_fp8(torch.tensor(1e36)),
    "e5m2, one row": make_fp8(make_rows(3e38), E5M2),
    "mxfp8": {
        "a.weight": CODES.float().to(E4M3),
        "a.weight_scale": torch.full((N, 2), 250, dtype=torch.uint8),
        "a.bias": torch.zeros(N),
    },
    "nvfp4": {
        "a.weight": torch.full((16, K // 2), 0x77, dtype=torch.uint8),
        "a.weight_scale": torch.full((16, 4), 400.0).to(E4M3),
        "a.weight_scale_2": torch.tensor(3e38),
    },
}


@pytest.mark.parametrize("tensors", OVERFLOWS.values(), ids=OVERFLOWS)
def test_layer_whose_products_overflow_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    with (
        TensorFiles.open(tmp_path / "m.safetensors") as files,
        pytest.raises(FileError, match=r"m.safetensors: a has numbers up to .*; products with them overflow"),
    ):
        read_layers(files)


FITS = {
    "int8, usual": make_int8(make_rows(0.5)),
    "int8, large": make_int8(make_rows(1e25)),
    "int8, a huge scale of a row of zeros": make_int8(make_rows(3e38))
    | {"a.weight": torch.where(torch.arange(N)[:, None] == 3, 0, CODES).to(torch.int8)},
    "e4m3, large": make_fp8(make_rows(1e25)),
    "e4m3, without a scale": {"a.weight": CODES.float().to(E4M3)},
    "e5m2, large": make_fp8(make_rows(1e25), E5M2),
}


@pytest.mark.parametrize("tensors", FITS.values(), ids=FITS)
def test_layer_that_can_be_computed_is_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    with TensorFiles.open(tmp_path / "m.safetensors") as files:
        weight = read_layers(files)["a"].read_weight(files)
    scale = tensors.get("a.weight_scale", torch.tensor(1.0)).float()
    assert torch.equal(weight, tensors["a.weight"].float() * scale)
    inputs = torch.full((K,), 65504.0)
    assert (weight @ inputs).isfinite().all()
