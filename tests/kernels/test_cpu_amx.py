"""The loops over AMX's tiles, with tiles that are emulated: the same bits as those of the other sets."""

import ctypes
import errno
import itertools
import re
from pathlib import Path

import pytest
import torch
from support.grouped import list_grouped_weights
from support.helpers import CPU, full_range, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import conv, grouped, library, linear
from int8run.kernels.cpu import instructions as module
from int8run.kernels.cpu.instructions import (
    AUTO,
    AVX2_FEATURES,
    AVX2_FLAGS,
    INSTRUCTION_SETS,
    InstructionSet,
    find_unusable_reason,
    list_instruction_sets,
    request_tiles,
)
from int8run.kernels.cpu.library import InstructionSetError, load_linear_library


class EmulatedTiles(InstructionSet):
    """AMX without its instructions: slow, and on any CPU with AVX2."""

    def get_source(self, layer: str) -> Path:
        return Path(__file__).with_name(f"{layer}_amx_emulated.cpp")


EMULATED = EmulatedTiles("amx_emulated", features=AVX2_FEATURES, flags=AVX2_FLAGS)
REFUSED = Cpu(instructions="avx2").limits.unsupported_reasons(CPU)
needs_avx2 = pytest.mark.skipif(bool(REFUSED), reason=f"the emulation: {'; '.join(REFUSED)}")


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setitem(INSTRUCTION_SETS, EMULATED.name, EMULATED)
    load_linear_library(EMULATED.name)
    return EMULATED.name


@needs_avx2
@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rank", [0, 3, 70])
@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_tiles_give_the_same_bits(emulated, dtype, rank):
    # rows: one tile, two, tails of them, more than a block; inputs: tails of 4 and 64, more than a piece
    rows, widths, columns = (1, 16, 17, 33, 290), (1, 7, 64, 65, 300), (1, 17, 33, 64, 130)
    shapes = [*itertools.product(rows, widths, columns), (33, 4170, 65)]
    for m, k, n in shapes:
        q, x_scale = linear.quantize_rows(randn(m, k, dtype=dtype))
        qdata, bias = full_range(n, k, seed=1), randn(n, seed=2) if n % 2 else None
        qdata[0, 0] = -128
        branch = ()
        if rank:
            down = linear.pack_weight(full_range(rank, k, seed=3)), randn(rank, seed=4)
            up = linear.pack_weight(full_range(n, rank, seed=5)), randn(n, seed=6)
            branch = (*down, *up)
        arguments = (q, x_scale, linear.pack_weight(qdata), randn(n, seed=7), bias, dtype, *branch)

        expected = linear.int8_linear(*arguments)
        assert torch.equal(linear.int8_linear(*arguments, instructions=emulated), expected), (m, k, n)


@needs_avx2
@pytest.mark.slow
def test_tiles_give_the_same_bits_on_any_number_of_threads(emulated):
    before = torch.get_num_threads()
    q, x_scale = linear.quantize_rows(randn(290, 130))
    arguments = (q, x_scale, linear.pack_weight(full_range(330, 130)), randn(330), None, torch.float32)
    expected = linear.int8_linear(*arguments)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(linear.int8_linear(*arguments, instructions=emulated), expected), count
    torch.set_num_threads(before)


@needs_avx2
@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize(
    ("rows", "columns", "outputs", "group_size"),
    [(1, 64, 64, 16), (17, 96, 70, 16), (1100, 128, 40, 64), (13, 6144, 66, 1536)],
)
def test_tiles_give_the_same_bits_of_codes(emulated, rows, columns, outputs, group_size, rank):
    q, x_scale = linear.quantize_rows(randn(rows, columns))
    branch = ()
    if rank:
        down = linear.pack_weight(full_range(rank, columns, seed=3)), randn(rank, seed=4)
        up = linear.pack_weight(full_range(outputs, rank, seed=5)), randn(outputs, seed=6)
        branch = (*down, *up)
    for weight in list_grouped_weights(outputs, columns, group_size):
        codes = grouped.pack_weight(weight.codes, weight.group_scale, weight.bits, weight.codebook)
        group_scale = grouped.pack_group_scale(weight.group_scale)
        w_scale = weight.scale[:, 0].contiguous()
        arguments = (q, x_scale, codes, group_scale, weight.codebook, weight.bits, w_scale, None)

        expected = grouped.grouped_linear(*arguments, torch.float32, *branch)
        y = grouped.grouped_linear(*arguments, torch.float32, *branch, instructions=emulated)
        assert torch.equal(y, expected), weight.bits


