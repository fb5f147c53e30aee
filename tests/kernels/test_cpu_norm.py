"""RMSNorm of the CPU kernels beside torch's own, in float64, and its bits on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from support.helpers import CPU, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu.instructions import find_unusable_reason, list_instruction_sets
from int8run.kernels.cpu.linear import DTYPES
from int8run.kernels.cpu.norm import rms_norm

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]
# float32: a sum in another order; half precision: rounded once
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 17, 64, 100, 3072])
def test_the_norm_is_torchs(width, dtype):
    x, weight = 3 * randn(5, 7, width, dtype=dtype), randn(width, seed=1, dtype=dtype)
    x[0, 0] = 0
    for given in (weight, None):
        exact = F.rms_norm(x.double(), (width,), None if given is None else given.double(), EPS)
        y = rms_norm(x, given, EPS)

        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert_close(f"{width}, {given is None}", y, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("instructions", FOUND[1:])
def test_every_set_gives_the_same_bits(instructions):
    for dtype in DTYPES:
        for width in (5, 64, 300):
            x, weight = randn(9, width, dtype=dtype), randn(width, seed=1, dtype=dtype)
            best, other = (rms_norm(x, weight, EPS, name) for name in (FOUND[0], instructions))
            assert torch.equal(best, other), (dtype, width)


def test_a_row_with_nan_or_infinity_shows_it_and_others_do_not():
    x = randn(3, 20)
    x[0, 3], x[2, 4] = float("nan"), float("inf")
    y = rms_norm(x, None, EPS)

    assert y[0].isnan().all() and y[2, 4].isnan()
    assert y[1].isfinite().all()


def test_no_rows_give_no_rows_and_what_does_not_fit_is_refused():
    assert rms_norm(torch.zeros(0, 4), None, EPS).shape == (0, 4)
    for x, weight in (
        (randn(4, 8).T, None),
        (randn(4, 8), randn(7)),
        (randn(4, 8), randn(8).bfloat16()),
        (randn(4, 8).double(), None),
    ):
        with pytest.raises(ValueError, match=r"^x must be contiguous float32"):
            rms_norm(x, weight, EPS)


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.int8run.cpu_rms_norm.default, (randn(3, 8), randn(8), EPS, "auto"))
