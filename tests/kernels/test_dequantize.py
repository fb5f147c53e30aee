"""Weights of checkpoint files back into floats: what the definitions must give, number by number."""

from math import ceil, inf, nan

import pytest
import torch
from support.helpers import full_range, randn

from int8run.kernels.dequantize.reference import (
    compute_swizzled_offsets,
    dequantize_fp8,
    dequantize_int8,
    dequantize_mxfp8,
    dequantize_nvfp4,
)
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def make_codes(*values, dtype=torch.uint8):
    """One row of bytes, read as a type."""
    return torch.tensor([values], dtype=torch.uint8).view(dtype)


def make_bytes(*shape, seed=0):
    """Seeded bytes, all of 0..255."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def swizzle_by_formula(scale, fill=0xFF):
    """Scales in rows -> as ComfyUI's files hold them; the padding is NaN, so that nobody reads it."""
    rows, columns = scale.shape
    padded = torch.full((ceil(rows / 128) * 128, ceil(columns / 4) * 4), fill, dtype=torch.uint8)
    padded.view(-1)[compute_swizzled_offsets(rows, columns)] = scale.view(torch.uint8)
    return padded.view(scale.dtype)


def assert_bit_equal(actual, expected):
    """Equal bit for bit, zeros with their signs; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def test_int8_per_row_published_vector():
    q, scale = quantize_rowwise(torch.tensor([[1, -2, 0.5, 0]]))

    assert q.tolist() == [[64, -127, 32, 0]]
    assert scale.item() == torch.tensor(2 / 127).item()
    assert_bit_equal(dequantize_int8(q, scale), torch.tensor([[64.0, -127, 32, 0]]) * torch.tensor(2 / 127))


# [N, K] of the weight, shape of the scale, `block`, which scale an entry n, k has
LAYOUTS = [
    ((3, 5), (), None, lambda n, k: 0),
    ((3, 5), (1,), None, lambda n, k: 0),
    ((3, 5), (1, 1), 128, lambda n, k: 0),
    ((3, 5), (3,), None, lambda n, k: n),
    ((5, 5), (5,), None, lambda n, k: n),
    ((3, 5), (3, 1), 128, lambda n, k: n),
    ((1, 5), (1, 5), None, lambda n, k: k),
    ((4, 6), (2, 3), None, lambda n, k: n // 2 * 3 + k // 2),
    ((4, 6), (2, 3), 2, lambda n, k: n // 2 * 3 + k // 2),
    ((4, 2), (2, 1), None, lambda n, k: n // 2),
    ((5, 7), (2, 3), 3, lambda n, k: n // 3 * 3 + k // 3),
    ((130, 260), (2, 3), 128, lambda n, k: n // 128 * 3 + k // 128),
    ((3, 6), (3, 2), None, lambda n, k: n * 2 + k // 3),
    ((3, 6), (3, 2, 1), None, lambda n, k: n * 2 + k // 3),
    ((3, 7), (3, 3, 1), 3, lambda n, k: n * 3 + k // 3),
]


@pytest.mark.parametrize(
    ("shape", "scales", "block", "which"), LAYOUTS, ids=[f"{list(n)}-{list(s)}-{b}" for n, s, b, _ in LAYOUTS]
)
def test_each_layout_scales_its_entries(shape, scales, block, which):
    n, k = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    scale = randn(*scales)
    expected = scale.flatten()[torch.as_tensor(which(n, k)).expand(shape)]
    q, fp8 = full_range(*shape), make_bytes(*shape).view(FP8[0])

    assert_bit_equal(dequantize_int8(q, scale, block), q.float() * expected)
    assert_bit_equal(dequantize_fp8(fp8, scale, block), fp8.float() * expected)


def test_minus_128_is_dequantized():
    assert dequantize_int8(torch.tensor([[-128, 127]], dtype=torch.int8), torch.tensor(0.5)).tolist() == [
        [-64, 63.5]
    ]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (
            FP8[0],
            {
                0x00: 0.0,
                0x01: 2**-9,
                0x07: 7 * 2**-9,
                0x08: 2**-6,
                0x38: 1.0,
                0x7E: 448.0,
                0x7F: nan,
                0xFF: nan,
                0x80: -0.0,
                0xB8: -1.0,
            },
        ),
        (
            FP8[1],
            {
                0x00: 0.0,
                0x01: 2**-16,
                0x03: 3 * 2**-16,
                0x3C: 1.0,
                0x7B: 57344.0,
                0x7C: inf,
                0xFC: -inf,
                0x7D: nan,
                0xFF: nan,
                0x80: -0.0,
            },
        ),
    ],
    ids=str,
)
def test_fp8_codes_have_their_values(dtype, values):
    assert_bit_equal(
        dequantize_fp8(make_codes(*values, dtype=dtype), torch.tensor(1.0)),
        torch.tensor([list(values.values())]),
    )


def test_mxfp8_scales_are_powers_of_2_and_255_is_nan():
    # one block of ones under each scale; of two bytes, the second block is the last and partial
    one = torch.ones(1, 40).to(FP8[0])
    for byte, value in {120: 2**-7, 127: 1.0, 0: 2**-127, 1: 2**-126, 254: 2.0**127, 255: nan}.items():
        w = dequantize_mxfp8(one, make_codes(127, byte), swizzled=False)
        assert_bit_equal(w, torch.tensor([[1.0] * 32 + [value] * 8]))
        assert_bit_equal(
            dequantize_mxfp8(one, make_codes(127, byte, dtype=torch.float8_e8m0fnu), swizzled=False), w
        )


def test_every_nvfp4_code_has_its_value():
    one = make_codes(0x38)
    w = dequantize_nvfp4(make_codes(0x2F), one, torch.tensor(1.0), swizzled=False, high_first=True)

    assert w.tolist() == [[1, -6]]

    w = dequantize_nvfp4(make_codes(0x2F), one, torch.tensor(1.0), swizzled=False, high_first=False)

    assert w.tolist() == [[-6, 1]]

    all_codes = make_codes(0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF)
    positive = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    w = dequantize_nvfp4(all_codes, one, torch.tensor(1.0), swizzled=False, high_first=True)

    assert_bit_equal(w, torch.tensor([positive + [-v for v in positive]]))


def test_nvfp4_scales_are_rounded_once():
    qdata, scale, global_scale = make_bytes(3, 20), randn(3, 3, seed=1).to(FP8[0]), torch.tensor(0.1)
    w = dequantize_nvfp4(qdata, scale, global_scale, swizzled=False, high_first=True)
    values = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-v for v in values]

    for n in range(3):
        for k in range(40):
            code = qdata[n, k // 2].item() >> (0 if k % 2 else 4) & 15
            # Python's floats are double, so that only the last step rounds to float32
            exact = values[code] * scale[n, k // 16].float().item() * global_scale.item()
            assert w[n, k].item() == torch.tensor(exact, dtype=torch.float64).float().item()


def test_swizzled_offsets_equal_the_published_formula():
    at = compute_swizzled_offsets(129, 48)
    expected = {
        (0, 0): 0,
        (0, 3): 3,
        (1, 0): 16,
        (32, 0): 4,
        (64, 0): 8,
        (96, 0): 12,
        (0, 4): 512,
        (128, 0): 6144,
    }

    assert {place: at[place].item() for place in expected} == expected
    assert torch.equal(compute_swizzled_offsets(256, 48).flatten().sort().values, torch.arange(256 * 48))


@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 96), (130, 160), (128, 128), (33, 70)])
def test_swizzled_and_row_major_scales_give_the_same_weight(n, k):
    fp8, scale = make_bytes(n, k).view(FP8[1]), make_bytes(n, ceil(k / 32), seed=1)

    assert_bit_equal(
        dequantize_mxfp8(fp8, swizzle_by_formula(scale), swizzled=True),
        dequantize_mxfp8(fp8, scale, swizzled=False),
    )

    qdata, scale = make_bytes(n, k // 2), make_bytes(n, ceil(k / 16), seed=1).view(FP8[0])
    options = {"global_scale": torch.tensor([0.3]), "high_first": True}
    expected = dequantize_nvfp4(qdata, scale, swizzled=False, **options)

    assert_bit_equal(dequantize_nvfp4(qdata, swizzle_by_formula(scale), swizzled=True, **options), expected)
    # the bytes of the scales, and flat: the padded shape is nominal
    assert_bit_equal(
        dequantize_nvfp4(
            qdata, swizzle_by_formula(scale.view(torch.uint8)).flatten(), swizzled=True, **options
        ),
        expected,
    )


def test_zero_scales_give_zeros():
    zero, q = torch.zeros(2, 1), full_range(2, 9)

    assert_bit_equal(dequantize_int8(q, zero).abs(), torch.zeros(2, 9))
    assert_bit_equal(
        dequantize_fp8(make_codes(0x7F, 0x7E, dtype=FP8[0]), torch.tensor(0.0)), torch.tensor([[nan, 0]])
    )

    w = dequantize_nvfp4(
        make_bytes(2, 8), torch.zeros(2, 1).to(FP8[0]), torch.tensor(1.0), swizzled=False, high_first=True
    )

    assert_bit_equal(w.abs(), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, scale = full_range(4, 9), randn(4, 1, dtype=dtype)

    assert_bit_equal(dequantize_int8(q, scale), dequantize_int8(q, scale.float()))
    assert_bit_equal(dequantize_int8(q, scale, dtype=dtype), dequantize_int8(q, scale.float()).to(dtype))
    assert dequantize_mxfp8(q.to(FP8[0]), make_bytes(4, 1), swizzled=False, dtype=dtype).dtype == dtype
    assert (
        dequantize_nvfp4(
            make_bytes(1, 8), make_codes(1), scale[0], swizzled=False, high_first=True, dtype=dtype
        ).dtype
        == dtype
    )


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((4, 6), (6,), None),  # one for each column
        ((4, 6), (1, 6), None),
        ((4, 6), (2, 2), None),  # blocks of 2 x 3
        ((4, 6), (2, 3, 1), None),
        ((4, 6), (4, 3, 2), None),
        ((5, 7), (2, 3), None),  # partial blocks, size unknown
        ((4, 6), (2, 3), 4),
        ((4, 6), (0,), None),
        ((4, 6), (4, 0), None),
        ((4, 6), (4, 7), None),
        ((4, 6), (8, 6), None),
    ],
    ids=str,
)
def test_scale_that_fits_no_layout_raises(shape, scales, block):
    blocks = r"whole blocks \(give `block`.*\)" if block is None else "blocks of 4"
    listed = ", ".join(map(str, scales))

    with pytest.raises(
        ValueError,
        match=rf"scale of shape \[{listed}\] fits no layout of a weight .* in {blocks}; "
        r"allowed are one number, ",
    ):
        dequantize_int8(full_range(*shape), torch.ones(scales), block)


def test_qdata_of_another_dtype_raises():
    with pytest.raises(
        ValueError, match=r"qdata is torch.uint8 \[2, 4\]; allowed is a matrix of torch.int8 that"
    ):
        dequantize_int8(make_bytes(2, 4), torch.tensor(1.0))
    with pytest.raises(
        ValueError,
        match=r"qdata is torch.int8 \[2, 4\]; allowed is a matrix of torch.float8_e4m3fn or "
        r"torch.float8_e5m2",
    ):
        dequantize_fp8(full_range(2, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"qdata is torch.int8 \[4\]; allowed is a matrix"):
        dequantize_int8(full_range(4), torch.tensor(1.0))
    with pytest.raises(
        ValueError,
        match=r"qdata is torch.int8 \[0, 4\]; allowed is a matrix of torch.int8 that is not empty",
    ):
        dequantize_int8(full_range(0, 4), torch.tensor(1.0))


def test_block_scales_that_do_not_fit_raise():
    fp8, fp4 = torch.ones(3, 64).to(FP8[0]), make_bytes(3, 32)

    with pytest.raises(
        ValueError, match=r"torch.uint8 \[3, 2\] do not fit 3 x 2 blocks; .*swizzled, in \[128, 4\]"
    ):
        dequantize_mxfp8(fp8, make_bytes(3, 2), swizzled=True)
    with pytest.raises(ValueError, match=r"torch.uint8 \[128, 4\] do not fit 3 x 2 blocks; .*in \[3, 2\]"):
        dequantize_mxfp8(fp8, make_bytes(128, 4), swizzled=False)
    with pytest.raises(
        ValueError,
        match=r"torch.float32 \[3, 2\] do not fit .*; allowed are torch.float8_e8m0fnu or its bytes as "
        r"torch.uint8",
    ):
        dequantize_mxfp8(fp8, randn(3, 2), swizzled=False)
    with pytest.raises(
        ValueError,
        match=r"torch.float8_e5m2 \[3, 4\] do not fit 3 x 4 blocks; allowed are torch.float8_e4m3fn or",
    ):
        dequantize_nvfp4(
            fp4, make_bytes(3, 4).view(FP8[1]), torch.tensor(1.0), swizzled=False, high_first=True
        )
    with pytest.raises(
        ValueError, match=r"the global scale is torch.float32 \[3\]; allowed is one floating-point number"
    ):
        dequantize_nvfp4(fp4, make_bytes(3, 4), torch.ones(3), swizzled=False, high_first=True)
