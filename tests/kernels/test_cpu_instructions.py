"""Every instruction set of the CPU kernels gives the same bits, whatever the shape."""

import itertools
from typing import NamedTuple

import pytest
import torch
from support.helpers import CPU, full_range, randn
from torch import Tensor

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import linear
from int8run.kernels.cpu.instructions import find_unusable_reason, list_instruction_sets
from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]
DTYPES = list(linear.DTYPES)
# rows: less than a tile, tiles and what is left of one, more than a block
ROWS = (1, 2, 5, 6, 7, 33, 400)
# widths: less than a step, tails of 4 and of 64, more than a piece of each set
WIDTHS = (1, 3, 4, 7, 60, 65, 300, 2100, 4100)
COLUMNS = (1, 15, 16, 17, 63, 65, 130)


class Layer(NamedTuple):
    """What `linear.int8_linear` takes after the rows, and the integers that are packed."""

    qdata: Tensor
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    branch: tuple[Tensor, ...]

    def compute(self, q: Tensor, x_scale: Tensor, dtype: torch.dtype, instructions: str) -> Tensor:
        return linear.int8_linear(
            q, x_scale, self.packed, self.scale, self.bias, dtype, *self.branch, instructions=instructions
        )


def make_layer(k: int, n: int, rank: int) -> Layer:
    """All of int8's numbers, -128 among them, which files may hold."""
    qdata = full_range(n, k, seed=1)
    qdata[0, 0] = -128
    branch: tuple[Tensor, ...] = ()
    if rank:
        down, up = full_range(rank, k, seed=2), full_range(n, rank, seed=3)
        scales = randn(rank, seed=4).abs(), randn(n, seed=5).abs()
        branch = (linear.pack_weight(down), scales[0], linear.pack_weight(up), scales[1])
    bias = randn(n, seed=6) if n % 2 else None
    return Layer(qdata, linear.pack_weight(qdata), 0.01 * randn(n, seed=7).abs(), bias, branch)


@pytest.mark.parametrize("instructions", FOUND)
def test_rows_are_those_of_the_reference(instructions):
    for dtype, k in itertools.product(DTYPES, (1, 2, 5, 16, 17, 63, 300)):
        x = randn(9, k, dtype=dtype)
        x[0] *= 1e-38 if dtype != torch.float16 else 1e-7  # denormal numbers
        x[1] = 0
        q, scale = linear.quantize_rows(x, instructions=instructions)
        expected, expected_scale = quantize_rowwise(x)

        assert torch.equal(q[:, :k].short() - 128, expected.short()), (dtype, k)
        assert torch.equal(scale, expected_scale[:, 0]), (dtype, k)


ROTATIONS = [(0, False), *((4**n, False) for n in range(1, 6)), *((2**n, True) for n in range(1, 11))]


@pytest.mark.parametrize("instructions", FOUND[1:])
def test_transformed_rows_have_the_same_bits_on_every_set(instructions):
    for dtype, k in itertools.product(DTYPES, (5, 48, 80, 1024)):
        x, factor = 3 * randn(7, k, dtype=dtype), randn(k, seed=1)
        for (rotation, sylvester), by, gelu_from in itertools.product(ROTATIONS, (None, factor), (-1, 0, 3)):
            if rotation and k % rotation:
                continue
            results = [
                linear.quantize_rows(
                    x, by, rotation, sylvester=sylvester, gelu_from=gelu_from, instructions=name
                )
                for name in (FOUND[0], instructions)
            ]
            for best, other in zip(*results, strict=True):
                assert torch.equal(best, other), (dtype, k, rotation, sylvester, gelu_from)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 6.0, 12.0, 60.0, 1e3, 1e30], ids=str)
@pytest.mark.parametrize("instructions", FOUND[1:])
def test_gelu_of_tiny_and_huge_numbers_has_the_same_bits(instructions, size):
    x = size * randn(6, 40)
    best, other = (
        linear.quantize_rows(x, gelu_from=0, instructions=name) for name in (FOUND[0], instructions)
    )

    assert all(torch.equal(a, b) for a, b in zip(best, other, strict=True))