# channels, outputs, kernel, stride, image: tails of 4, 16, 32 and 64, more pixels than a block and more
# panels than a task has
CONVOLUTIONS = [
    (1, 1, (1, 1), 1, (1, 1)),
    (5, 33, (3, 3), 1, (3, 2)),
    (70, 130, (3, 3), 2, (31, 29)),
    (64, 64, (1, 1), 1, (16, 16)),
    (130, 530, (3, 3), 1, (5, 5)),
    (16, 20, (3, 3, 3), (1, 2, 1), (3, 5, 6)),
]


@needs_avx2
@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_tiles_give_convolutions_the_same_bits(emulated, dtype):
    before = torch.get_num_threads()
    for channels, outputs, kernel, stride, image in CONVOLUTIONS:
        x = randn(2, channels, *image, dtype=dtype)
        qdata = full_range(outputs, channels, *kernel, seed=1)
        qdata.view(-1)[0] = -128
        bias = randn(outputs, seed=2) if outputs % 2 else None
        arguments = (x, conv.pack_conv_weight(qdata), randn(outputs, seed=3), bias)
        padding = [size // 2 for size in kernel]
        options = {"kernel": kernel, "stride": stride, "padding": padding, "silu": True}

        expected = conv.int8_conv(*arguments, **options)
        for count in (1, 3):
            torch.set_num_threads(count)
            y = conv.int8_conv(*arguments, **options, instructions=emulated)
            assert torch.equal(y, expected), (channels, outputs, kernel, count)
    torch.set_num_threads(before)


# -- permission ------------------------------------------------------------------------------------

AMX_CPU = dict.fromkeys((*INSTRUCTION_SETS["amx"].features, *AVX2_FEATURES, "avx_vnni", "avx512_vnni"), True)


class FakeLibc:
    """The C library, whose kernel answers one call."""

    def __init__(self, answer: int):
        self.answer = answer
        self.calls: list[tuple[int, ...]] = []

    def syscall(self, *arguments: int) -> int:
        self.calls.append(arguments)
        ctypes.set_errno(errno.EPERM)
        return self.answer


@pytest.fixture
def amx_cpu(monkeypatch):
    """A CPU with AMX on Linux, where every library can be built; returns what sets the kernel's answer."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMX_CPU)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(library, "build_library", lambda folder, source, flags: source)
    monkeypatch.setattr(library, "open_library", lambda path: path)
    monkeypatch.setattr(library, "declare_functions", lambda layer, functions: None)
    forget_answers()

    def set_answer(answer: int) -> FakeLibc:
        libc = FakeLibc(answer)
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: libc)
        return libc

    yield set_answer
    forget_answers()


def forget_answers():
    for remembered in (request_tiles, library.try_to_load, load_linear_library):
        remembered.cache_clear()


def test_the_kernel_is_asked_for_tiles_once_and_only_when_they_are_to_be_used(amx_cpu):
    libc = amx_cpu(0)

    assert list_instruction_sets()[0] == "amx"
    assert Cpu().limits.unsupported_reasons(CPU)[:1] in ([], ["needs a C++ compiler on the PATH"])
    assert libc.calls == []
    assert [load_linear_library(name).instructions for name in (AUTO, "amx")] == ["amx", "amx"]
    # the numbers of arch_prctl, of its request for permission, and of the tiles' data
    assert libc.calls == [(158, 0x1023, 18)]


def test_a_kernel_that_refuses_tiles_leaves_the_next_best_and_is_named_once(amx_cpu, caplog):
    amx_cpu(-1)

    assert [load_linear_library(*args).instructions for args in ((), (AUTO,))] == ["avx512_vnni"] * 2
    (warning,) = caplog.messages
    refusal = "needs AMX, which the system does not allow (arch_prctl: Operation not permitted)"
    assert warning == f"kernels with amx cannot be used, avx512_vnni takes their place: {refusal}"
    assert Cpu(instructions="amx").limits.unsupported_reasons(CPU)[0] == refusal
    with pytest.raises(InstructionSetError, match=re.escape(refusal)):
        load_linear_library("amx")


def test_a_cpu_that_hides_its_tiles_is_not_asked(amx_cpu, monkeypatch):
    libc = amx_cpu(0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMX_CPU | {"amx_tile": False})

    assert load_linear_library().instructions == "avx512_vnni"
    assert find_unusable_reason(("amx",)).startswith("needs a CPU with amx; this one has avx512_vnni")
    assert libc.calls == []
