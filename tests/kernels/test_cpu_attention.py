"""INT8 attention on CPUs beside its definition, for every instruction set that this CPU has."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.compare import assert_close
from support.helpers import CPU, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import attention as module
from int8run.kernels.cpu.attention import int8_attention
from int8run.kernels.cpu.instructions import (
    AVX2_FEATURES,
    AVX2_FLAGS,
    INSTRUCTION_SETS,
    InstructionSet,
    find_unusable_reason,
    list_instruction_sets,
)
from int8run.kernels.cpu.library import OUT_OF_MEMORY
from int8run.kernels.int8_attention import reference

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]


class EmulatedTiles(InstructionSet):
    """AMX without its instructions: slow, and on any CPU with AVX2."""

    def get_source(self, layer: str) -> Path:
        return Path(__file__).with_name(f"{layer}_amx_emulated.cpp")


EMULATED = EmulatedTiles("amx_emulated", features=AVX2_FEATURES, flags=AVX2_FLAGS)
EMULATION_REFUSED = Cpu(instructions="avx2").limits.unsupported_reasons(CPU)
# probabilities that lie between two codes are rounded either way: one in fifty, by one of 255
MAX_REL_ERR = 2e-3


def make_operands(heads, key_heads, queries, keys, width, value_width):
    return (
        randn(2, heads, queries, width, seed=1),
        randn(2, key_heads, keys, width, seed=2),
        randn(2, key_heads, keys, value_width, seed=3),
    )


def assert_like_the_reference(operands, **options):
    actual = int8_attention(*operands, **options)
    expected = reference.int8_attention(*operands, **options)
    assert actual.dtype == expected.dtype
    assert_close(f"attention with {list(options)}", actual, expected, MAX_REL_ERR)


# queries: less than a tile, tiles and what is left of one, more than a block; keys: less than a register,
# more than a panel, more than a block; widths: tails of 4, 16 and 64
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 7, 77, 64, 64),
    (4, 2, 37, 300, 128, 128),
    (2, 1, 5, 513, 7, 3),
    (1, 1, 193, 257, 40, 72),
    (1, 1, 13, 64, 160, 65),
]


def list_options(shape):
    """What a call may have beside its operands."""
    queries, keys = shape[2:4]
    mask = randn(queries, keys, seed=4) > 0
    mask[:, 0] = True
    return (
        {},
        {"is_causal": True},
        {"scale": -0.2, "center_keys": True},
        {"mask": mask},
        {"mask": randn(2, 1, 1, keys, seed=5), "is_causal": True},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_option_is_like_the_reference(shape):
    operands = make_operands(*shape)

    for options in list_options(shape):
        assert_like_the_reference(operands, **options)


def assert_same_bits_as_the_best_set(instructions):
    for shape in SHAPES:
        operands = make_operands(*shape)
        for options in list_options(shape):
            expected = int8_attention(*operands, **options)
            actual = int8_attention(*operands, instructions=instructions, **options)
            assert torch.equal(actual, expected), (shape, options)


@pytest.mark.parametrize("instructions", FOUND[1:])
def test_every_instruction_set_gives_the_same_bits(instructions):
    assert_same_bits_as_the_best_set(instructions)


@pytest.mark.slow
@pytest.mark.skipif(bool(EMULATION_REFUSED), reason=f"the emulation: {'; '.join(EMULATION_REFUSED)}")
def test_tiles_that_are_emulated_give_the_same_bits(monkeypatch):
    monkeypatch.setitem(INSTRUCTION_SETS, EMULATED.name, EMULATED)

    assert_same_bits_as_the_best_set(EMULATED.name)


@pytest.mark.parametrize("rotation", [2, 4, 16, 32, 64, 128])
def test_rotations_are_those_of_the_reference(rotation):
    operands = make_operands(1, 1, 9, 70, 128, 16)
    operands[1][..., 5] += 20

    for center_keys in (False, True):
        assert_like_the_reference(operands, rotation=rotation, center_keys=center_keys)


@pytest.mark.parametrize(
    "dtypes",
    [("bfloat16",) * 3, ("float16",) * 3, ("float64",) * 3, ("float32", "bfloat16", "float16")],
    ids=" ".join,
)
def test_dtypes_may_differ_and_the_output_has_that_of_the_queries(dtypes):
    operands = make_operands(2, 2, 37, 77, 64, 40)

    assert_like_the_reference(
        [x.to(getattr(torch, dtype)) for x, dtype in zip(operands, dtypes, strict=True)]
    )


def test_operands_of_other_strides_are_read_where_they_are():
    operands = make_operands(2, 2, 37, 77, 64, 40)
    expected = int8_attention(*operands)

    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    channels_apart = [x.mT.contiguous().mT for x in operands]
    shared = [x[:1].expand(2, -1, -1, -1) for x in operands]

    assert torch.equal(int8_attention(*tokens_first), expected)
    assert torch.equal(int8_attention(*channels_apart), expected)
    assert torch.equal(int8_attention(*shared)[1], expected[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(37, 300), (2, 1, 1, 300), (1, 4, 37, 1), (2, 4, 37, 300)], ids=str)
def test_masks_of_every_shape_and_dtype_are_like_the_reference(shape, dtype):
    mask = randn(*shape, seed=4)
    mask = mask > -0.4 if dtype == torch.bool else mask.to(dtype)

    assert_like_the_reference(make_operands(4, 2, 37, 300, 64, 64), mask=mask)


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_masks_that_hide_whole_blocks_or_rows_are_like_the_reference(lowest):
    mask = torch.zeros(37, 600)
    mask[:, :300] = lowest
    mask[3] = lowest

    assert_like_the_reference(make_operands(1, 1, 37, 600, 64, 64), mask=mask)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": torch.ones(37, 300).bool()}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_visible_where_the_reference_shows_it(value, options):
    q, k, v = make_operands(4, 2, 37, 300, 64, 64)
    q[0, 0, 3, 1] = value
    k[1, 1, 5, 2] = value
    v[0, 1, 7, 4] = value

    actual = int8_attention(q, k, v, **options)

    assert torch.equal(actual.isnan(), reference.int8_attention(q, k, v, **options).isnan())


@pytest.mark.parametrize("instructions", FOUND)
def test_a_nan_in_a_mask_is_visible_in_its_row_and_one_in_a_value_where_the_value_counts(instructions):
    q, k, v = make_operands(1, 1, 37, 300, 64, 64)
    v[..., 7, 4] = torch.nan
    mask = torch.zeros(37, 300)
    mask[3, 5] = torch.nan
    mask[4, 299] = torch.nan
    mask[9] = -torch.inf

    actual = int8_attention(q, k, v, mask=mask, instructions=instructions)

    expected = torch.zeros(37, 64, dtype=torch.bool)
    expected[:, 4] = True
    expected[9, 4] = False
    expected[3:5] = True
    assert torch.equal(actual[0, 0].isnan(), expected)


def test_a_nan_in_a_hidden_key_is_hidden():
    q, k, v = make_operands(1, 1, 37, 300, 64, 64)
    k[:, :, 290] = torch.nan
    mask = torch.ones(300, dtype=torch.bool)
    mask[290] = False

    assert int8_attention(q, k, v, mask=mask[None]).isfinite().all()


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    operands = make_operands(4, 2, 200, 300, 64, 64)
    expected = int8_attention(*operands, center_keys=True)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(int8_attention(*operands, center_keys=True), expected), count
    torch.set_num_threads(before)


def test_empty_batches_are_empty():
    q, k, v = make_operands(2, 2, 5, 7, 16, 16)

    assert int8_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 5, 16)


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a mask \[7, 5\] cannot be broadcast to \[2, 2, 5, 7\]"):
        int8_attention(*make_operands(2, 2, 5, 7, 16, 16), mask=torch.ones(7, 5))


def test_a_rotation_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="power of 2 that divides a head's 16 channels, not 32"):
        int8_attention(*make_operands(2, 2, 5, 7, 16, 16), rotation=32)


def test_a_kernel_without_memory_raises(monkeypatch):
    functions = SimpleNamespace(int8run_attention=lambda call: OUT_OF_MEMORY)
    monkeypatch.setattr(module, "load_attention_library", lambda name: SimpleNamespace(functions=functions))

    with pytest.raises(MemoryError, match="the CPU kernels ran out of memory"):
        int8_attention(*make_operands(2, 2, 5, 7, 16, 16))


def test_a_compiled_graph_holds_the_operator_whole():
    operands = make_operands(2, 2, 5, 7, 16, 16)
    compiled = torch.compile(int8_attention, fullgraph=True, backend="aot_eager")

    actual = compiled(*operands, is_causal=True)

    expected = int8_attention(*operands, is_causal=True)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
