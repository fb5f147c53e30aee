"""The CPU kernels beside their definitions: rows, the product, the branch, the packed weight."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import assert_close
from support.helpers import CPU, full_range, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import linear
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import TINY, quantize_rowwise, transform_rows
from int8run.quant.weight import quantize_weight

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
DTYPES = list(linear.DTYPES)
# float32: the bias is added by a fused multiply-add; half precision: that may move a rounding of the output
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 1e-4}


def as_signed(q, k):
    """The kernel's bytes as the reference's integers."""
    return (q[:, :k].short() - 128).to(torch.int8)


def as_unsigned(q):
    """The reference's integers as the kernel's bytes; what pads a row must not matter."""
    m, k = q.shape
    return torch.cat(
        [(q.short() + 128).to(torch.uint8), torch.randint(0, 256, (m, -k % 4)).to(torch.uint8)], dim=1
    )


def assert_same_bits(x):
    q, scale = linear.quantize_rows(x)
    expected, expected_scale = quantize_rowwise(x)
    assert q.dtype == torch.uint8
    assert q.shape == (x.shape[0], -(-x.shape[1] // 4) * 4)
    assert scale.shape == x.shape[:1]
    assert torch.equal(as_signed(q, x.shape[1]), expected)
    assert torch.equal(scale, expected_scale[:, 0])


def assert_differs_at_ties_only(x, factor=None, rotation=0, sylvester=False, gelu_from=-1):
    """Integers differ only where x / scale is half way between two; float64 is the judge."""
    by = (
        Rotation((sylvester_hadamard if sylvester else regular_hadamard)(rotation), sylvester)
        if rotation
        else None
    )
    exact = transform_rows(x.double(), None if factor is None else factor.double(), by, gelu_from)
    expected, expected_scale = quantize_rowwise(exact)
    q, scale = linear.quantize_rows(x, factor, rotation, sylvester=sylvester, gelu_from=gelu_from)
    torch.testing.assert_close(scale, expected_scale[:, 0], rtol=1e-6, atol=0)
    steps = exact / expected_scale.double()
    differ = as_signed(q, x.shape[1]).short() - expected.short()
    # float32 sums of up to 1024 numbers, and up to 127 steps
    from_tie = ((steps - steps.floor()) - 0.5).abs()
    assert ((differ == 0) | ((differ.abs() == 1) & (from_tie < 1e-3))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 130, 9000])
def test_plain_rows_are_quantized_to_the_same_bits(k, dtype):
    for m in (1, 2, 7, 33):
        assert_same_bits(randn(m, k, seed=m, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_quantized_to_the_same_bits(dtype):
    wide = randn(9, 130, dtype=dtype)

    for x in (
        wide[:, :63],
        wide[:, 3:70],
        wide[::2],
        wide.T,
        wide[:, ::2],
        wide[:1].expand(5, 130),
        wide[:, :1],
        wide.T[:, :1],
    ):
        assert_same_bits(x)
    assert_same_bits(randn(1, 24, dtype=dtype).as_strided((1, 24), (0, 1)))
    assert_differs_at_ties_only(wide[:, 1:65], factor=randn(64, seed=1), rotation=16, gelu_from=20)
    assert_differs_at_ties_only(wide[:8].T, factor=randn(8, seed=1), rotation=4, gelu_from=3)


def test_float64_is_read_as_float32():
    assert_same_bits(randn(3, 21).double())


def test_ties_are_rounded_to_even_and_minus_128_never_occurs():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5]])

    assert as_signed(linear.quantize_rows(x)[0], 9).tolist() == [[127, 0, 2, 2, 126, 0, -2, -2, -126]]

    # many rows, because x / scale passes 127 by a rounding in some of them only
    q, _ = linear.quantize_rows(-randn(4096, 3).abs())

    assert (as_signed(q, 3).amin(1) == -127).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["smallest_normal", "max", "smallest subnormal"])
def test_extremes_of_each_dtype_are_quantized(size, dtype):
    info = torch.finfo(dtype)
    peak = info.smallest_normal * info.eps if size == "smallest subnormal" else getattr(info, size)

    assert_same_bits(torch.tensor([[peak, -peak, 0.0, peak / 2], [0.0, 0, 0, -peak]]).to(dtype))


REGULAR = [(g, k) for g in (4, 16, 64, 256) for k in (g, 3 * g)] + [(4, 36), (16, 400), (1024, 2048)]
# widths that end inside a register, and groups that leave one step or two to memory
SYLVESTER = [(2**n, k * 2**n) for n in range(1, 10) for k in (1, 3)] + [
    (2, 34),
    (4, 36),
    (8, 40),
    (16, 400),
    (1024, 2048),
    (2048, 4096),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sylvester", "group", "k"),
    [(False, *shape) for shape in REGULAR] + [(True, *shape) for shape in SYLVESTER],
)
def test_rotation_equals_the_reference(sylvester, group, k, dtype):
    for m in (1, 5):
        assert_differs_at_ties_only(randn(m, k, seed=m, dtype=dtype), rotation=group, sylvester=sylvester)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 63, 9000])
def test_factor_equals_the_reference(k):
    assert_differs_at_ties_only(randn(5, k), factor=randn(k, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu_from", [0, 1, 15, 16, 17, 40, 76, 77, -1])
def test_gelu_applies_from_a_column_on(gelu_from, dtype):
    assert_differs_at_ties_only(3 * randn(7, 77, dtype=dtype), gelu_from=gelu_from)


@pytest.mark.parametrize("sign", [[1.0], [-1.0], [1.0, -1.0]], ids=["positive", "negative", "both"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-3, 1.0, 6.0, 12.0, 1e3, 1e15, 1e30, 3e38])
def test_gelu_of_tiny_and_huge_numbers_equals_the_reference(size, sign):
    x = size * randn(6, 40).abs().clamp(0.1, 1) * torch.tensor(sign).repeat(40 // len(sign))
    _, scale = linear.quantize_rows(x, gelu_from=0)
    _, expected = quantize_rowwise(transform_rows(x.double(), None, None, 0))

    # float64's own tanh loses the last digits of what is left at -6; beyond -12 nothing is left
    torch.testing.assert_close(scale, expected[:, 0], rtol=1e-4, atol=1e-15)
    if sign != [-1.0]:
        assert_differs_at_ties_only(x, gelu_from=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sylvester", [False, True], ids=["regular", "Sylvester"])
@pytest.mark.parametrize(("group", "k"), [(4, 20), (16, 48), (64, 192), (256, 768), (1024, 1024)])
def test_gelu_factor_and_rotation_apply_in_this_order(group, k, sylvester, dtype):
    for gelu_from in (0, 11, k - 3):
        assert_differs_at_ties_only(
            2 * randn(7, k, dtype=dtype), randn(k, seed=1), group, sylvester, gelu_from
        )
        if sylvester:  # and the groups that are no power of 4
            assert_differs_at_ties_only(
                2 * randn(7, k, dtype=dtype), randn(k, seed=1), group // 2, True, gelu_from
            )


# rotation, sylvester, whether there is a factor, gelu_from
STEPS = {
    "plain": (0, False, False, -1),
    "factor": (0, False, True, -1),
    "GELU": (0, False, False, 0),
    "rotated": (16, False, False, -1),
    "rotated by Sylvester": (8, True, False, -1),
    "all": (16, False, True, 3),
    "all, by Sylvester": (8, True, True, 3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_infinity_stay_in_their_row(value, steps, dtype):
    rotation, sylvester, with_factor, gelu_from = STEPS[steps]
    factor = randn(80, seed=1) if with_factor else None
    x, weight = randn(5, 80, dtype=dtype), quantize_weight(randn(70, 80, seed=2))

    def run(x):
        return linear.quantize_rows(x, factor, rotation, sylvester=sylvester, gelu_from=gelu_from)

    finite_q, finite_scale = run(x)

    for column in (0, 37, 79):
        bad = x.clone()
        bad[3, column] = value
        q, scale = run(bad)

        assert not scale[3].isfinite()

        y = linear.int8_linear(
            q, scale, linear.pack_weight(weight.qdata), weight.scale[:, 0].contiguous(), None, dtype
        )

        assert not y[3].isfinite().any()
        assert y[[0, 1, 2, 4]].isfinite().all()

        others = [0, 1, 2, 4]

        assert torch.equal(q[others], finite_q[others])
        assert torch.equal(scale[others], finite_scale[others])


@pytest.mark.parametrize("steps", STEPS)
def test_zero_rows_stay_zero(steps):
    rotation, sylvester, with_factor, gelu_from = STEPS[steps]
    x = randn(4, 48)
    x[[0, 2]] = 0
    q, scale = linear.quantize_rows(
        x, randn(48, seed=1) if with_factor else None, rotation, sylvester=sylvester, gelu_from=gelu_from
    )

    assert (q[[0, 2]] == 128).all()
    assert (scale[[0, 2]] == torch.tensor(TINY)).all()
    assert (q[[1, 3]] != 128).any()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 4097, 9000])
def test_linear_equals_the_reference_on_awkward_shapes(k, n):
    rows = (1, 5, 6, 7, 191, 193, 400)
    q, qdata = full_range(rows[-1], k), full_range(n, k, seed=1)
    x_scale, w_scale, bias = (
        0.01 * randn(rows[-1], seed=2).abs(),
        0.01 * randn(n, seed=3).abs(),
        randn(n, seed=4),
    )
    product = int8_linear(q, x_scale[:, None], qdata, w_scale, None)
    packed, stored = linear.pack_weight(qdata), as_unsigned(q)

    for m in rows:
        for dtype in DTYPES:
            y = linear.int8_linear(stored[:m], x_scale[:m], packed, w_scale, None, dtype)
            assert y.dtype == dtype and torch.equal(y, product[:m].to(dtype)), f"{m} rows, {dtype}"
            y = linear.int8_linear(stored[:m], x_scale[:m], packed, w_scale, bias, dtype)
            assert_close(f"{m} rows, {dtype}, bias", y, (product[:m] + bias).to(dtype), TOLERANCE[dtype])


def test_bias_of_any_float_dtype():
    q, qdata, bias = full_range(3, 20), full_range(9, 20, seed=1), randn(9, seed=2, dtype=torch.bfloat16)

    def run(bias):
        packed = linear.pack_weight(qdata)
        return linear.int8_linear(as_unsigned(q), torch.ones(3), packed, torch.ones(9), bias, torch.float32)

    assert torch.equal(run(bias), run(bias.float()))


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_are_exact(sign):
    # 2^31 is passed on the way: 255 * 127 * 70001; the sums wrap, and the correction wraps them back
    q, qdata = (
        torch.full((2, 70001), 127, dtype=torch.int8),
        torch.full((3, 70001), 127 * sign, dtype=torch.int8),
    )
    y = linear.int8_linear(
        as_unsigned(q), torch.ones(2), linear.pack_weight(qdata), torch.ones(3), None, torch.float32
    )

    assert torch.equal(y, int8_linear(q, torch.ones(2, 1), qdata, torch.ones(3), None))


def make_layer(m, k, n, rank, dtype=torch.float32):
    """Arguments of `linear.int8_linear` with a branch, and the branch as it was in float."""
    x = randn(m, k, dtype=dtype)
    q, x_scale = linear.quantize_rows(x)
    weight, down, up = quantize_weight(randn(n, k, seed=1)), randn(rank, k, seed=2), randn(n, rank, seed=3)
    branch = Cpu().fuse_branch(down, up, dtype)
    plain = (
        q,
        x_scale,
        linear.pack_weight(weight.qdata),
        weight.scale[:, 0].contiguous(),
        randn(n, seed=4),
        dtype,
    )
    return plain, branch, x, down, up


def compute_with_branch(plain, branch, strengths):
    return linear.int8_linear(*plain, branch.down, branch.down_scale * strengths, branch.up, branch.up_scale)


RANKS = [1, 3, 16, 64, 70]


SHAPES = [(1, 7, 5), (6, 64, 64), (200, 130, 133), (7, 4099, 65)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_branch_equals_two_int8_products(rank, shape, dtype):
    plain, branch, x, down, up = make_layer(*shape, rank, dtype)
    strengths = randn(rank, seed=5)
    q, x_scale = quantize_rowwise(x)
    down, up = quantize_weight(down), quantize_weight(up)
    t_q, t_scale = quantize_rowwise(int8_linear(q, x_scale, down.qdata, down.scale[:, 0] * strengths, None))
    base = linear.int8_linear(*plain[:-1], torch.float32)
    expected = base + int8_linear(t_q, t_scale, up.qdata, up.scale[:, 0], None)

    assert_close(
        f"rank {rank}", compute_with_branch(plain, branch, strengths), expected.to(dtype), TOLERANCE[dtype]
    )


@pytest.mark.parametrize("shape", [(200, 7, 5), *SHAPES[1:]], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_branch_is_close_to_its_float_product(rank, shape):
    plain, branch, x, down, up = make_layer(*shape, rank)
    strengths = randn(rank, seed=5)
    added = (compute_with_branch(plain, branch, strengths) - linear.int8_linear(*plain)).double()
    expected = (x.double() @ down.double().T * strengths) @ up.double().T

    # x, down, t and up are rounded to steps of absmax / 127; a normal row's absmax is up to 4 times its RMS
    # at these widths: 4 / 127 / sqrt(12) = 0.9 % each, and twice that together
    assert_close(f"rank {rank}", added, expected, 0.018)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_branch_of_strength_0_changes_no_bit(rank, dtype):
    plain, branch, *_ = make_layer(13, 130, 133, rank, dtype)
    assert torch.equal(compute_with_branch(plain, branch, torch.zeros(rank)), linear.int8_linear(*plain))


def test_branch_keeps_nan_and_infinity_visible():
    plain, branch, *_ = make_layer(5, 64, 70, 3)
    plain[1][2] = float("inf")
    y = compute_with_branch(plain, branch, torch.ones(3))

    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.fixture
def limit_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [0, 16])
def test_any_number_of_threads_gives_the_same_bits(limit_threads, rank):
    plain, branch, x, *_ = make_layer(400, 4224, 330, rank or 1, torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        limit_threads(count)
        y = compute_with_branch(plain, branch, torch.ones(rank)) if rank else linear.int8_linear(*plain)
        rotated = [
            t
            for sylvester in (False, True)
            for t in linear.quantize_rows(x, randn(4224, seed=7), 64, sylvester=sylvester, gelu_from=100)
        ]
        results.append((y, *rotated))

    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (63, 3), (64, 4), (65, 5), (130, 4097)], ids=str)
def test_unpack_inverts_pack_also_after_saving(shape, tmp_path):
    n, k = shape
    qdata = full_range(n, k)
    packed = linear.pack_weight(qdata)

    assert packed.dtype == torch.int8
    assert packed.shape == (-(-n // 64), 1 + -(-k // 4), 256)
    assert torch.equal(linear.unpack_weight(packed, n, k), qdata)
    # the compensations, as linear.h describes them
    assert torch.equal(
        packed[:, 0].contiguous().view(torch.int32).flatten()[:n], 128 * qdata.sum(1, dtype=torch.int32)
    )

    save_file({"packed": packed}, tmp_path / "layer.safetensors")

    assert torch.equal(load_file(tmp_path / "layer.safetensors")["packed"], packed)


def test_non_contiguous_weight_packs_to_the_same():
    qdata = full_range(66, 37)
    assert torch.equal(linear.pack_weight(qdata.T.contiguous().T), linear.pack_weight(qdata))


def test_zero_rows_of_input():
    q, scale = linear.quantize_rows(torch.zeros(0, 12), torch.ones(12), 4, gelu_from=3)

    assert q.shape == (0, 12)
    assert scale.shape == (0,)

    plain, branch, *_ = make_layer(0, 12, 5, 3)

    assert (
        linear.int8_linear(*plain).shape == compute_with_branch(plain, branch, torch.ones(3)).shape == (0, 5)
    )


def test_arguments_are_not_changed():
    plain, branch, x, *_ = make_layer(7, 64, 66, 3)
    tensors = [x, *(t for t in (*plain, *branch) if isinstance(t, torch.Tensor))]
    before = [t.clone() for t in tensors]
    linear.quantize_rows(x, torch.full((64,), 2.0), 16, gelu_from=0)
    linear.quantize_rows(x, None, 64, sylvester=True)
    compute_with_branch(plain, branch, torch.ones(3))

    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("sylvester", [False, True], ids=["regular", "Sylvester"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_in_one_graph_for_any_number_of_rows(dtype, sylvester):
    torch._dynamo.reset()
    (_, _, packed, w_scale, bias, _), branch, *_ = make_layer(7, 80, 66, 3, dtype)

    def run(x):
        q, scale = linear.quantize_rows(x, factor, 16, sylvester=sylvester, gelu_from=70)
        return linear.int8_linear(
            q, scale, packed, w_scale, bias, dtype, branch.down, branch.down_scale, branch.up, branch.up_scale
        )

    factor = randn(80, seed=1)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")

    for m in (7, 3, 12):
        x = randn(m, 80, seed=m, dtype=dtype)
        assert torch.equal(compiled(x), run(x))


def test_operators_pass_opcheck():
    plain, branch, x, *_ = make_layer(5, 66, 70, 3)
    torch.library.opcheck(torch.ops.int8run.cpu_quantize.default, (x, None, 0, False, -1, "auto"))
    torch.library.opcheck(
        torch.ops.int8run.cpu_quantize.default, (x[:, :64].bfloat16(), randn(64), 16, False, 3, "auto")
    )
    torch.library.opcheck(torch.ops.int8run.cpu_quantize.default, (x, None, 2, True, -1, "auto"))
    *operands, dtype = plain
    torch.library.opcheck(
        torch.ops.int8run.cpu_linear.default, (*operands, None, None, None, None, dtype, "auto")
    )
    parts = (branch.down, branch.down_scale, branch.up, branch.up_scale)
    torch.library.opcheck(torch.ops.int8run.cpu_linear.default, (*operands, *parts, torch.bfloat16, "auto"))


def test_arguments_that_do_not_fit_raise():
    x = randn(3, 48)

    for rotation in (-4, 1, 2, 3, 8, 64, 128):
        with pytest.raises(
            ValueError, match=f"rotation must be 0 or a power of 4 that divides 48 columns, not {rotation}$"
        ):
            linear.quantize_rows(x, rotation=rotation)
    for rotation in (-2, 1, 3, 12, 32, 64, 128):
        with pytest.raises(
            ValueError, match=f"rotation must be 0 or a power of 2 that divides 48 columns, not {rotation}$"
        ):
            linear.quantize_rows(x, rotation=rotation, sylvester=True)
    with pytest.raises(
        ValueError, match=r"factor must be contiguous float32 \[48\], not torch.float64 \[48\]"
    ):
        linear.quantize_rows(x, factor=torch.ones(48, dtype=torch.float64))


def make_product_arguments(m=3, k=10, n=70, rank=5):
    """What `linear.int8_linear` takes by position."""
    q, x_scale = linear.quantize_rows(randn(m, k))
    down, up = full_range(rank, k, seed=1), full_range(n, rank, seed=2)
    weight, bias = linear.pack_weight(full_range(n, k, seed=3)), randn(n, seed=4)
    branch = (linear.pack_weight(down), randn(rank, seed=5), linear.pack_weight(up), randn(n, seed=6))
    return [q, x_scale, weight, randn(n, seed=7), bias, torch.float32, *branch]


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda q: q[:, :8], "q must be contiguous uint8"),
        (0, lambda q: q.view(torch.int8), "q must be contiguous uint8"),
        (1, lambda x_scale: x_scale[:-1], "q must be contiguous uint8"),
        (1, lambda x_scale: x_scale.double(), "q must be contiguous uint8"),
        (2, lambda packed: packed[:1], "a weight of 70 outputs and 12 inputs must be"),
        (2, lambda packed: packed[:, :-1].contiguous(), "a weight of 70 outputs and 12 inputs must be"),
        (2, lambda packed: packed.mT.contiguous().mT, "a weight of 70 outputs and 12 inputs must be"),
        (3, lambda w_scale: w_scale.repeat_interleave(2)[::2], "with contiguous float32 scales"),
        (4, lambda bias: bias[:-1], "bias must have 70 numbers"),
        (6, lambda down: down[:, :-1].contiguous(), "a weight of 5 outputs and 12 inputs must be"),
        (7, lambda down_scale: down_scale.repeat(13), "a weight of 65 outputs and 12 inputs must be"),
        (8, lambda up: up[:1], "a weight of 70 outputs and 8 inputs must be"),
        (9, lambda up_scale: up_scale.half(), "a weight of 70 outputs and 8 inputs must be"),
        (9, lambda up_scale: None, "a branch has all of down, down_scale, up and up_scale, or none"),
    ],
)
def test_operands_that_would_be_read_past_their_end_are_refused(place, change, words):
    arguments = make_product_arguments()
    arguments[place] = change(arguments[place])

    with pytest.raises(ValueError, match=words):
        linear.int8_linear(*arguments)


def test_a_bias_of_any_stride_and_dtype_is_taken():
    arguments = make_product_arguments()
    bias = arguments[4].bfloat16()
    arguments[4] = bias.float()
    expected = linear.int8_linear(*arguments)

    for other in (bias, bias.double(), bias.float().repeat_interleave(2)[::2]):
        arguments[4] = other
        assert torch.equal(linear.int8_linear(*arguments), expected)


def test_a_layer_without_inputs_is_its_bias_and_one_without_outputs_is_empty():
    no_inputs = make_product_arguments(k=0)
    bias = no_inputs[4]

    assert torch.equal(linear.int8_linear(*no_inputs), bias.expand(3, 70))
    no_inputs[4] = None
    assert torch.equal(linear.int8_linear(*no_inputs), torch.zeros(3, 70))
    assert linear.int8_linear(*make_product_arguments(n=0)).shape == (3, 0)
    assert linear.int8_linear(*make_product_arguments(m=0)).shape == (0, 70)
    without_ranks, plain = make_product_arguments(rank=0), make_product_arguments()[:6]
    assert torch.equal(linear.int8_linear(*without_ranks), linear.int8_linear(*plain))


def test_a_branch_that_could_only_be_left_out_is_refused():
    backend, weight = Cpu(), quantize_weight(randn(8, 16))
    x, packed, scale = backend.quantize(randn(3, 16)), backend.pack_weight(weight), weight.scale[:, 0]
    branch = backend.fuse_branch(randn(2, 16), randn(8, 2), torch.float32)
    without_scale = branch._replace(down_scale=None)

    for given, strengths in ((branch, None), (without_scale, torch.ones(2))):
        with pytest.raises(ValueError, match=r"a branch of backend cpu needs its scales, .* and strengths"):
            backend.linear(x, packed, scale, dtype=torch.float32, branch=given, strengths=strengths)


def test_settings_narrow_the_limits_of_one_object_only():
    assert Cpu(instructions="avx2").limits.kernel_instructions == ("avx2",)
    assert "amx" in Cpu().limits.kernel_instructions
    assert "limits" not in vars(Cpu(instructions="avx2"))
