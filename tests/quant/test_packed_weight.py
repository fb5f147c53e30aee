"""Packed weights: their storage dtype, their size, and the numbers of all or some of their rows."""

from dataclasses import replace

import pytest
import torch
from support.helpers import full_range, randn

from int8run.kernels.dequantize import reference
from int8run.quant.formats import FORMATS
from int8run.quant.packed_weight import PackedWeight, is_fp8, round_up

# weights in groups (w4a8, w6a8) are tested beside their rounding
WRITABLE_FORMATS = [
    form for form in FORMATS.values() if not form.is_read_only and form.granularity != "group"
]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def make_random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded bytes that are finite numbers above 0 in e4m3 and in e8m0."""
    return torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# what files hold and we do not write: scales in rows, the other order of halves, other dtypes and shapes of
# scales
FOREIGN_WEIGHTS = {
    "nvfp4_modelopt": lambda: PackedWeight(
        make_random_bytes(5, 24),
        make_random_bytes(5, 3, seed=1).view(E4M3),
        (5, 48),
        torch.tensor([0.01]),
        is_swizzled=False,
        high_nibble_first=False,
    ),
    "nvfp4_modelopt of one block": lambda: PackedWeight(
        make_random_bytes(1, 8),
        make_random_bytes(1, 1, seed=1),
        (1, 16),
        torch.tensor(0.5),
        is_swizzled=False,
        high_nibble_first=False,
    ),
    "mxfp8 in rows": lambda: PackedWeight(
        make_random_bytes(3, 96).view(E4M3),
        make_random_bytes(3, 3, seed=1).view(E8M0),
        (3, 96),
        is_swizzled=False,
    ),
    "mxfp8 of e5m2": lambda: PackedWeight(
        make_random_bytes(32, 64).clamp(max=0x7B).view(E5M2),
        make_random_bytes(128, 4, seed=1).view(E8M0),
        (30, 50),
    ),
    "row [N]": lambda: PackedWeight(full_range(5, 7), randn(5, dtype=torch.bfloat16), (5, 7)),
    "row [N] of a square": lambda: PackedWeight(full_range(5, 5), randn(5), (5, 5)),
    "tensor [1, 1]": lambda: PackedWeight(full_range(5, 7), torch.tensor([[0.5]]), (5, 7)),
    "groups": lambda: PackedWeight(full_range(5, 8), randn(5, 2), (5, 8)),
    "grid of partial blocks": lambda: PackedWeight(full_range(5, 7), randn(2, 3), (5, 7), block_size=3),
    "grid of one row of blocks": lambda: PackedWeight(full_range(4, 8), randn(1, 2), (4, 8)),
    "grid of one column of blocks": lambda: PackedWeight(full_range(8, 4), randn(2, 1), (8, 4)),
    "scales of 8 bits": lambda: PackedWeight(full_range(5, 7), make_random_bytes(5, 1).view(E4M3), (5, 7)),
}
WEIGHTS = FOREIGN_WEIGHTS | {
    form.name: lambda form=form: form.quantize(randn(256, 384)) for form in WRITABLE_FORMATS
}
PADDED_WEIGHTS = {
    f"{name} padded": lambda name=name: FORMATS[name].quantize(randn(150, 90)) for name in ("mxfp8", "nvfp4")
}


@pytest.mark.parametrize("make", (WEIGHTS | PADDED_WEIGHTS).values(), ids=WEIGHTS | PADDED_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_select_rows_equals_rows_of_the_whole_weight(make, dtype: torch.dtype) -> None:
    weight = make()
    n, k = weight.shape
    whole = weight.dequantize(dtype)

    assert whole.shape == (n, k)
    assert whole.dtype == dtype

    for index in ([0], [n - 1, 0, 0, n // 2], list(range(n))):
        some = weight.unswizzle_scales().select_rows(torch.tensor(index))
        assert some.shape == (len(index), k)
        assert torch.equal(some.dequantize(dtype), whole[index])

    assert weight.unswizzle_scales().select_rows(torch.tensor([], dtype=torch.int64)).qdata.shape[0] == 0


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_unswizzled_scales_give_the_same_weight(name: str) -> None:
    weight = FORMATS[name].quantize(randn(256, 384))
    plain = weight.unswizzle_scales()

    assert not plain.is_swizzled
    assert plain.scale.shape == (256, 384 // FORMATS[name].block_size)
    assert plain.scale.dtype == weight.scale.dtype
    assert torch.equal(plain.dequantize(), weight.dequantize())
    assert plain.unswizzle_scales() is plain
    with pytest.raises(AssertionError, match="unswizzle_scales"):
        weight.select_rows(torch.tensor([0]))


@pytest.mark.parametrize("name", ["int8_rowwise", "float8_e4m3fn", "float8_e4m3fn_cast"])
def test_unswizzle_scales_returns_other_formats_unchanged(name: str) -> None:
    weight = FORMATS[name].quantize(randn(4, 32))
    assert weight.unswizzle_scales() is weight


@pytest.mark.parametrize(
    ("make", "kind"),
    [(FORMATS[f.name], f.storage_dtype) for f in WRITABLE_FORMATS],
    ids=lambda x: getattr(x, "name", x),
)
def test_storage_dtype_of_each_format(make, kind: str) -> None:
    assert make.quantize(randn(128, 128)).storage_dtype == kind


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0], ids=str)
def test_scale_dtype_distinguishes_mxfp8_from_fp8(dtype: torch.dtype) -> None:
    codes = make_random_bytes(1, 32).view(E4M3)
    assert (
        PackedWeight(codes, make_random_bytes(1, 1).view(dtype), (1, 32), is_swizzled=False).storage_dtype
        == "mxfp8"
    )
    assert (
        PackedWeight(codes, torch.ones(1, 1), (1, 32)).storage_dtype
        == "fp8"
        == PackedWeight(codes, None, (1, 32)).storage_dtype
    )


@pytest.mark.parametrize(("high_first", "numbers"), [(True, [1, -6]), (False, [-6, 1])])
def test_high_nibble_first_orders_the_columns(high_first: bool, numbers: list[float]) -> None:
    codes = torch.full((1, 8), 0x2F, dtype=torch.uint8)
    weight = PackedWeight(
        codes,
        torch.ones(1, 1).to(E4M3),
        (1, 2),
        torch.tensor(1.0),
        is_swizzled=False,
        high_nibble_first=high_first,
    )

    assert weight.dequantize().tolist() == [numbers]


def test_nbytes_counts_qdata_and_scales() -> None:
    weight = FORMATS["nvfp4"].quantize(randn(256, 512))

    assert weight.nbytes == 256 * 256 + 256 * 32 + 4
    assert FORMATS["float8_e5m2_cast"].quantize(randn(3, 5)).nbytes == 15
    assert FORMATS["int8_rowwise"].quantize(randn(3, 5)).nbytes == 15 + 12


def test_dequantize_cuts_padding() -> None:
    weight = FORMATS["nvfp4"].quantize(randn(30, 50))
    padded = weight.dequantize_padded(torch.float32, reference)

    assert padded.shape == (32, 64)
    assert torch.equal(padded[:30, :50], weight.dequantize())
    assert not padded[30:].any()

    other = replace(weight, shape=(17, 49))

    assert torch.equal(other.dequantize(), padded[:17, :49])


def test_round_up_and_is_fp8() -> None:
    assert [round_up(size, 16) for size in (1, 16, 17)] == [16, 16, 32]
    assert [is_fp8(torch.empty(1, dtype=dtype)) for dtype in (E4M3, E5M2, torch.uint8, torch.int8)] == [
        True,
        True,
        False,
        False,
    ]
