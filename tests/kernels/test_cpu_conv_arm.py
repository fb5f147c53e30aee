"""Convolutions for Arm, cross-compiled and run by an emulator: the same bits as those of this CPU."""

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from support.helpers import CPU, full_range, randn
from torch import Tensor

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import conv
from int8run.kernels.cpu.instructions import INSTRUCTION_SETS
from int8run.kernels.int8_conv.reference import GroupNorm, as_sizes

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in (COMPILER, EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user)"
    ),
    pytest.mark.skipif(bool(REFUSED), reason=f"nothing to compare with: {'; '.join(REFUSED)}"),
]
DRIVER = Path(__file__).with_name("arm_conv_driver.cpp")
FLAGS = ("-O2", "-std=c++17", "-static", "-w", "-ffp-contract=off")
# shape, outputs, kernel, stride, padding
SHAPES = [
    ((3, 5, 1, 1), 7, (3, 3), 1, 1),
    ((2, 13, 9, 7), 70, (3, 3), 1, 1),
    ((1, 40, 20, 20), 130, (3, 3), 2, 1),
    ((1, 64, 15, 15), 64, (1, 1), 1, 0),
    ((1, 16, 3, 5, 6), 10, (3, 3, 3), (1, 2, 1), 1),
]
# rotation, sylvester, silu, whether every channel is normalized
STEPS = [
    (0, False, False, False),
    (0, False, True, True),
    (4, False, True, False),
    (16, False, False, True),
    (8, True, False, False),
]


def list_cases():
    """Images in both layouts, and what follows them."""
    for shape, steps, dtype in itertools.product(SHAPES, STEPS, conv.DTYPES):
        if steps[0] and shape[0][1] % steps[0]:
            continue
        x = 3 * randn(*shape[0], dtype=dtype)
        yield x, shape, steps
        yield x.contiguous(memory_format=conv.CHANNELS_LAST[x.dim()]), shape, steps


def as_field(tensor: Tensor | None) -> bytes:
    """A length in bytes and as many bytes, as they lie in memory."""
    if tensor is None:
        return struct.pack("<q", 0)
    data = bytes(tensor.contiguous().view(torch.uint8).numpy())
    return struct.pack("<q", len(data)) + data


def describe_case(x, shape, steps):
    """What the driver reads, and the bytes that it must write."""
    _, outputs, kernel, stride, padding = shape
    rotation, sylvester, silu, has_norm = steps
    norm_groups = x.shape[1] if has_norm else 0
    packed = conv.pack_conv_weight(full_range(outputs, x.shape[1], *kernel, seed=1))
    w_scale, bias = 0.01 * randn(outputs, seed=2).abs(), randn(outputs, seed=3) if outputs % 2 else None
    options = {
        "stride": stride,
        "padding": padding,
        "rotation": rotation,
        "sylvester": sylvester,
        "norm": GroupNorm(norm_groups, None, None, 1e-5) if has_norm else None,
        "silu": silu,
    }
    y = conv.int8_conv(x, packed, w_scale, bias, kernel=kernel, **options)

    pixels, in_rows = x.flatten(2), x.stride(1) == 1
    geometry = conv.describe_geometry(x, y, kernel, as_sizes(stride, x), as_sizes(padding, x))
    header = (conv.DTYPES[x.dtype], *pixels.shape, *pixels.stride(), rotation, sylvester, silu)
    header = (*header, norm_groups, outputs)
    stored = pixels.transpose(1, 2) if in_rows else pixels
    fields = [as_field(each) for each in (stored, packed, w_scale, bias)]
    data = struct.pack("<13q", *header, y.numel() // outputs) + bytes(geometry) + b"".join(fields)
    return data, as_field(y.movedim(1, -1))[8:]


@pytest.mark.parametrize("name", ["i8mm", "dotprod"])
def test_arm_gives_the_same_bits(name, tmp_path):
    chosen, program = INSTRUCTION_SETS[name], tmp_path / name
    sources = (str(chosen.get_source("conv")), str(DRIVER))
    subprocess.run([COMPILER, *FLAGS, *chosen.flags, *sources, "-o", str(program)], check=True)
    cases = list(list_cases())
    inputs, expected = zip(*(describe_case(*case) for case in cases), strict=True)
    (tmp_path / "in").write_bytes(struct.pack("<q", len(cases)) + b"".join(inputs))
    subprocess.run([EMULATOR, "-cpu", "max", program, tmp_path / "in", tmp_path / "out"], check=True)

    output = (tmp_path / "out").read_bytes()
    assert len(output) == sum(map(len, expected))
    for (x, shape, steps), data in zip(cases, expected, strict=True):
        assert output[: len(data)] == data, (x.dtype, x.stride(), shape, steps)
        output = output[len(data) :]
