"""Weights of 4 and 6 bits on the CPU: the product of the int8 weight that they decode to, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from support.grouped import draw_grouped_weight, list_grouped_weights
from support.helpers import CPU, randn

from int8run.backends.base import MultipliesGroupedWeights
from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import grouped, linear
from int8run.kernels.cpu.instructions import find_unusable_reason, list_instruction_sets
from int8run.kernels.cpu.library import OUT_OF_MEMORY

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]
# rows, inputs, outputs, group size: one row, tails of tiles and panels, more rows than a decoding serves,
# more inputs than a piece, one group, groups of a step, pieces that end inside a group
SHAPES = [(1, 64, 64, 16), (7, 96, 70, 16), (900, 128, 40, 64), (33, 5120, 65, 5120), (5, 32, 64, 4)]
PIECE_SHAPES = [(200, 4160, 130, 32), (13, 6144, 66, 1536)]


def multiply_both(backend, weight, rows, *, dtype=torch.float32, rank=0):
    """The product of the codes, and that of the int8 weight that they decode to."""
    outputs, columns = weight.shape
    x = backend.quantize(randn(rows, columns, seed=1))
    bias = randn(outputs, seed=2) if outputs % 2 == 0 else None
    branch = strengths = None
    if rank:
        branch = backend.fuse_branch(randn(rank, columns, seed=3), randn(outputs, rank, seed=4), dtype)
        strengths = 1 + randn(rank, seed=5).abs()
    w_scale = weight.scale[:, 0].contiguous()
    options = dict(dtype=dtype, bias=bias, branch=branch, strengths=strengths)
    y = backend.grouped_linear(x, backend.pack_grouped_weight(weight), w_scale, **options)
    expected = backend.linear(x, backend.pack_weight(weight.decode()), w_scale, **options)
    return y, expected


@pytest.mark.parametrize("instructions", FOUND)
@pytest.mark.parametrize(("rows", "columns", "outputs", "group_size"), SHAPES)
def test_codes_give_the_product_of_their_int8_weight(instructions, rows, columns, outputs, group_size):
    backend = Cpu(instructions=instructions)

    for weight in list_grouped_weights(outputs, columns, group_size):
        assert backend.unsupported_group_reasons(weight) == []
        y, expected = multiply_both(backend, weight, rows)
        assert torch.equal(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", FOUND)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_all_dtypes_branches_and_pieces_give_the_same_product(instructions, dtype, rank):
    backend = Cpu(instructions=instructions)

    for rows, columns, outputs, group_size in [*SHAPES, *PIECE_SHAPES]:
        for weight in list_grouped_weights(outputs, columns, group_size):
            y, expected = multiply_both(backend, weight, rows, dtype=dtype, rank=rank)
            assert torch.equal(y, expected), (rows, columns, outputs, group_size, weight.bits)


@pytest.mark.parametrize("scale", [2.0**-9, -3.5, 448.0])
def test_scales_of_a_byte_are_denormal_negative_and_large(scale):
    backend = Cpu()
    weight = draw_grouped_weight(64, 64, 4, 16)
    weight.group_scale.copy_(torch.full((64, 4), scale))

    y, expected = multiply_both(backend, weight, rows=3)

    assert weight.decode().qdata.unique().numel() > 1 or scale < 1
    assert torch.equal(y, expected)


def test_ties_are_rounded_to_even_and_large_products_end_at_127():
    backend = Cpu()
    # levels -8 .. 7, times 0.5 and times 40
    for scale in (0.5, 40.0):
        weight = draw_grouped_weight(64, 64, 4, 16, scale_dtype=torch.float32)
        weight.group_scale.fill_(scale)
        y, expected = multiply_both(backend, weight, rows=2)
        assert torch.equal(y, expected)
        assert weight.decode().qdata.min() >= -127


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("outputs", [1, 64, 130])
@pytest.mark.parametrize("scale_dtype", grouped.SCALE_DTYPES, ids=str)
def test_codes_and_scales_come_back_out_of_their_panels(bits, outputs, scale_dtype):
    backend = Cpu()
    weight = draw_grouped_weight(outputs, 96, bits, 32, scale_dtype=scale_dtype)

    codes, group_scale = backend.unpack_grouped_weight(backend.pack_grouped_weight(weight), weight.shape)

    assert torch.equal(codes, weight.codes)
    assert group_scale.dtype == scale_dtype
    assert torch.equal(group_scale.float(), weight.group_scale.float())


@pytest.mark.parametrize("bits", [4, 6])
def test_a_packed_weight_takes_its_bits_and_four_bytes_for_each_output(bits):
    weight = draw_grouped_weight(128, 256, bits, 16)

    packed = Cpu().pack_grouped_weight(weight)

    assert packed.codes.nbytes == 128 * 256 * bits // 8 + 4 * 128
    assert packed.group_scale.nbytes == 128 * 256 // 16


def test_the_backend_says_that_it_decodes_in_its_product():
    assert isinstance(Cpu(), MultipliesGroupedWeights)


def test_unsupported_groups_have_reasons():
    backend = Cpu()
    assert "6 columns" in backend.unsupported_group_reasons(draw_grouped_weight(8, 24, 4, 6))[0]
    assert "12 columns are no multiple of 8" in backend.unsupported_group_reasons(
        draw_grouped_weight(8, 12, 4, 4)
    )
    halves = draw_grouped_weight(8, 32, 4, 16, scale_dtype=torch.bfloat16)
    assert "torch.bfloat16" in backend.unsupported_group_reasons(halves)[0]
    for value in (float("nan"), float("inf"), 1e30):
        weight = draw_grouped_weight(8, 32, 4, 16, scale_dtype=torch.float32)
        weight.group_scale[3, 1] = value
        assert "beyond 32-bit integers" in backend.unsupported_group_reasons(weight)[0]


def test_operands_that_do_not_fit_are_refused():
    backend = Cpu()
    weight = draw_grouped_weight(70, 64, 4, 16)
    x = backend.quantize(randn(3, 64))
    packed, w_scale = backend.pack_grouped_weight(weight), weight.scale[:, 0].contiguous()

    def multiply(x=x, packed=packed, w_scale=w_scale):
        return backend.grouped_linear(x, packed, w_scale, dtype=torch.float32)

    with pytest.raises(ValueError, match="must be as from pack_weight"):
        multiply(packed=packed._replace(codes=packed.codes[:1]))
    with pytest.raises(ValueError, match="must be as from pack_weight"):
        multiply(packed=packed._replace(group_scale=packed.group_scale.bfloat16()))
    with pytest.raises(ValueError, match="must be as from pack_weight"):
        multiply(packed=packed._replace(codebook=torch.ones(8)))
    with pytest.raises(ValueError, match="must be as from pack_weight"):
        multiply(packed=packed._replace(bits=5))
    six_bits = backend.pack_grouped_weight(draw_grouped_weight(70, 64, 6, 16))
    with pytest.raises(ValueError, match="a float32 codebook of 16 levels at 4 bits alone"):
        multiply(packed=six_bits._replace(codebook=torch.ones(16)))
    with pytest.raises(ValueError, match="w_scale must be contiguous float32"):
        multiply(w_scale=w_scale.double())
    with pytest.raises(ValueError, match="q must be contiguous uint8"):
        multiply(x=x._replace(q=x.q[:, ::2]))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_give_no_rows(rows):
    y, expected = multiply_both(Cpu(), draw_grouped_weight(64, 64, 4, 16), rows)

    assert y.shape == (rows, 64)
    assert torch.equal(y, expected)


def test_a_kernel_without_memory_raises(monkeypatch):
    backend = Cpu()
    weight = draw_grouped_weight(64, 64, 4, 16)
    x, packed = backend.quantize(randn(3, 64)), backend.pack_grouped_weight(weight)
    functions = SimpleNamespace(int8run_grouped_linear=lambda *arguments: OUT_OF_MEMORY)
    monkeypatch.setattr(grouped, "load_linear_library", lambda name: SimpleNamespace(functions=functions))

    with pytest.raises(MemoryError, match="the CPU kernels ran out of memory"):
        backend.grouped_linear(x, packed, weight.scale[:, 0].contiguous(), dtype=torch.float32)


@pytest.mark.slow
def test_torch_compile_sees_the_operator():
    backend = Cpu()
    weight = draw_grouped_weight(64, 64, 4, 16, has_codebook=True)
    packed, w_scale = backend.pack_grouped_weight(weight), weight.scale[:, 0].contiguous()

    def run(x):
        return backend.grouped_linear(backend.quantize(x), packed, w_scale, dtype=torch.float32)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = randn(rows, 64)
        assert torch.equal(compiled(x), run(x))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_product(threads):
    weight = draw_grouped_weight(330, 128, 4, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y, expected = multiply_both(Cpu(), weight, rows=800)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, expected)