@pytest.mark.parametrize("instructions", FOUND)
def test_products_are_exact(instructions):
    q = full_range(ROWS[-1], WIDTHS[-1])
    for k, n in itertools.product(WIDTHS, COLUMNS):
        layer = make_layer(k, n, rank=0)
        padded = torch.randint(0, 256, (q.shape[0], -(-k // 4) * 4)).to(torch.uint8)
        padded[:, :k] = (q[:, :k].short() + 128).to(torch.uint8)
        expected = int8_linear(q[:, :k], torch.ones(q.shape[0], 1), layer.qdata, torch.ones(n), None)
        for m in ROWS if k < 2000 else (1, 200):
            y = linear.int8_linear(
                padded[:m],
                torch.ones(m),
                layer.packed,
                torch.ones(n),
                None,
                torch.float32,
                instructions=instructions,
            )
            assert torch.equal(y, expected[:m]), (m, k, n)


@pytest.mark.parametrize("rank", [0, 3, 70])
@pytest.mark.parametrize("instructions", FOUND[1:])
def test_results_have_the_same_bits_on_every_set(instructions, rank):
    for k, n, dtype in itertools.product((7, 65, 2100), COLUMNS, DTYPES):
        layer = make_layer(k, n, rank)
        q, x_scale = linear.quantize_rows(randn(200, k, dtype=dtype))
        for m in (1, 7, 200):
            best = layer.compute(q[:m], x_scale[:m], dtype, FOUND[0])
            assert torch.equal(layer.compute(q[:m], x_scale[:m], dtype, instructions), best), (m, k, n, dtype)


def move_off(tensor: Tensor) -> Tensor:
    """A copy that begins one number behind an address that is a multiple of 64."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("instructions", FOUND)
def test_operands_at_any_address_give_the_same_bits(instructions, rank):
    for k, n, dtype in itertools.product((7, 65, 300), (17, 65), DTYPES):
        layer, x = make_layer(k, n, rank), randn(33, k, dtype=dtype)
        q, x_scale = linear.quantize_rows(x, instructions=FOUND[0])
        expected = layer.compute(q, x_scale, dtype, FOUND[0])
        moved = Layer(
            layer.qdata,
            packed=move_off(layer.packed),
            scale=move_off(layer.scale),
            bias=None if layer.bias is None else move_off(layer.bias),
            branch=tuple(map(move_off, layer.branch)),
        )
        moved_q, moved_scale = linear.quantize_rows(move_off(x), instructions=instructions)

        assert torch.equal(moved_q, q) and torch.equal(moved_scale, x_scale), (k, dtype)
        y = moved.compute(move_off(q), move_off(x_scale), dtype, instructions)
        assert torch.equal(y, expected), (k, n, dtype)


@pytest.mark.parametrize("instructions", FOUND)
def test_rows_of_any_stride_give_the_same_bits(instructions):
    for dtype in DTYPES:
        wide = randn(9, 130, dtype=dtype)
        for x in (wide[:, 3:70], wide[::2], wide.T, wide[:, ::2], wide[:1].expand(5, 130), wide[:, :1]):
            strided = linear.quantize_rows(x, gelu_from=1, instructions=instructions)
            contiguous = linear.quantize_rows(x.contiguous(), gelu_from=1, instructions=instructions)
            for one, other in zip(strided, contiguous, strict=True):
                assert torch.equal(one, other), (dtype, x.shape, x.stride())


@pytest.mark.parametrize("instructions", FOUND[1:])
def test_results_too_small_for_normal_numbers_have_the_same_bits(instructions):
    layer, x = make_layer(65, 17, rank=0), 1e-28 * randn(7, 65)
    layer = layer._replace(scale=1e-12 * layer.scale, bias=None)
    q, x_scale = linear.quantize_rows(x)
    expected = layer.compute(q, x_scale, torch.float32, FOUND[0])

    assert 0 < expected.abs().max() < torch.finfo(torch.float32).smallest_normal
    assert torch.equal(layer.compute(q, x_scale, torch.float32, instructions), expected)


@pytest.mark.parametrize("instructions", FOUND)
def test_no_rows_give_no_rows(instructions):
    q, x_scale = linear.quantize_rows(torch.zeros(0, 12), instructions=instructions)
    layer = make_layer(12, 5, rank=3)

    assert layer.compute(q, x_scale, torch.float32, instructions).shape == (0, 5)


@pytest.mark.parametrize("instructions", FOUND)
def test_any_number_of_threads_gives_the_same_bits(instructions):
    before = torch.get_num_threads()
    layer, x = make_layer(300, 330, rank=16), randn(400, 300)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        q, x_scale = linear.quantize_rows(x, instructions=instructions)
        results.append(layer.compute(q, x_scale, torch.bfloat16, instructions))
    torch.set_num_threads(before)

    assert torch.equal(*results)
