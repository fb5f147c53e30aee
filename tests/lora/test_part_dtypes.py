"""Every dtype of the format in every part of an adapter: it is computed with, or refused by name."""

import json
from math import prod

import pytest
import torch

from int8run.checkpoints.header import DTYPES
from int8run.errors import LoraError
from int8run.lora.load import read_lora

ADAPTERS = {
    "pair": {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "alpha": ()},
    "int8 pair": {
        "lora_down.weight": (4, 8),
        "lora_down.scale_weight": (1,),
        "lora_up.weight": (8, 4),
        "lora_up.scale_weight": (8,),
    },
    "DoRA": {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "dora_scale": (8, 1)},
    "PEFT's DoRA": {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "lora_magnitude_vector": (8,)},
    "bias": {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "lora_B.bias": (8,), "diff_b": (8,)},
    "LoHa": {"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
    "diff": {"diff": (8, 8)},
    "norm": {"w_norm": (8,), "b_norm": (8,)},
    "IA3": {"weight": (8,), "on_input": ()},
}
CASES = [(adapter, part) for adapter, parts in ADAPTERS.items() for part in parts]


def write(path, shapes, dtypes):
    """A file with bytes of 0x38 and 0, which are small numbers in every float."""
    header, data = {}, b""
    for part, shape in shapes.items():
        num_bytes = DTYPES[dtypes[part]].bits * prod(shape) // 8
        header[f"x.{part}"] = {
            "dtype": dtypes[part],
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + num_bytes],
        }
        width = max(DTYPES[dtypes[part]].bits // 8, 1)
        number = b"\1" if dtypes[part] in ("BOOL", "I8", "U8") else bytes(width - 1) + b"\x38"
        data += (number * num_bytes)[:num_bytes]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("adapter", "part"), CASES)
def test_a_part_is_computed_with_or_refused(tmp_path, adapter, part, dtype):
    shapes = ADAPTERS[adapter]
    if DTYPES[dtype].bits * prod(shapes[part]) % 8:
        pytest.skip("the format has no such tensor")
    dtypes = dict.fromkeys(shapes, "F32") | {part: dtype}
    path = write(tmp_path / "style.safetensors", shapes, dtypes)

    try:
        (change,) = read_lora(path).all_changes
    except LoraError as error:
        assert dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"), error
        return
    assert dtype not in ("C64", "U16", "U32", "U64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
    assert dtype != "BOOL" or part == "on_input"
    assert change.weight_delta is not None
    weight = torch.ones(8) if adapter == "norm" else torch.ones(8, 8)
    assert torch.isfinite(change.weight_delta.compute_delta(weight)).all()


@pytest.mark.parametrize(
    ("part", "dtype", "words"),
    [
        (
            "lora_A.weight",
            "BOOL",
            r"x has BOOL numbers in its lora_A \(down\); they may be F32, F16, BF16",
        ),
        ("lora_B.weight", "U16", r"x has U16 numbers in its lora_B \(up\); they may be"),
        ("lora_B.weight", "F4", r"x has F4 numbers in its lora_B \(up\); they may be"),
        ("alpha", "U32", "x has U32 numbers in its alpha; they may be .*I64, I32, I16, I8, U8"),
    ],
)
def test_the_message_names_part_and_dtype(tmp_path, part, dtype, words):
    shapes = ADAPTERS["pair"]
    path = write(tmp_path / "style.safetensors", shapes, dict.fromkeys(shapes, "F32") | {part: dtype})

    with pytest.raises(LoraError, match=words):
        read_lora(path)
