"""Quantizing the rows of a weight: `rows.cpp` and its version in torch beside the definition."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.helpers import randn

from int8run.kernels.cpu import rows as module
from int8run.kernels.cpu.features import read_cpu_features
from int8run.kernels.cpu.library import FLAGS, ROWS, ROWS_FLAGS, VECTORS, BuildError, load_rows_library
from int8run.kernels.cpu.rows import (
    RowSums,
    has_compiled_library,
    quantize_rows_in_torch,
    quantize_weight_rows,
    transform_rows,
)
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, rotate_groups, sylvester_hadamard
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
COMPILED = has_compiled_library()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = [
    pytest.param(
        quantize_weight_rows,
        id="compiled",
        marks=pytest.mark.skipif(not COMPILED, reason="no C++ compiler here"),
    ),
    pytest.param(quantize_rows_in_torch, id="torch"),
]


def quantize_with(way, weight, **options):
    q, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0], 1)
    return q, scale, way(weight, q, scale, **options)


def assert_equals_definition(way, weight):
    q, scale, sums = quantize_with(way, weight)
    expected, expected_scale = quantize_rowwise(weight)
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)
    assert sums.finite
    return q, scale, sums


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 130, 1023, 1024, 1025, 9001])
def test_plain_rows_equal_the_definition_bit_for_bit(way, dtype, k):
    for n in (1, 5):
        assert_equals_definition(way, randn(n, k, seed=n, dtype=dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_numbers_equal_the_definition(way, dtype):
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    weight = torch.zeros(8, 40, dtype=dtype)
    weight[1] = -0.0
    weight[2, 3] = info.max  # one huge number among small ones
    weight[2, 4:20] = 1.0
    weight[3] = (torch.arange(40) * denormal).to(dtype)  # denormals alone
    weight[4] = torch.where(torch.arange(40) % 2 == 0, info.smallest_normal, -denormal).to(dtype)
    weight[5, :] = torch.tensor([127.0, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5, -127.0] * 4).to(
        dtype
    )  # ties
    weight[6, 39] = -info.max
    weight[7] = randn(40, seed=1).to(dtype) * denormal * 3
    q, scale, _ = assert_equals_definition(way, weight)

    assert not q[:2].any()
    assert (scale[:2] == 1e-30).all()
    assert q[5, :10].tolist() == [127, 0, 2, 2, 126, 0, -2, -2, -126, -127]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_dtype_equals_the_definition(way, dtype):
    """All 65536 bit patterns but NaN and infinity, many to a row."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_equals_definition(
        way, every[every.isfinite()].reshape(-1, 31 if dtype == torch.float16 else 15)[: 2**16 // 31]
    )
    assert_equals_definition(way, every[every.isfinite() & (every.abs() < 1)].unsqueeze(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_rows_with_nan_or_infinity_are_reported(way, dtype, bad, place):
    rotation = Rotation(regular_hadamard(4))
    weight = randn(3, 40, dtype=dtype)
    weight[1, place] = bad

    for options in ({}, {"rotation": rotation}, {"factor": torch.ones(40)}):
        q, scale, sums = quantize_with(way, weight, **options)
        clean_q, clean_scale, clean = quantize_with(way, weight[[0, 2]], **options)

        assert not sums.finite
        assert clean.finite
        assert torch.equal(q[[0, 2]], clean_q) and torch.equal(scale[[0, 2]], clean_scale), (
            "the other rows are as they would be"
        )


@pytest.mark.parametrize("way", WAYS)
def test_overflow_in_the_rotation_is_reported(way):
    weight = torch.full((2, 64), 3e38)

    assert quantize_with(way, weight)[2].finite
    assert not quantize_with(way, weight, rotation=Rotation(sylvester_hadamard(64), True))[2].finite
    assert not quantize_with(way, weight, factor=torch.full((64,), 0.1))[2].finite


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [3, 100, 3072])
def test_sums_equal_their_definition(way, k):
    weight = randn(9, k, dtype=torch.bfloat16) * 0.02
    q, scale, sums = quantize_with(way, weight)
    error = weight.double() - q.double() * scale.double()

    assert sums.signal == pytest.approx(weight.double().square().sum().item(), rel=1e-6)
    # numbers in float32 are rounded, which shows where the error is small
    assert sums.noise == pytest.approx(error.square().sum().item(), rel=1e-3)
    assert sums.saturated == int((q.abs() == 127).sum()) >= 9

    exact = torch.tensor([[127.0, -3.0, 0.0]])

    assert quantize_with(way, exact)[2] == RowSums(True, 127.0**2 + 9, 0.0, 1)


ROTATIONS = [(False, 4**n) for n in range(1, 6)] + [(True, 2**n) for n in range(1, 11)]


def make_rotation(sylvester, group):
    return Rotation((sylvester_hadamard if sylvester else regular_hadamard)(group), sylvester)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sylvester", "group"), ROTATIONS)
def test_rotated_rows_differ_from_the_matrix_product_at_ties_only(way, dtype, sylvester, group):
    rotation = make_rotation(sylvester, group)
    for k in (group, 3 * group):
        weight = randn(33, k, seed=k, dtype=dtype)
        exact = rotate_groups(weight.double(), rotation.matrix.double())
        expected, expected_scale = quantize_rowwise(exact)
        q, scale, sums = quantize_with(way, weight, rotation=rotation)

        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)

        steps = exact / expected_scale.double()
        from_tie = ((steps - steps.floor()) - 0.5).abs()
        differ = q.short() - expected.short()

        assert ((differ == 0) | ((differ.abs() == 1) & (from_tie < 1e-3))).all()
        assert sums.signal == pytest.approx(exact.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sylvester", "group"), [(False, 256), (False, 64), (True, 128)])
def test_rotated_rows_equal_the_matrix_product(way, dtype, sylvester, group):
    rotation = make_rotation(sylvester, group)
    weight = (randn(256, 3072) * 0.02).to(dtype)
    q, scale, _ = quantize_with(way, weight, rotation=rotation)
    expected, expected_scale = quantize_rowwise(rotate_groups(weight.float(), rotation.matrix))

    assert (q == expected).float().mean() >= 0.9999
    assert (q.short() - expected).abs().max() <= 1
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_factor_divides_columns_before_the_rotation(way):
    weight, factor = randn(17, 96), randn(96, seed=1).abs() + 0.1
    q, scale, _ = quantize_with(way, weight, factor=factor)
    expected, expected_scale = quantize_rowwise(weight / factor)

    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)

    rotation = make_rotation(True, 32)
    q, scale, _ = quantize_with(way, weight, factor=factor, rotation=rotation)
    expected, expected_scale = quantize_with(way, weight / factor, rotation=rotation)[:2]

    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.skipif(not COMPILED, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sylvester", "group", "k"), [(s, g, k * g) for s, g in ROTATIONS for k in (1, 3)] + [(False, 0, 1111)]
)
def test_torch_version_gives_the_same_bits(dtype, sylvester, group, k):
    weight, factor = randn(40, k, dtype=dtype), randn(k, seed=2).abs() + 0.5
    rotation = make_rotation(sylvester, group) if group else None

    for options in ({"rotation": rotation}, {"rotation": rotation, "factor": factor}):
        compiled, torchs = (
            quantize_with(way, weight, **options) for way in (quantize_weight_rows, quantize_rows_in_torch)
        )

        assert torch.equal(compiled[0], torchs[0])
        assert torch.equal(compiled[1], torchs[1])
        assert compiled[2].signal == pytest.approx(torchs[2].signal, rel=1e-5)
        assert compiled[2].noise == pytest.approx(torchs[2].noise, rel=1e-3)
        assert compiled[2].saturated == torchs[2].saturated


