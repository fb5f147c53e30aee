"""Weights that stay in their codes: what kind they are, what they weigh, and the numbers of all or some of their rows."""

from dataclasses import replace

import pytest
import torch
from support.helpers import full_range, randn

from int8run.kernels.dequantize import reference
from int8run.quant.formats import FORMATS
from int8run.quant.packed_weight import PackedWeight, is_fp8, round_up

WRITTEN = [form for form in FORMATS.values() if not form.is_read_only]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def as_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded bytes that are finite numbers above 0 in e4m3 and in e8m0."""
    return torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# what files hold and we do not write: scales in rows, the other order of halves, other dtypes and shapes of scales
FOREIGN = {
    "nvfp4_modelopt": lambda: PackedWeight(
        as_bytes(5, 24),
        as_bytes(5, 3, seed=1).view(E4M3),
        (5, 48),
        torch.tensor([0.01]),
        is_swizzled=False,
        high_nibble_first=False,
    ),
    "nvfp4_modelopt of one block": lambda: PackedWeight(
        as_bytes(1, 8),
        as_bytes(1, 1, seed=1),
        (1, 16),
        torch.tensor(0.5),
        is_swizzled=False,
        high_nibble_first=False,
    ),
    "mxfp8 in rows": lambda: PackedWeight(
        as_bytes(3, 96).view(E4M3), as_bytes(3, 3, seed=1).view(E8M0), (3, 96), is_swizzled=False
    ),
    "mxfp8 of e5m2": lambda: PackedWeight(
        as_bytes(32, 64).clamp(max=0x7B).view(E5M2), as_bytes(128, 4, seed=1).view(E8M0), (30, 50)
    ),
    "row [N]": lambda: PackedWeight(full_range(5, 7), randn(5, dtype=torch.bfloat16), (5, 7)),
    "row [N] of a square": lambda: PackedWeight(full_range(5, 5), randn(5), (5, 5)),
    "tensor [1, 1]": lambda: PackedWeight(full_range(5, 7), torch.tensor([[0.5]]), (5, 7)),
    "groups": lambda: PackedWeight(full_range(5, 8), randn(5, 2), (5, 8)),
    "grid of partial blocks": lambda: PackedWeight(full_range(5, 7), randn(2, 3), (5, 7), block_size=3),
    "grid of one row of blocks": lambda: PackedWeight(full_range(4, 8), randn(1, 2), (4, 8)),
    "grid of one column of blocks": lambda: PackedWeight(full_range(8, 4), randn(2, 1), (8, 4)),
    "scales of 8 bits": lambda: PackedWeight(full_range(5, 7), as_bytes(5, 1).view(E4M3), (5, 7)),
}
WEIGHTS = FOREIGN | {form.name: lambda form=form: form.quantize(randn(256, 384)) for form in WRITTEN}
PADDED = {
    f"{name} padded": lambda name=name: FORMATS[name].quantize(randn(150, 90)) for name in ("mxfp8", "nvfp4")
}


@pytest.mark.parametrize("make", (WEIGHTS | PADDED).values(), ids=WEIGHTS | PADDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_those_of_the_whole(make, dtype: torch.dtype) -> None:
    weight = make()
    n, k = weight.shape
    whole = weight.dequantize(dtype)
    assert whole.shape == (n, k) and whole.dtype == dtype
    for index in ([0], [n - 1, 0, 0, n // 2], list(range(n))):
        some = weight.unswizzle_scales().select_rows(torch.tensor(index))
        assert some.shape == (len(index), k) and torch.equal(some.dequantize(dtype), whole[index])
    assert weight.unswizzle_scales().select_rows(torch.tensor([], dtype=torch.int64)).qdata.shape[0] == 0


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_scales_in_rows_are_a_quarter_tile_no_more(name: str) -> None:
    weight = FORMATS[name].quantize(randn(256, 384))
    plain = weight.unswizzle_scales()
    assert (
        not plain.is_swizzled
        and plain.scale.shape == (256, 384 // FORMATS[name].block_size)
        and plain.scale.dtype == weight.scale.dtype
    )
    assert torch.equal(plain.dequantize(), weight.dequantize()) and plain.unswizzle_scales() is plain
    with pytest.raises(AssertionError, match="unswizzle_scales"):
        weight.select_rows(torch.tensor([0]))


@pytest.mark.parametrize("name", ["int8_rowwise", "float8_e4m3fn", "float8_e4m3fn_cast"])
def test_others_are_in_rows_already(name: str) -> None:
    weight = FORMATS[name].quantize(randn(4, 32))
    assert weight.unswizzle_scales() is weight


@pytest.mark.parametrize(
    ("make", "kind"),
    [(FORMATS[f.name], f.storage_dtype) for f in WRITTEN],
    ids=lambda x: getattr(x, "name", x),
)
def test_kinds(make, kind: str) -> None:
    assert make.quantize(randn(128, 128)).storage_dtype == kind


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0], ids=str)
def test_the_scale_tells_mxfp8_from_fp8(dtype: torch.dtype) -> None:
    codes = as_bytes(1, 32).view(E4M3)
    assert (
        PackedWeight(codes, as_bytes(1, 1).view(dtype), (1, 32), is_swizzled=False).storage_dtype == "mxfp8"
    )
    assert (
        PackedWeight(codes, torch.ones(1, 1), (1, 32)).storage_dtype
        == "fp8"
        == PackedWeight(codes, None, (1, 32)).storage_dtype
    )


@pytest.mark.parametrize(("high_first", "numbers"), [(True, [1, -6]), (False, [-6, 1])])
def test_which_half_of_a_byte_is_first(high_first: bool, numbers: list[float]) -> None:
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


def test_what_a_weight_weighs() -> None:
    weight = FORMATS["nvfp4"].quantize(randn(256, 512))
    assert weight.nbytes == 256 * 256 + 256 * 32 + 4
    assert FORMATS["float8_e5m2_cast"].quantize(randn(3, 5)).nbytes == 15
    assert FORMATS["int8_rowwise"].quantize(randn(3, 5)).nbytes == 15 + 12


def test_padding_is_cut_and_can_be_seen() -> None:
    weight = FORMATS["nvfp4"].quantize(randn(30, 50))
    padded = weight.dequantize_padded(torch.float32, reference)
    assert (
        padded.shape == (32, 64)
        and torch.equal(padded[:30, :50], weight.dequantize())
        and not padded[30:].any()
    )
    other = replace(weight, shape=(17, 49))
    assert torch.equal(other.dequantize(), padded[:17, :49])


def test_small_helpers() -> None:
    assert [round_up(size, 16) for size in (1, 16, 17)] == [16, 16, 32]
    assert [is_fp8(torch.empty(1, dtype=dtype)) for dtype in (E4M3, E5M2, torch.uint8, torch.int8)] == [
        True,
        True,
        False,
        False,
    ]
