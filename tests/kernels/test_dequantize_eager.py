"""The version for CPUs gives the reference's numbers, bit for bit."""

from math import ceil

import pytest
import torch
from support.helpers import full_range, randn

from int8run.kernels.dequantize import eager, reference

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [N, K] of the weight, shape of the scale, `block`
LAYOUTS = [
    ((6, 8), (), None),
    ((6, 8), (1, 1), 128),
    ((6, 8), (6,), None),
    ((6, 8), (6, 1), None),
    ((1, 8), (1, 4), None),
    ((6, 8), (3, 4), None),
    ((20, 8), (3, 1), 8),
    ((6, 2), (3, 1), None),
    ((7, 9), (2, 3), 4),
    ((6, 8), (6, 4), None),
    ((6, 9), (6, 3, 1), 4),
    ((3, 2), (1, 1), 4),
    ((3, 9), (1, 3), 4),
]


def make_all_bytes(rows):
    """Each byte once per row."""
    return torch.arange(256, dtype=torch.uint8).repeat(rows, 1)


def assert_bit_equal(actual, expected):
    """Equal bit for bit, zeros with their signs; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "scales", "block"), LAYOUTS, ids=str)
def test_int8_and_fp8_equal_the_reference_in_every_layout(shape, scales, block, dtype):
    scale, q, codes = (
        randn(*scales),
        full_range(*shape),
        make_all_bytes(2).flatten()[100 : 100 + shape[0] * shape[1]].view(shape),
    )
    before = scale.clone(), q.clone()

    assert_bit_equal(
        eager.dequantize_int8(q, scale, block, dtype), reference.dequantize_int8(q, scale, block, dtype)
    )
    for fp8 in FP8:
        assert_bit_equal(
            eager.dequantize_fp8(codes.view(fp8), scale, block, dtype),
            reference.dequantize_fp8(codes.view(fp8), scale, block, dtype),
        )
    assert torch.equal(scale, before[0]) and torch.equal(q, before[1]), "arguments stay as they are"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", FP8, ids=str)
def test_every_fp8_code_equals_the_reference(codes, dtype):
    assert_bit_equal(
        eager.dequantize_fp8(make_all_bytes(2).view(codes), randn(2, 1), dtype=dtype),
        reference.dequantize_fp8(make_all_bytes(2).view(codes), randn(2, 1), dtype=dtype),
    )


def test_non_contiguous_qdata_equals_the_reference():
    q, codes = full_range(8, 6).T, make_all_bytes(1).reshape(16, 16).view(FP8[0]).T
    assert_bit_equal(eager.dequantize_int8(q, randn(6, 1)), reference.dequantize_int8(q, randn(6, 1)))
    assert_bit_equal(eager.dequantize_fp8(codes, randn(16, 1)), reference.dequantize_fp8(codes, randn(16, 1)))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scales_of_any_dtype_equal_the_reference(scale_dtype):
    scale = randn(4, 1).to(scale_dtype)
    assert_bit_equal(
        eager.dequantize_int8(full_range(4, 8), scale), reference.dequantize_int8(full_range(4, 8), scale)
    )


@pytest.mark.parametrize("swizzled", [True, False], ids=["swizzled", "rows"])
@pytest.mark.parametrize("columns", [32, 40, 256])
def test_mxfp8_equals_the_reference(columns, swizzled):
    scale = (
        make_all_bytes(2).flatten()[:512].reshape(128, 4)
        if swizzled
        else make_all_bytes(3)[:, 120 : 120 + ceil(columns / 32)].contiguous()
    )
    codes = make_all_bytes(3)[:, :columns].contiguous().view(FP8[0])
    if columns == 256 and swizzled:
        scale = torch.cat([scale, scale.flip(0)])

    for kept in (scale, scale.view(torch.float8_e8m0fnu)):
        assert_bit_equal(
            eager.dequantize_mxfp8(codes, kept, swizzled=swizzled, dtype=torch.bfloat16),
            reference.dequantize_mxfp8(codes, kept, swizzled=swizzled, dtype=torch.bfloat16),
        )


@pytest.mark.parametrize("high_first", [True, False])
@pytest.mark.parametrize("swizzled", [True, False], ids=["swizzled", "rows"])
def test_nvfp4_equals_the_reference(swizzled, high_first):
    scale = torch.arange(128 * 32).remainder(127).to(torch.uint8).reshape(128, 32)
    scale = (scale if swizzled else scale[:3]).contiguous()
    options = {"swizzled": swizzled, "high_first": high_first}

    for dtype in DTYPES:
        assert_bit_equal(
            eager.dequantize_nvfp4(make_all_bytes(3), scale, torch.tensor([0.37]), **options, dtype=dtype),
            reference.dequantize_nvfp4(
                make_all_bytes(3), scale, torch.tensor([0.37]), **options, dtype=dtype
            ),
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eager.dequantize_int8(make_all_bytes(1), torch.ones(())), "qdata is torch.uint8"),
        (lambda: eager.dequantize_fp8(full_range(2, 2), torch.ones(())), "qdata is torch.int8"),
        (lambda: eager.dequantize_int8(full_range(2, 4), torch.ones(3)), "fits no layout"),
        (
            lambda: eager.dequantize_mxfp8(make_all_bytes(1).view(FP8[0]), torch.zeros(1, 1), swizzled=False),
            "block scales",
        ),
        (
            lambda: eager.dequantize_nvfp4(
                make_all_bytes(1), make_all_bytes(1)[:, :32], torch.ones(2), swizzled=False, high_first=True
            ),
            "the global scale",
        ),
    ],
)
def test_errors_are_those_of_the_reference(call, message):
    with pytest.raises(ValueError, match=message):
        call()
