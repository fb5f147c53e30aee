"""The rotary embedding of the CPU kernels: the bits of diffusers' own, on every instruction set."""

import itertools

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from support.helpers import CPU, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu.instructions import find_unusable_reason, list_instruction_sets
from int8run.kernels.cpu.linear import DTYPES
from int8run.kernels.cpu.rotary import rotate_positions

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]


def make_angles(tokens, width):
    angles = 3 * randn(tokens, width, seed=1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("instructions", FOUND)
def test_the_bits_are_those_of_diffusers(instructions, tokens_first):
    for width, dtype in itertools.product((2, 14, 16, 18, 64, 100), DTYPES):
        x = randn(2, 5, 3, width, dtype=dtype)
        x[0, 0, 0, 0] = -0.0
        tokens, dimension = (5, 1) if tokens_first else (3, 2)
        cos, sin = make_angles(tokens, width)
        y = rotate_positions(x, cos, sin, tokens_first=tokens_first, instructions=instructions)

        assert torch.equal(y, apply_rotary_emb(x, (cos, sin), sequence_dim=dimension)), (width, dtype)


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    x, (cos, sin) = randn(2, 7, 3, 64), make_angles(7, 64)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(rotate_positions(x, cos, sin, tokens_first=True))
    torch.set_num_threads(before)

    assert torch.equal(*results)


def test_no_tokens_give_none_and_what_does_not_fit_is_refused():
    cos, sin = make_angles(5, 8)
    assert rotate_positions(randn(0, 5, 2, 8), cos, sin, tokens_first=True).shape == (0, 5, 2, 8)
    for x, angles in (
        (randn(1, 4, 2, 8), cos),
        (randn(1, 5, 2, 7), make_angles(5, 7)[0]),
        (randn(1, 5, 2, 8).double(), cos),
        (randn(1, 5, 8, 2).transpose(2, 3), cos),
        (randn(1, 5, 2, 8), cos.bfloat16()),
        (randn(5, 2, 8), cos),
    ):
        with pytest.raises(ValueError, match=r"^x must be contiguous float32"):
            rotate_positions(x, angles, sin, tokens_first=True)


def test_the_operator_passes_opcheck():
    arguments = (randn(1, 5, 2, 8), *make_angles(5, 8), True, "auto")
    torch.library.opcheck(torch.ops.int8run.cpu_rotary.default, arguments)
