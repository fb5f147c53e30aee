"""The kernels for Arm, cross-compiled and run by an emulator: the same bits as those of this CPU."""

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from support.grouped import list_grouped_weights
from support.helpers import CPU, full_range, randn
from torch import Tensor

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import grouped, linear
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
DRIVER = Path(__file__).with_name("arm_driver.cpp")
FLAGS = ("-O2", "-std=c++17", "-static", "-w", "-ffp-contract=off")


def list_cases():
    """Rows, inputs, outputs, rotation, Sylvester's, whether there is a factor, gelu_from and rank."""
    for m, k, n in itertools.product((1, 5, 13), (1, 7, 65, 300), (17, 65, 130)):
        yield m, k, n, 0, False, False, -1, 3 * (n % 2)
    # i8mm takes two rows by eight inputs at once: a row, four inputs or both are left over
    for m, k, n in itertools.product((1, 2, 3, 4, 17), (4, 12, 68), (1, 15, 66)):
        yield m, k, n, 0, False, False, -1, 5 * (n % 2)
    yield 200, 65, 65, 0, False, True, -1, 70  # more than a block of rows
    yield 7, 4170, 65, 0, False, False, -1, 0  # more than a piece of the inputs
    for rotation in (4, 16, 64, 256, 1024):
        yield 3, 1024, 17, rotation, False, True, 5, 0
    for rotation in (2, 8, 16, 32, 512, 1024):
        yield 3, 1024, 17, rotation, True, False, 0, 0


def as_bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return b""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def build_program(name, driver, folder):
    """The kernels of one instruction set, as an Arm program."""
    instruction_set = INSTRUCTION_SETS[name]
    path = folder / name
    sources = (str(instruction_set.source), str(driver))
    subprocess.run([COMPILER, *FLAGS, *instruction_set.flags, *sources, "-o", str(path)], check=True)
    return path


@pytest.fixture(scope="module", params=["i8mm", "dotprod"])
def program(request, tmp_path_factory):
    return build_program(request.param, DRIVER, tmp_path_factory.mktemp("arm"))


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_arm_gives_the_same_bits(program, dtype, tmp_path):
    inputs, expected, cases = [], [], list(list_cases())
    for m, k, n, rotation, sylvester, has_factor, gelu_from, rank in cases:
        x = 3 * randn(m, k, dtype=dtype)
        x[0] *= 1e-38 if dtype != torch.float16 else 1e-7  # denormal numbers
        factor = randn(k, seed=1) if has_factor else None
        packed, w_scale = linear.pack_weight(full_range(n, k, seed=2)), 0.01 * randn(n, seed=3).abs()
        bias = randn(n, seed=4) if n % 2 else None
        branch: tuple[Tensor | None, ...] = (None, None, None, None)
        if rank:
            down = linear.pack_weight(full_range(rank, k, seed=5)), randn(rank, seed=6)
            branch = (*down, linear.pack_weight(full_range(n, rank, seed=7)), randn(n, seed=8))
        q, scale = linear.quantize_rows(x, factor, rotation, sylvester=sylvester, gelu_from=gelu_from)
        expected += [q, scale, linear.int8_linear(q, scale, packed, w_scale, bias, dtype, *branch)]
        header = (linear.DTYPES[dtype], m, k, n, rotation, int(sylvester), gelu_from, rank)
        inputs.append(struct.pack("<8q", *header))
        for tensor in (x, factor, packed, w_scale, bias, *branch):
            data = as_bytes(tensor)
            inputs.append(struct.pack("<q", len(data)) + data)
    (tmp_path / "in").write_bytes(struct.pack("<q", len(cases)) + b"".join(inputs))
    subprocess.run([EMULATOR, "-cpu", "max", program, tmp_path / "in", tmp_path / "out"], check=True)

    output = (tmp_path / "out").read_bytes()
    assert len(output) == sum(len(as_bytes(tensor)) for tensor in expected)
    for i, tensor in enumerate(expected):
        data = as_bytes(tensor)
        assert output[: len(data)] == data, (("q", "scale", "y")[i % 3], cases[i // 3])
        output = output[len(data) :]


@pytest.mark.parametrize("instructions", ["i8mm", "dotprod"])
def test_arm_gives_the_same_bits_of_codes(instructions, tmp_path):
    shapes = [(1, 64, 64, 16), (7, 96, 70, 16), (5, 32, 64, 4), (3, 6144, 66, 1536)]
    inputs, expected = [], []
    for rows, columns, outputs, group_size in shapes:
        q, x_scale = linear.quantize_rows(randn(rows, columns))
        for weight in list_grouped_weights(outputs, columns, group_size):
            codes = grouped.pack_weight(weight.codes, weight.group_scale, weight.bits, weight.codebook)
            group_scale = grouped.pack_group_scale(weight.group_scale)
            levels = grouped.EVEN_LEVELS[weight.bits] if weight.codebook is None else weight.codebook
            w_scale = weight.scale[:, 0].contiguous()
            has_byte_scales = int(group_scale.dtype.itemsize == 1)
            header = (rows, columns, outputs, has_byte_scales, weight.bits, group_size)
            inputs.append(struct.pack("<6q", *header))
            for tensor in (q, x_scale, codes, group_scale, levels, w_scale):
                data = as_bytes(tensor)
                inputs.append(struct.pack("<q", len(data)) + data)
            y = grouped.grouped_linear(
                q, x_scale, codes, group_scale, weight.codebook, weight.bits, w_scale, None, torch.float32
            )
            expected.append(as_bytes(y))
    (tmp_path / "in").write_bytes(struct.pack("<q", len(expected)) + b"".join(inputs))
    program = build_program(instructions, DRIVER.with_name("arm_grouped_driver.cpp"), tmp_path)

    subprocess.run([EMULATOR, "-cpu", "max", program, tmp_path / "in", tmp_path / "out"], check=True)

    assert (tmp_path / "out").read_bytes() == b"".join(expected)
