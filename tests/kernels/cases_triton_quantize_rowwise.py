"""Cases for test_triton_quantize_rowwise.py, which runs this file in a process of its own."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import randn
from support.triton_process import case_device

from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups, sylvester_hadamard
from int8run.kernels.quantize_rowwise import reference
from int8run.kernels.quantize_rowwise.kernel import ROTATIONS, SYLVESTER_ROTATIONS, quantize_rowwise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def transform_by_reference(x, factor, rotation, sylvester, gelu_from):
    """The definition in float32; what enters a rotation has x's dtype."""
    y = reference.transform_rows(x.float(), factor, None, gelu_from)
    if not rotation:
        return y
    matrix = (sylvester_hadamard if sylvester else regular_hadamard)(rotation)
    return rotate_groups(y.to(x.dtype).float(), matrix.to(y.device))


def assert_equals_reference(x, factor=None, rotation=0, sylvester=False, gelu_from=-1, down=None):
    """Compare everything that comes out with the reference."""
    q, scale, h = quantize_rowwise(x, factor, rotation, sylvester=sylvester, gelu_from=gelu_from, down=down)
    y = transform_by_reference(x, factor, rotation, sylvester, gelu_from)
    expected, expected_scale = reference.quantize_rowwise(y)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert_close("scale", scale, expected_scale, 1e-5)
    difference = (q.int() - expected.int()).abs()
    # ties, and what a last bit of the GELU or of 1 / scale moves across one
    assert difference.max() <= 1
    assert difference.float().mean() <= 0.005
    assert (q == -128).sum() == 0
    if down is None:
        assert h is None
    else:
        assert h.dtype == torch.float32
        # the reference's rounding to x's dtype may fall the other way for single values
        assert_close(
            "h", h, y.to(x.dtype).float() @ down.float().T, {FULL: 1e-5, HALF: 1e-3, BRAIN: 4e-3}[x.dtype]
        )


def make_tensor(*shape, seed=0, dtype=FULL):
    return randn(*shape, seed=seed, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 130), (2, 4096), (1, 16385), (2, 20000)], ids=str)
def test_plain_rows_equal_the_reference(shape, dtype):
    assert_equals_reference(make_tensor(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [BRAIN, FULL], ids=str)
@pytest.mark.parametrize(
    ("sylvester", "rotation"),
    [(False, r) for r in ROTATIONS if r] + [(True, r) for r in SYLVESTER_ROTATIONS if r],
)
def test_rotations_equal_the_reference(sylvester, rotation, dtype):
    # a width that the kernel's blocks do not divide where the group allows it
    columns = 3 * rotation if rotation >= 128 else 192 + rotation
    assert_equals_reference(make_tensor(19, columns, dtype=dtype), rotation=rotation, sylvester=sylvester)


def test_sylvesters_matrix_entry_for_entry():
    for rotation in (2, 64, 128, 512):
        q, scale, _ = quantize_rowwise(torch.eye(rotation, device=DEVICE), rotation=rotation, sylvester=True)
        torch.testing.assert_close((q * scale).cpu(), sylvester_hadamard(rotation))


@pytest.mark.parametrize("gelu_from", [0, 5, 129])
@pytest.mark.parametrize(
    ("sylvester", "rotation", "columns"),
    [(False, 0, 130), (False, 4, 132), (False, 256, 512), (True, 2, 130), (True, 128, 384)],
)
def test_gelu_applies_from_a_column_on(sylvester, rotation, columns, gelu_from):
    assert_equals_reference(
        3 * make_tensor(5, columns, dtype=BRAIN), rotation=rotation, sylvester=sylvester, gelu_from=gelu_from
    )


@pytest.mark.parametrize(("sylvester", "rotation"), [(False, 0), (False, 16), (True, 8)])
@pytest.mark.parametrize("rank", [1, 16, 33, 256])
def test_low_rank_product_equals_the_reference(rank, sylvester, rotation):
    assert_equals_reference(
        make_tensor(17, 144, dtype=HALF),
        rotation=rotation,
        sylvester=sylvester,
        down=make_tensor(rank, 144, seed=1, dtype=HALF),
    )


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize(
    ("sylvester", "rotation", "columns"), [(False, 256, 1024), (True, 128, 1024), (True, 128, 640)]
)
def test_all_options_together_equal_the_reference(sylvester, rotation, columns, rows, dtype):
    factor = make_tensor(columns, seed=1).abs() + 0.5
    assert_equals_reference(
        make_tensor(rows, columns, dtype=dtype),
        factor,
        rotation,
        sylvester,
        100,
        make_tensor(20, columns, seed=2, dtype=dtype),
    )


def test_factor_equals_the_reference():
    assert_equals_reference(make_tensor(5, 130, dtype=BRAIN), factor=make_tensor(130, seed=1))


def test_strided_rows_equal_the_reference():
    wide = make_tensor(7, 300, dtype=BRAIN)

    assert_equals_reference(wide[:, :130])
    assert_equals_reference(wide[:, 100:292], rotation=64)
    assert_equals_reference(wide[:, 100:228], rotation=128, sylvester=True)
    assert_equals_reference(wide[::2, :1])


def test_ties_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5]], device=DEVICE)
    assert quantize_rowwise(x)[0].tolist() == [[127, 0, 2, 2, 126, 0, -2, -2, -126]]


