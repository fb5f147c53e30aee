"""The dtype of a quantized weight that is to be float: the most frequent one of the floats beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.kept_dtype import find_kept_dtype
from int8run.checkpoints.reader import TensorFiles

FP8 = {
    "m.a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "m.a.weight_scale": torch.ones((), dtype=torch.float32),
    "m.a.input_scale": torch.ones((), dtype=torch.float32),
}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "nothing": ({}, "BF16", "the source has no float tensor that shows another dtype"),
    "one": ({"m.a.bias": F16}, "F16", "as 1 of the 1 float tensors of the source"),
    "most": ({"m.a.bias": F32, "m.b.bias": F16, "m.c.weight": F32}, "F32", "as 2 of the 3 float tensors"),
    "as many of each": ({"m.a.bias": F32, "m.b.bias": BF16}, "BF16", "as 1 of the 2 float tensors"),
    "outside of the model": ({"vae.bias": F32, "vae.a": F32, "m.b.bias": F16}, "F16", "as 1 of the 1"),
    "no float": ({"m.ids": torch.int64}, "BF16", "the source has no float tensor"),
}


@pytest.mark.parametrize(("beside", "name", "reason"), CASES.values(), ids=CASES)
def test_most_frequent_dtype_counts(
    beside: dict[str, torch.dtype], name: str, reason: str, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {key: torch.ones(4, dtype=dtype) for key, dtype in beside.items()}
    save_file(FP8 | tensors, tmp_path / "m.safetensors")
    with TensorFiles.open(tmp_path / "m.safetensors") as files:
        found = find_kept_dtype(files, read_layers(files, "m."), "m.")
    assert found.name == name
    assert found.reason.startswith(reason)
