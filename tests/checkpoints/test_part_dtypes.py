"""Every part of a quantized layer in every dtype of the format: read, or refused by name."""

import json
from math import prod
from pathlib import Path

import pytest
import torch

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

# what stands beside a weight: its shape, and the dtypes in which it is usual
LAYERS = {
    "int8": {"weight": ("I8", [8, 64]), "weight_scale": ("F32", [8, 1]), "pre_quant_scale": ("F32", [64])},
    "fp8": {"weight": ("F8_E4M3", [8, 64]), "weight_scale": ("F32", []), "pre_quant_scale": ("F32", [64])},
    "mxfp8": {
        "weight": ("F8_E4M3", [32, 64]),
        "weight_scale": ("U8", [32, 2]),
        "weight_scalar": ("F32", []),
    },
    "nvfp4": {
        "weight": ("U8", [16, 32]),
        "weight_scale": ("F8_E4M3", [16, 4]),
        "weight_scale_2": ("F32", []),
    },
    "toolkit": {
        "weight": ("I8", [8, 64]),
        "weight_scale": ("F32", [8, 1]),
        "quarot_hadamard": ("F32", [4, 4]),
        "hadanorm_sigma": ("F32", [64]),
    },
    "quip": {
        "weight": ("I8", [8, 64]),
        "weight_scale": ("F32", [8, 1]),
        "hadamard_quip": ("I64", []),
        "hadamard_size_out": ("I64", []),
        "hadamard_size_in": ("I64", []),
        "sign_row": ("I8", [8]),
        "sign_col": ("I8", [64]),
    },
}
CASES = [(layer, part) for layer, parts in LAYERS.items() for part in parts]


def write_layer(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A file whose numbers are ones, where the dtype has a one that is known here."""
    header, data = {}, b""
    for part, (dtype, shape) in tensors.items():
        torch_dtype = getattr(torch, DTYPES[dtype].torch_name or "absent", None)
        if torch_dtype is None:
            content = b"\x11" * (-(-DTYPES[dtype].bits * prod(shape) // 8))
        else:
            ones = torch.ones(prod(shape)).to(torch_dtype)
            content = ones.view(torch.uint8).numpy().tobytes()
        header[f"a.{part}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(("layer", "part"), CASES, ids=["-".join(case) for case in CASES])
def test_part_of_any_dtype_is_read_or_refused_by_name(layer: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    refused = []
    for dtype, stored in DTYPES.items():
        tensors = dict(LAYERS[layer])
        shape = tensors[part][1]
        if stored.bits * prod(shape) % 8:
            continue
        tensors[part] = (dtype, shape)
        write_layer(path, tensors)
        with TensorFiles.open(path) as files:
            try:
                for found in read_layers(files).values():
                    found.read_weight(files)
            except FileError as error:
                assert "\n" not in str(error)
                refused.append(dtype)
    assert {"U64", "U32", "U16", "C64"} <= set(refused)


@pytest.mark.parametrize("part", ["pre_quant_scale", "weight_scale"])
def test_refusal_says_what_is_allowed(part: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_layer(path, LAYERS["int8"] | {part: ("U16", LAYERS["int8"][part][1])})
    with (
        TensorFiles.open(path) as files,
        pytest.raises(FileError, match=rf"m.safetensors: a.{part} is U16.* F32, F16, BF16, F64"),
    ):
        read_layers(files)
