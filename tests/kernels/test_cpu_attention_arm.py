"""Attention for Arm, cross-compiled and run by an emulator: the same bits as those of this CPU."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from support.helpers import CPU, randn
from torch import Tensor

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu.attention import describe_call, int8_attention
from int8run.kernels.cpu.instructions import INSTRUCTION_SETS

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in (COMPILER, EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user)"
    ),
    pytest.mark.skipif(bool(REFUSED), reason=f"nothing to compare with: {'; '.join(REFUSED)}"),
]
DRIVER = Path(__file__).with_name("arm_attention_driver.cpp")
FLAGS = ("-O2", "-std=c++17", "-static", "-w", "-ffp-contract=off")


def list_cases():
    """Operands and options: q, k, v, mask and the rest."""
    shapes = [(4, 2, 7, 77, 64, 64), (2, 1, 37, 300, 128, 40), (1, 1, 13, 257, 7, 3), (1, 1, 1, 1, 1, 1)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads, key_heads, queries, keys, width, value_width in shapes:
            q = randn(1, heads, queries, width, seed=1, dtype=dtype)
            k = randn(1, key_heads, keys, width, seed=2, dtype=dtype)
            v = randn(1, key_heads, keys, value_width, seed=3, dtype=dtype)
            hidden, added = randn(queries, keys, seed=4) > -1, randn(queries, keys, seed=5, dtype=dtype)
            yield q, k, v, None, {}
            yield q, k, v, hidden, {"is_causal": True}
            yield q, k, v, added, {"scale": -0.2, "center_keys": True}
            for rotation in (16, 32, 64, 128):
                if width % rotation == 0:
                    yield q, k, v, None, {"rotation": rotation}
    k = k.clone()
    k[0, 0, 0, 0] = torch.nan
    yield q, k, v, None, {}


def as_bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return b""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", ["i8mm", "dotprod"])
def test_arm_gives_the_same_bits(name, tmp_path):
    flags, source = INSTRUCTION_SETS[name].flags, INSTRUCTION_SETS[name].source
    sources = (str(source.with_name(f"attention_{name}.cpp")), str(DRIVER))
    program = tmp_path / name
    subprocess.run([COMPILER, *FLAGS, *flags, *sources, "-o", str(program)], check=True)
    cases = list(list_cases())
    inputs, expected = [], []
    for q, k, v, mask, options in cases:
        output = int8_attention(q, k, v, mask=mask, **options)
        call = describe_call(q, k, v, output, mask, **options)
        call.threads = 1
        expected.append(as_bytes(output.transpose(1, 2)))
        inputs += [bytes(call), struct.pack("<q", len(expected[-1]))]
        for tensor in (q, k, v, mask):
            inputs += [struct.pack("<q", len(as_bytes(tensor))), as_bytes(tensor)]
    (tmp_path / "in").write_bytes(struct.pack("<q", len(cases)) + b"".join(inputs))
    subprocess.run([EMULATOR, "-cpu", "max", program, tmp_path / "in", tmp_path / "out"], check=True)

    output = (tmp_path / "out").read_bytes()
    assert len(output) == sum(map(len, expected))
    for (q, k, _, _, options), data in zip(cases, expected, strict=True):
        assert output[: len(data)] == data, (q.dtype, q.shape, k.shape, options)
        output = output[len(data) :]