def test_regular_rotation_published_vectors():
    """formats.md: the regular matrix of 4 over 2, applied to a unit row; the first row of that of 16."""
    unit = torch.tensor([[1.0, 0, 0, 0]])

    assert transform_rows(unit, None, make_rotation(False, 4)).tolist() == [[0.5, 0.5, 0.5, -0.5]]

    row = transform_rows(torch.eye(16)[:1], None, make_rotation(False, 16))[0] * 4

    assert row.tolist() == [1, 1, 1, -1] * 3 + [-1, -1, -1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_other_float_dtypes_are_read_as_float32(way):
    weight = randn(3, 21).double()
    assert torch.equal(quantize_with(quantize_weight_rows, weight)[0], quantize_rowwise(weight)[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits_and_sums(threads):
    weight, rotation = randn(501, 512, dtype=torch.bfloat16), make_rotation(False, 64)
    expected = quantize_with(quantize_weight_rows, weight, rotation=rotation)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, scale, sums = quantize_with(quantize_weight_rows, weight, rotation=rotation)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert sums == expected[2]


@pytest.mark.skipif(not COMPILED, reason="no C++ compiler here")
@pytest.mark.parametrize("vectors", ["plain", "AVX2", "AVX512"])
def test_every_instruction_set_gives_the_same_bits(vectors, tmp_path, monkeypatch):
    wanted = VECTORS[vectors].features if vectors in VECTORS else ()
    if not read_cpu_features().issuperset(wanted):
        pytest.skip("this CPU does not have these instructions")

    assert FLAGS
    assert ROWS_FLAGS
    assert ROWS.suffix == ".cpp"

    weights = [(randn(20, 1040) * 0.1).to(dtype) for dtype in DTYPES]
    options = [
        {},
        {"rotation": make_rotation(False, 16)},
        {"rotation": make_rotation(True, 8), "factor": randn(1040).abs() + 1},
    ]
    expected = [quantize_with(quantize_weight_rows, w, **o) for w in weights for o in options]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(wanted, True))

    other = load_rows_library.__wrapped__(tmp_path)
    monkeypatch.setattr(module, "load_rows_library", lambda: other)

    for (q, scale, sums), again in zip(
        expected, [quantize_with(quantize_weight_rows, w, **o) for w in weights for o in options], strict=True
    ):
        assert torch.equal(q, again[0])
        assert torch.equal(scale, again[1])
        assert sums == again[2]


def test_without_a_compiler_torch_quantizes_and_warns_once(monkeypatch, caplog):
    def missing():
        raise BuildError("no C++ compiler on the PATH; install one")

    monkeypatch.setattr(module, "load_rows_library", missing)
    has_compiled_library.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            for _ in range(2):
                assert_equals_definition(quantize_weight_rows, randn(4, 20))
    finally:
        has_compiled_library.cache_clear()
    words = (
        "weights are quantized by torch, at a fraction of the speed: no C++ compiler on the PATH; install one"
    )

    assert [record.getMessage() for record in caplog.records] == [words]


def test_arguments_that_do_not_fit_raise():
    weight, q, scale = randn(4, 8), torch.empty(4, 8, dtype=torch.int8), torch.empty(4, 1)

    with pytest.raises(
        ValueError,
        match=r"^q must be contiguous torch.int8 \[4, 8\] on the CPU, not torch.int8 \[3, 8\] on cpu$",
    ):
        quantize_weight_rows(weight, q[:3], scale)
    with pytest.raises(
        ValueError, match=r"^scale must be contiguous torch.float32 \[4, 1\] on the CPU, not torch.float64"
    ):
        quantize_weight_rows(weight, q, scale.double())
    with pytest.raises(ValueError, match=r"^weight must be contiguous"):
        quantize_weight_rows(randn(8, 4).T, q, scale)
    with pytest.raises(ValueError, match=r"^factor must be contiguous torch.float32 \[8\]"):
        quantize_weight_rows(weight, q, scale, torch.ones(7))
    with pytest.raises(ValueError, match=r"^groups of 16 do not divide 8 columns$"):
        quantize_weight_rows(weight, q, scale, None, make_rotation(False, 16))


@pytest.mark.skipif(shutil.which("g++") is None or os.name != "posix", reason="needs a compiler")
def test_rows_library_is_named_after_its_source(tmp_path):
    path = Path(load_rows_library.__wrapped__(tmp_path)._name)
    assert path.parent == tmp_path
    assert path.name.startswith("rows-")
