"""Finite parts with an infinite product are refused, and the largest that are not can be computed with."""

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import randn
from torch import nn

from int8run import LoraStack, quantize_
from int8run.errors import LoraError
from int8run.lora.load import read_lora

RANK, IN, OUT = 4, 6, 5
A, B = randn(RANK, IN), randn(OUT, RANK, seed=1)
PAIR = {"lora_A.weight": A, "lora_B.weight": B}
LOHA = {"hada_w1_a": B, "hada_w1_b": A, "hada_w2_a": B, "hada_w2_b": A}
LOKR = {"lokr_w1": randn(2, 3), "lokr_w2": randn(5, 4, seed=1)}


@pytest.fixture
def read(tmp_path):
    def read(parts):
        path = tmp_path / "style.safetensors"
        save_file({f"x.{part}": tensor.clone() for part, tensor in parts.items()}, path)
        (change,) = read_lora(path).all_changes
        return change

    return read


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (PAIR | {"alpha": torch.tensor(3e38)}, "x changes a weight by up to .*; at most 1e[+]15"),
        (PAIR | {"alpha": torch.tensor(1e300, dtype=torch.float64)}, "x changes a weight by up to"),
        ({"lora_A.weight": A * 1e10, "lora_B.weight": B * 1e10}, "x changes a weight by up to"),
        (
            {"lora_A.weight": A * 1e30, "lora_B.weight": B * 1e-30},
            r"x has values up to .* in its lora_A \(down\)",
        ),
        (PAIR | {"lora_B.bias": torch.full((OUT,), 1e30)}, "x has values up to 1e[+]30 in its up_bias"),
        (
            PAIR | {"dora_scale": torch.full((OUT, 1), 3e38)},
            "x has values up to 3e[+]38 in its dora_scale; at most 1e[+]06",
        ),
        (
            PAIR | {"lora_magnitude_vector": torch.full((OUT,), 1e7)},
            "x has values up to 1e[+]07 in its magnitude",
        ),
        ({part: tensor * 1e10 for part, tensor in LOHA.items()}, "x changes a weight by up to"),
        ({part: tensor * 1e9 for part, tensor in LOKR.items()}, "x changes a weight by up to"),
        ({"diff": torch.full((OUT, IN), 1e30)}, "x has values up to 1e[+]30 in its diff"),
        ({"w_norm": torch.full((OUT,), 1e30)}, "x has values up to 1e[+]30 in its w_norm"),
        ({"diff_b": torch.full((OUT,), 1e30)}, "x has values up to 1e[+]30 in its diff_b"),
        (
            {"oft_blocks": torch.full((2, 3, 3), 1e7)},
            "x has values up to 1e[+]07 in its oft_blocks; at most 1e[+]06",
        ),
        (
            {"oft_blocks": torch.zeros(2, 3, 3), "rescale": torch.full((6,), 3e38)},
            "x has values up to 3e[+]38 in its rescale",
        ),
        ({"weight": torch.full((OUT,), 1e30), "on_input": torch.tensor(False)}, "x has values up to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_change_that_is_not_finite_is_refused(read, parts, words):
    with pytest.raises(LoraError, match=f"style.safetensors: {words}.*the file is broken"):
        read(parts)


@pytest.mark.parametrize(
    "parts", [PAIR, PAIR | {"dora_scale": torch.full((OUT, 1), 1e6)}, LOHA, LOKR], ids=str
)
def test_what_is_just_allowed_is_computed(read, parts):
    largest = read(parts | {"alpha": torch.tensor(1e11)}).weight_delta

    weight = randn(*((OUT, IN) if parts is not LOKR else (10, 12)), seed=2)
    for strength in (-20, 20):
        assert torch.isfinite(strength * largest.compute_delta(weight)).all()


@pytest.mark.parametrize("magnitude", [1.0, 1e6])
def test_a_row_of_zeros_stays_zero(read, magnitude):
    dora = read(
        {
            "lora_A.weight": A,
            "lora_B.weight": torch.zeros_like(B),
            "dora_scale": torch.full((OUT, 1), magnitude),
        }
    ).weight_delta
    weight = randn(OUT, IN, seed=2)
    weight[1] = 0

    delta = dora.compute_delta(weight)

    assert torch.isfinite(delta).all() and (delta[1] == 0).all()
    assert torch.allclose((weight + delta)[0].norm(), torch.tensor(magnitude), rtol=1e-5)
    branch = dora.make_branch(weight)
    assert torch.isfinite(branch.row_factor).all() and (branch.lora_B[1] == 0).all()


@pytest.mark.parametrize("is_int8", [False, True])
def test_what_float16_cannot_hold_is_refused(tmp_path, is_int8):
    path = tmp_path / "style.safetensors"
    save_file({"x.lora_A.weight": torch.ones(2, 32) * 300, "x.lora_B.weight": torch.ones(64, 2) * 300}, path)
    model = nn.ModuleDict({"x": nn.Linear(32, 64)}).half()
    if is_int8:
        quantize_(model, backend="reference", model_type="none")
    inputs = randn(3, 32, seed=4).half()
    before = model["x"](inputs)

    with pytest.raises(
        LoraError, match=r"^x gets values up to .* and float16 holds at most 65504; load the model in"
    ):
        LoraStack(model).add(path)

    assert torch.equal(model["x"](inputs), before)
    if is_int8:
        return  # its factors are kept apart from the strength
    stack = LoraStack(model).add(path, 0.01)
    with pytest.raises(LoraError, match=r"^x gets values up to"):
        stack.set_strength("style", 1.0)
    assert torch.isfinite(model["x"](inputs)).all()