@pytest.mark.parametrize(("sylvester", "rotation"), [(False, 0), (False, 4), (True, 8)])
def test_zero_rows_and_tiny_rows_are_quantized(sylvester, rotation):
    x = make_tensor(3, 8)
    x[1], x[2] = 0, 1e-37
    q, scale, _ = quantize_rowwise(x, rotation=rotation, sylvester=sylvester)

    assert (q[1:] == 0).all()
    assert (scale[1:] == torch.tensor(1e-30)).all()


@pytest.mark.parametrize(("sylvester", "rotation"), [(False, 0), (False, 4), (True, 4), (True, 128)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(bad, sylvester, rotation):
    x = make_tensor(3, 256 if rotation == 128 else 132)
    x[1, 77] = bad
    scale = quantize_rowwise(x, rotation=rotation, sylvester=sylvester)[1]

    assert scale[:, 0].isfinite().tolist() == [True, False, True]


def test_the_largest_entry_becomes_127():
    x = -make_tensor(500, 3).abs()
    q = quantize_rowwise(x)[0]

    assert (q.amin(dim=1) == -127).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3)}, r"x must be \[M, K\]"),
        ({"x": torch.zeros(8, 4).T}, "neighbouring columns"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "not torch.float64"),
        ({"factor": torch.zeros(7)}, r"float32 \[8\]"),
        ({"rotation": 8}, "one of .* not 8"),
        ({"rotation": 16}, "divide 8 columns, not 16"),
        ({"rotation": 1, "sylvester": True}, "one of .* not 1$"),
        ({"rotation": 16, "sylvester": True}, "divide 8 columns, not 16"),
        ({"rotation": 2048, "sylvester": True}, "one of .* not 2048"),
        ({"down": torch.zeros(2, 8, dtype=HALF)}, "contiguous torch.float32"),
        ({"down": torch.zeros(257, 8)}, "1 to 256 rows, not 257"),
    ],
)
def test_arguments_that_do_not_fit_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_rowwise(**{"x": torch.zeros(4, 8), **arguments})


def test_operator_passes_opcheck_and_compiles():
    op = torch.ops.int8run.triton_quantize_rowwise.default
    x = make_tensor(5, 32)
    tests = ("test_schema", "test_faketensor")
    for arguments in [
        (x, None, 0, False, -1, None),
        (x, x[0].clone(), 16, False, 3, make_tensor(2, 32)),
        (x, None, 8, True, -1, None),
    ]:
        torch.library.opcheck(op, arguments, test_utils=tests)
    compiled = torch.compile(
        lambda x: quantize_rowwise(x, rotation=4)[0], backend="aot_eager", fullgraph=True, dynamic=True
    )

    for rows in (5, 9):
        x = make_tensor(rows, 32)
        assert torch.equal(compiled(x), quantize_rowwise(x, rotation=4)[0])
