"""Cases for test_triton_int8_linear.py, which runs this file in a process of its own."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import full_range, randn
from support.triton_process import case_device

from int8run.kernels.int8_linear.kernel import int8_linear
from int8run.kernels.int8_linear.reference import int8_linear as reference
from int8run.kernels.int8_linear.tile import Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FEW, SMALL = Tile(16, 32, 64, 1, 4, 2), Tile(32, 32, 128, 2, 4, 2)
ROUNDING = {FULL: 1e-6, HALF: 1e-3, BRAIN: 4e-3}


def make_inputs(m, n, k):
    """q, x_scale, qdata and a scale per row."""
    x_scale, w_scale = randn(m, 1).abs() + 0.1, randn(n, seed=1).abs() + 0.1
    return [t.to(DEVICE) for t in (full_range(m, k), x_scale / k, full_range(n, k, seed=1), w_scale / 100)]


def make_low_rank(m, n, rank, dtype):
    return randn(m, rank, seed=3).to(DEVICE), randn(n, rank, seed=4, dtype=dtype).to(DEVICE)


def compute_dequantized(q, x_scale, qdata, w_scale, group):
    """The same product in float64 with scales per group or block."""
    rows = w_scale.repeat_interleave(group, 0)[: len(qdata)] if len(w_scale) != len(qdata) else w_scale
    scales = rows.repeat_interleave(group, 1)[:, : qdata.shape[1]]
    return (q.double() * x_scale) @ (qdata.double() * scales).T


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("tile", [FEW, SMALL], ids=["few", "small"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 63, 130), (1, 40, 33), (16, 32, 64), (33, 96, 256), (70, 5, 7)], ids=str
)
def test_scales_and_bias_equal_the_reference_on_awkward_shapes(shape, tile, dtype):
    m, n, k = shape
    arguments, bias = make_inputs(m, n, k), randn(n, seed=2, dtype=dtype).to(DEVICE)
    y = int8_linear(*arguments, 0, bias, None, None, dtype, tile)

    assert y.dtype == dtype
    assert_close("y", y, reference(*arguments, bias), ROUNDING[dtype])


def test_no_bias_equals_a_zero_bias():
    arguments = make_inputs(17, 63, 130)
    assert_close(
        "y", int8_linear(*arguments, 0, None, None, None, FULL, SMALL), reference(*arguments, None), 1e-6
    )


@pytest.mark.parametrize("k", [20000, 131072])
def test_sums_at_large_k_are_exact(k):
    q, qdata = torch.full((1, k), -127, dtype=torch.int8), torch.full((2, k), -128, dtype=torch.int8)
    q[0, :3] = 5
    exact = (q.long() @ qdata.long().T).float()
    ones = [torch.ones(s, device=DEVICE) for s in ((1, 1), (2,))]
    y = int8_linear(
        q.to(DEVICE),
        ones[0],
        qdata.to(DEVICE),
        ones[1],
        0,
        None,
        None,
        None,
        FULL,
        Tile(16, 16, 512, 1, 1, 1),
    )

    assert torch.equal(y.cpu(), exact)


@pytest.mark.parametrize("square", [False, True], ids=["rows", "square"])
@pytest.mark.parametrize("group", [32, 64, 96, 256])
@pytest.mark.parametrize("shape", [(17, 63, 130), (33, 130, 512)], ids=str)
def test_scales_per_group_equal_the_reference(shape, group, square):
    m, n, k = shape
    q, x_scale, qdata, _ = make_inputs(m, n, k)
    w_scale = randn(-(-n // group) if square else n, -(-k // group), seed=5).to(DEVICE) / 100
    y = int8_linear(q, x_scale, qdata, w_scale, group, None, None, None, FULL, SMALL)

    assert_close("y", y, compute_dequantized(q, x_scale, qdata, w_scale, group), 1e-6)


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 65])
@pytest.mark.parametrize("tile", [FEW, SMALL], ids=["few", "small"])
def test_low_rank_branch_equals_the_reference(tile, rank, dtype):
    arguments, bias, (h, up) = (
        make_inputs(17, 63, 130),
        randn(63, seed=2).to(DEVICE),
        make_low_rank(17, 63, rank, dtype),
    )
    y = int8_linear(*arguments, 0, bias, h, up, FULL, tile)
    expected = reference(*arguments, bias) + h @ up.float().T

    assert_close("y", y, expected, ROUNDING[dtype])


def test_strengths_scale_each_rank():
    arguments, (h, up) = make_inputs(17, 63, 130), make_low_rank(17, 63, 20, FULL)
    strengths = randn(20, seed=9).to(DEVICE)
    y = int8_linear(*arguments, 0, None, h, up, FULL, SMALL, strengths)

    assert_close("y", y, reference(*arguments, None) + (h * strengths) @ up.T, ROUNDING[FULL])
    # what a branch at strength 0 leaves is the layer itself
    assert torch.equal(
        int8_linear(*arguments, 0, None, h, up, FULL, SMALL, 0 * strengths),
        int8_linear(*arguments, 0, None, None, None, FULL, SMALL),
    )


def test_all_options_together_equal_the_reference():
    q, x_scale, qdata, _ = make_inputs(33, 130, 256)
    w_scale, bias, (h, up) = (
        randn(5, 8, seed=5).to(DEVICE) / 100,
        randn(130, seed=2, dtype=HALF).to(DEVICE),
        make_low_rank(33, 130, 20, BRAIN),
    )
    y = int8_linear(q, x_scale, qdata, w_scale, 32, bias, h, up, BRAIN, SMALL)
    expected = compute_dequantized(q, x_scale, qdata, w_scale, 32) + bias + h @ up.float().T

    assert_close("y", y, expected, ROUNDING[BRAIN])


@pytest.mark.parametrize("group_m", [1, 3, 64])
def test_every_tile_is_computed_for_any_group_m(group_m):
    arguments = make_inputs(100, 70, 32)
    y = int8_linear(*arguments, 0, None, None, None, FULL, Tile(16, 16, 32, group_m, 1, 1))

    assert_close("y", y, reference(*arguments, None), 1e-6)


def test_nan_and_infinite_scales_stay_in_their_row():
    q, x_scale, qdata, w_scale = make_inputs(3, 5, 32)
    x_scale[1] = float("nan")
    finite = int8_linear(q, x_scale, qdata, w_scale, 0, None, None, None, FULL, FEW).isfinite()

    assert finite.all(dim=1).tolist() == [True, False, True]
    assert not finite[1].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(4, 9, dtype=torch.int8)}, r"q must be \[M, K\] and qdata \[N, K\]"),
        ({"q": torch.zeros(4, 8)}, "q must be contiguous torch.int8"),
        ({"qdata": torch.zeros(8, 6, dtype=torch.int8).T}, "qdata must be contiguous"),
        ({"x_scale": torch.zeros(4)}, r"x_scale must be contiguous torch.float32 \[4, 1\]"),
        ({"w_scale": torch.zeros(6, 1)}, r"w_scale must be \[6\] for group 0, not \[6, 1\]"),
        ({"group": 32}, r"w_scale must be \[6, 1\] or \[1, 1\] for group 32"),
        ({"group": 16}, "group must be 0 or a multiple of 32, not 16"),
        ({"h": torch.zeros(4, 2)}, "h and up come together"),
        ({"h": torch.zeros(4, 2), "up": torch.zeros(6, 3)}, r"h must be \[4, R\] and up \[6, R\]"),
        ({"bias": torch.zeros(5)}, r"bias must be contiguous .* \[6\]"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
        (
            {
                "q": torch.zeros(1, 131073, dtype=torch.int8),
                "qdata": torch.zeros(1, 131073, dtype=torch.int8),
            },
            "int32 sums hold at most 131072",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise(changed, message):
    arguments = {
        "q": torch.zeros(4, 8, dtype=torch.int8),
        "x_scale": torch.zeros(4, 1),
        "qdata": torch.zeros(6, 8, dtype=torch.int8),
        "w_scale": torch.zeros(6),
        "group": 0,
        "bias": None,
        "h": None,
        "up": None,
        "out_dtype": BRAIN,
        "tile": FEW,
    }
    with pytest.raises(ValueError, match=message):
        int8_linear(**{**arguments, **changed})


def test_operator_passes_opcheck_and_compiles():
    q, x_scale, qdata, w_scale = make_inputs(5, 6, 32)
    rest = (0, None, *make_low_rank(5, 6, 3, HALF), None, HALF, FEW.as_list())
    op = torch.ops.int8run.triton_int8_linear.default
    torch.library.opcheck(
        op, (q, x_scale, qdata, w_scale, *rest), test_utils=("test_schema", "test_faketensor")
    )

    def layer(q, x_scale):
        return int8_linear(q, x_scale, qdata, w_scale, 0, None, None, None, FULL, FEW)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)

    for rows in (5, 9):
        q, x_scale, *_ = make_inputs(rows, 6, 32)
        assert torch.equal(compiled(q, x_scale), layer(q, x_scale))
