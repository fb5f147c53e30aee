"""Formats of weights: every code and scale as the definitions say, worked out here once more in NumPy."""

import math

import numpy as np
import pytest
import torch
from support.helpers import randn
from torch import Tensor

from int8run.errors import ConfigError
from int8run.kernels.dequantize.reference import compute_swizzled_offsets
from int8run.quant import block_encoding
from int8run.quant.block_encoding import split_into_chunks, swizzle_scales
from int8run.quant.formats import FORMATS, WeightFormat, choose_format
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import quantize_weight

# weights in groups (w4a8, w6a8) are tested beside their rounding
WRITABLE_FORMATS = [
    form for form in FORMATS.values() if not form.is_read_only and form.granularity != "group"
]
F32 = np.float32
# the magnitudes that codes stand for, in the order of the codes
INT8 = np.arange(128.0)
E4M3 = np.array(
    [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:-1]
)  # 0x7F is NaN
E5M2 = np.array([m * 2.0**-16 if e == 0 else (4 + m) * 2.0 ** (e - 17) for e in range(31) for m in range(4)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MAGNITUDES = {torch.int8: INT8, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}

# -- the definitions -------------------------------------------------------------------------------


def encode_nearest(x, magnitudes):
    """Code and sign of the nearest numbers; of two as near, the one with the even code. x: float32."""
    size = np.minimum(np.abs(x.astype(np.float64)), magnitudes[-1])
    above = np.searchsorted(magnitudes, size)
    below = np.maximum(above - 1, 0)
    up, down = magnitudes[above] - size, size - magnitudes[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return code.astype(np.uint8), np.signbit(x).astype(np.uint8)


def find_block_absmax(w, height, width):
    """Of each block, and which block each number is in."""
    n, k = np.arange(w.shape[0])[:, None] // height, np.arange(w.shape[1])[None] // width
    largest = np.zeros((w.shape[0] // height, w.shape[1] // width), F32)
    np.maximum.at(largest, (n, k), np.abs(w))
    return largest, (n, k)


def swizzle_by_formula(scale):
    """Bytes in cuBLAS's layout, by the published offsets; the rest is 0."""
    rows, columns = math.ceil(scale.shape[0] / 128) * 128, math.ceil(scale.shape[1] / 4) * 4
    tiles = np.zeros(rows * columns, np.uint8)
    for r, c in np.ndindex(*scale.shape):
        tiles[(r // 128 * (columns // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[
            r, c
        ]
    return tiles.reshape(rows, columns)


def quantize_by_definition(form: WeightFormat, weight: Tensor):
    """Codes as bytes, scales (int8 and fp8: float32, else bytes), global scale."""
    w = weight.double().numpy().astype(F32)
    n, k = w.shape
    if form.storage_dtype in ("mxfp8", "nvfp4"):
        multiple = form.block_size
        w = np.pad(w, ((0, -n % multiple), (0, -k % multiple)))
        return (
            quantize_mxfp8_by_definition if form.storage_dtype == "mxfp8" else quantize_nvfp4_by_definition
        )(w)
    magnitudes = MAGNITUDES[form.qdata_dtype]
    largest = F32(magnitudes[-1])
    b = form.block_size
    height, width = {"tensor": (n, k), "row": (1, k), "grid": (b, b), "block3d": (1, b), "": (n, k)}[
        form.granularity
    ]
    size, where = find_block_absmax(w, height, width)
    if form.qdata_dtype == torch.int8:
        scale = np.maximum(size / largest, F32(1e-30))
    else:
        scale = np.where(size == 0, F32(1), np.maximum(size / largest, F32(1e-12)))
    code, sign = encode_nearest(w / scale[where] if form.granularity else w, magnitudes)
    codes = (
        np.where(sign, -code.astype(np.int8), code.astype(np.int8)).view(np.uint8)
        if form.qdata_dtype == torch.int8
        else code | sign << 7
    )
    shape = {
        "tensor": (),
        "row": (n, 1) if form.qdata_dtype == torch.int8 else (n,),
        "grid": (n // max(b, 1), k // max(b, 1)),
        "block3d": (n, k // max(b, 1), 1),
    }
    return codes, scale.reshape(shape[form.granularity]) if form.granularity else None, None


def quantize_mxfp8_by_definition(w):
    size, where = find_block_absmax(w, 1, 32)
    mantissa, exponent = np.frexp((size / F32(448)).astype(np.float64))
    needed = np.where(mantissa == 0.5, exponent - 1, exponent)  # the least power of 2 that is not smaller
    stored = np.where(size == 0, 0, np.clip(needed + 127, 0, 254))
    quotient = w / np.ldexp(F32(1), stored - 127)[where]
    code, sign = encode_nearest(np.where(size[where] == 0, F32(0), quotient.astype(F32)), E4M3)
    return code | sign << 7, swizzle_by_formula(stored.astype(np.uint8)), None


def quantize_nvfp4_by_definition(w):
    size, where = find_block_absmax(w, 1, 16)
    whole = max(size.max() / F32(2688), F32(1e-30))
    scale, _ = encode_nearest(size / F32(6) / whole, E4M3)
    total = (whole * E4M3[scale].astype(F32))[where]
    quotient = np.divide(w, total, out=np.zeros_like(w), where=total != 0)
    code, sign = encode_nearest(quotient, E2M1)
    code |= sign << 3
    return code[:, ::2] << 4 | code[:, 1::2], swizzle_by_formula(scale), whole


def assert_equals_definition(form: WeightFormat, weight: Tensor) -> PackedWeight:
    """Bit for bit."""
    made = form.quantize(weight)
    codes, scale, whole = quantize_by_definition(form, weight)
    assert made.shape == tuple(weight.shape)
    assert made.qdata.dtype == form.qdata_dtype
    assert made.storage_dtype == form.storage_dtype
    assert tuple(made.qdata.shape) == codes.shape == form.get_qdata_shape(*weight.shape)
    np.testing.assert_array_equal(made.qdata.view(torch.uint8).numpy(), codes)
    assert (made.scale is None) == (scale is None) == (form.get_scale_shape(*weight.shape) is None)
    if made.scale is not None:
        assert tuple(made.scale.shape) == scale.shape == form.get_scale_shape(*weight.shape)
        held = made.scale.view(torch.uint8) if form.storage_dtype in ("mxfp8", "nvfp4") else made.scale
        assert held.dtype == (torch.uint8 if form.storage_dtype in ("mxfp8", "nvfp4") else torch.float32)
        np.testing.assert_array_equal(held.numpy(), scale)
        if held.dtype == torch.float32:
            assert bool((made.scale.isfinite() & (made.scale > 0)).all())
        # what a piece was cut from is not kept in memory
        assert made.scale.untyped_storage().nbytes() == made.scale.nbytes
    assert made.block_size == (form.block_size if form.storage_dtype in ("int8", "fp8") else 0)
    assert (made.global_scale is None) == (whole is None)
    if made.global_scale is not None:
        assert made.global_scale.shape == ()
        assert made.global_scale.item() == whole > 0
    back = made.dequantize()
    assert back.shape == weight.shape
    assert back.isfinite().all()
    return made


# -- inputs ----------------------------------------------------------------------------------------


def make_awkward_weight() -> Tensor:
    """[128, 256]: every eighth row is of another kind, so that blocks are mixed; the last 64 are calm."""
    w = randn(128, 256)
    kinds = [
        torch.zeros(256),
        -torch.zeros(256),
        torch.full((256,), -0.3),
        1e-36 * randn(256, seed=1),
        1e-41 * randn(256, seed=2),
        1e30 * randn(256, seed=3),
        torch.linspace(-127, 127, 255).repeat(2)[:256] / 2,
        torch.arange(256) / 8 - 16,
    ]
    for i, row in enumerate(kinds):
        w[8 * i] = row
    w[33, 7] = 1000  # one huge value
    w[40, ::3] = -0.0
    w[64:, :] *= 0.01
    w[64:, 64:128] = 0  # a block of zeros
    return w


def make_ties() -> Tensor:
    """[128, 256] halves between codes: rows whose scale is a power of 2 in int8, fp8 and in blocks."""
    w = torch.zeros(128, 256)
    w[:, ::16] = 127
    w[:64, 1::2] = torch.randint(-127, 127, (64, 128), generator=torch.Generator().manual_seed(0)) + 0.5
    w[64:96, ::16] = 448
    halves = torch.tensor((E4M3[1:] + E4M3[:-1]) / 2, dtype=torch.float32)  # 126
    w[64:96, 1:16], w[64:96, 17:32], w[64:96, 33:48] = halves[:15], -halves[15:30], halves[30:45]
    w[64:96, 129:144], w[64:96, 161:176], w[64:96, 193:208] = (
        halves[90:105],
        -halves[105:120],
        halves[106:121],
    )
    w[96:, ::16] = 6
    w[96:, 1:8], w[96:, 17:24] = (
        torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]),
        -torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]),
    )
    w[96, 0] = 2688  # the global scale of nvfp4 is 1 then
    return w


def make_small_blocks() -> Tensor:
    """[32, 64]: blocks with the smallest scales of nvfp4, which are rounded by up to a half of themselves."""
    w = randn(32, 64, seed=13).clamp(-1, 1) * torch.arange(32)[:, None] / 1000
    w[:, ::16] = torch.arange(32)[:, None] / 1000
    w[0, 0] = 2688  # the global scale is 1 then
    return w


INPUTS = {
    "normal": lambda: randn(128, 256),
    "awkward": make_awkward_weight,
    "ties": make_ties,
    "half of the ties": lambda: make_ties()[:64],
    "fp4's ties": lambda: make_ties()[96:],
    "small blocks": make_small_blocks,
    "bfloat16": lambda: randn(128, 256, seed=4).bfloat16(),
    "half": lambda: randn(128, 256, seed=5).half(),
    "float64": lambda: randn(128, 256, seed=6).double() / 3,
    "zeros": lambda: torch.zeros(128, 128),
    "one column": lambda: randn(35, 1),
    "one row": lambda: randn(1, 37, seed=1),
    "one number": lambda: torch.tensor([[-3.0]]),
    "many tiles": lambda: randn(257, 200, seed=8),
    "multiples of 64": lambda: randn(192, 320, seed=7),
    "one block": lambda: randn(128, 128, seed=9),
    "tiny": lambda: 1e-42 * randn(128, 128, seed=10),
    "huge": lambda: 3e37 * randn(128, 128, seed=11).clamp(-9, 9),
    "rows in between": lambda: randn(128, 512, seed=12)[:, ::2].T[:128],
}


@pytest.mark.parametrize("weight", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("form", WRITABLE_FORMATS, ids=lambda form: form.name)
def test_qdata_and_scales_equal_the_definition(form: WeightFormat, weight) -> None:
    w = weight()
    if form.unsupported_reason(*w.shape):
        with pytest.raises(ValueError, match=r"cannot be quantized: .* (them )?divides? "):
            form.quantize(w)
        form = choose_format(form.name, *w.shape)

    assert_equals_definition(form, w)


@pytest.mark.parametrize("form", WRITABLE_FORMATS, ids=lambda form: form.name)
def test_result_does_not_depend_on_chunks(form: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    w = randn(384, 256, seed=3)
    whole = form.quantize(w)

    for numbers in (1, 100_000):
        monkeypatch.setattr(block_encoding, "CHUNK_ELEMENTS", numbers)
        made = form.quantize(w)
        assert torch.equal(made.qdata.view(torch.uint8), whole.qdata.view(torch.uint8))
        assert made.scale is None or torch.equal(made.scale.float(), whole.scale.float())


def test_chunks_are_small_and_hold_whole_blocks() -> None:
    sizes = [len(piece) for piece in split_into_chunks(torch.empty(1000, 10240, device="meta"), 128)]
    assert sizes == [128] * 7 + [104]
    assert max(len(piece) for piece in split_into_chunks(torch.empty(10**4, 1024, device="meta"), 1)) == 1024


@pytest.mark.parametrize("form", WRITABLE_FORMATS, ids=lambda form: form.name)
def test_quantize_does_not_change_its_input(form: WeightFormat) -> None:
    w = torch.nn.Parameter(randn(128, 128))
    before = w.detach().clone()
    made = form.quantize(w)

    assert torch.equal(w, before)
    assert not made.qdata.requires_grad
    assert made.scale is None or not made.scale.requires_grad


@pytest.mark.parametrize("form", WRITABLE_FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_raise(form: WeightFormat, wrong: float) -> None:
    w = randn(128, 128)
    w[77, 3] = wrong

    with pytest.raises(ValueError, match=r"\[128, 128\] with NaN or infinity cannot be quantized"):
        form.quantize(w)


def test_empty_weight_raises() -> None:
    with pytest.raises(ValueError, match=r"a weight \[0, 128\] cannot be quantized: it is empty"):
        FORMATS["mxfp8"].quantize(torch.empty(0, 128))


# -- published vectors -----------------------------------------------------------------------------


def test_int8_rowwise_published_vector() -> None:
    made = FORMATS["int8_rowwise"].quantize(torch.tensor([[1, -2, 0.5, 0]]))
    assert made.qdata.tolist() == [[64, -127, 32, 0]]
    assert made.scale.tolist() == [[torch.tensor(2 / 127).item()]]


def test_nvfp4_published_byte() -> None:
    """1 and -6 are 0x2F: with a block maximum of 6, block scale 448 and global scale 1 / 448."""
    w = torch.zeros(16, 16)
    w[0, :2] = torch.tensor([1.0, -6.0])
    made = FORMATS["nvfp4"].quantize(w)

    assert made.qdata[0, 0].item() == 0x2F
    assert not made.qdata[1:].any()
    assert made.scale[0, 0].item() == 448
    assert made.global_scale.item() == torch.tensor(6 / 2688).item()
    assert made.high_nibble_first
    assert made.is_swizzled


def test_mxfp8_published_exponent() -> None:
    """448 * 2**-7 needs the exponent 120."""
    w = torch.full((32, 32), 448 / 128)
    made = FORMATS["mxfp8"].quantize(w)

    assert made.scale[0, 0].item() == 120
    assert made.scale.dtype == torch.uint8
    assert made.qdata[0, 0].item() == 448
    assert torch.equal(made.dequantize(), w)


def test_mxfp8_exponent_is_rounded_down_just_above_a_power_of_2() -> None:
    """The logarithm is rounded; what does not fit is the largest code, wrong by less than a millionth."""
    w = torch.full((32, 32), 448 / 128)
    w[0, 0] = w[0, 0].nextafter(torch.tensor(9.0))
    made = FORMATS["mxfp8"].quantize(w)

    assert made.scale[0, 0].item() == 120
    assert made.qdata[0, 0].item() == 448

    w[0, 0] *= 1 + 2.0**-8

    assert FORMATS["mxfp8"].quantize(w).scale[0, 0].item() == 121


SWIZZLED_OFFSETS = {
    (0, 0): 0,
    (0, 3): 3,
    (1, 0): 16,
    (32, 0): 4,
    (64, 0): 8,
    (96, 0): 12,
    (0, 4): 512,
    (128, 0): 6144,
}


@pytest.mark.parametrize(("place", "offset"), SWIZZLED_OFFSETS.items(), ids=str)
def test_swizzled_offset_of_one_scale(place: tuple[int, int], offset: int) -> None:
    scale = torch.zeros(256, 48, dtype=torch.uint8)
    scale[place] = 1

    assert swizzle_scales(scale).flatten().nonzero().item() == offset


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (128, 4), (129, 5), (300, 12)], ids=str)
def test_swizzled_scales_are_read_back_by_their_offsets(shape: tuple[int, int]) -> None:
    scale = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tiles = swizzle_scales(scale)

    assert torch.equal(tiles.flatten()[compute_swizzled_offsets(*shape)], scale)
    assert int((tiles != 0).sum()) == scale.numel()


def test_int8_rowwise_equals_quantize_weight() -> None:
    w = make_awkward_weight()
    made, other = FORMATS["int8_rowwise"].quantize(w), quantize_weight(w)

    assert torch.equal(made.qdata, other.qdata)
    assert torch.equal(made.scale, other.scale)


def test_cast_clamps_to_the_largest_number() -> None:
    w = torch.tensor([[1e9, -1e9, 464, 500, -460, 3.3]])
    assert FORMATS["float8_e4m3fn_cast"].quantize(w).qdata.float().tolist() == [
        [448, -448, 448, 448, -448, 3.25]
    ]
    assert FORMATS["float8_e5m2_cast"].quantize(w).qdata.float().tolist() == [
        [57344, -57344, 448, 512, -448, 3.5]
    ]


# -- comfy-kitchen ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kitchen():
    return pytest.importorskip("comfy_kitchen")


# comfy-kitchen divides 0 by 0 where a block is below the smallest exponent, and of a weight of zeros
KITCHEN_INPUTS = {name: make for name, make in INPUTS.items() if name not in ("tiny", "zeros")}


@pytest.mark.parametrize("weight", KITCHEN_INPUTS.values(), ids=KITCHEN_INPUTS)
def test_block_formats_equal_comfy_kitchen(kitchen, weight) -> None:
    w = weight().float()
    w[w.abs() < 1e-35] = 0
    made = FORMATS["mxfp8"].quantize(w)
    codes, scale = kitchen.quantize_mxfp8(w, pad_32x=True)

    assert torch.equal(made.qdata.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(made.scale, scale.view(torch.uint8))

    made = FORMATS["nvfp4"].quantize(w)
    codes, params = kitchen.tensor.TensorCoreNVFP4Layout.quantize(w)

    assert torch.equal(made.qdata, codes)
    assert torch.equal(made.global_scale, params.scale)
    assert torch.equal(made.scale.view(torch.uint8), params.block_scale.view(torch.uint8))


@pytest.mark.parametrize("weight", INPUTS.values(), ids=INPUTS)
def test_int8_equals_comfy_kitchen(kitchen, weight) -> None:
    w = weight().float()
    for name, function in {
        "int8_tensorwise": "quantize_int8_tensorwise",
        "int8_rowwise": "quantize_int8_rowwise",
    }.items():
        made = FORMATS[name].quantize(w)
        codes, scale = getattr(kitchen, function)(w)
        assert torch.equal(made.qdata, codes)
        assert torch.equal(made.scale, scale.reshape(made.scale.shape))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_equals_comfy_kitchen_up_to_its_rounded_reciprocal(kitchen, name: str) -> None:
    w = randn(512, 512)
    made = FORMATS[name].quantize(w)
    codes = kitchen.quantize_per_tensor_fp8(w, made.scale, made.qdata.dtype)
    other = codes.view(torch.uint8) != made.qdata.view(torch.uint8)

    assert other.float().mean() < 1e-4
    assert ((codes.float() - made.qdata.float()).abs() <= 0.26 * made.qdata.float().abs()).all()


# -- which format for which shape ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "taken", "reason"),
    [
        ("int8_blockwise", (256, 384), "int8_blockwise", ""),
        (
            "int8_blockwise",
            (256, 192),
            "int8_rowwise",
            "int8_blockwise has blocks of 128 x 128; they do not divide 256 x 192",
        ),
        (
            "int8_blockwise",
            (192, 256),
            "int8_rowwise",
            "int8_blockwise has blocks of 128 x 128; they do not divide 192 x 256",
        ),
        ("int8_block3d", (3, 256), "int8_block3d", ""),
        (
            "int8_block3d",
            (256, 192),
            "int8_rowwise",
            "int8_block3d has blocks of 128 columns; they do not divide 192",
        ),
        ("float8_e4m3fn_blockwise", (64, 192), "float8_e4m3fn_blockwise", ""),
        (
            "float8_e4m3fn_blockwise",
            (64, 32),
            "float8_e4m3fn_rowwise",
            "has blocks of 64 x 64; they do not divide 64 x 32",
        ),
        ("float8_e4m3fn_block3d", (5, 192), "float8_e4m3fn_block3d", ""),
        (
            "float8_e4m3fn_block3d",
            (64, 32),
            "float8_e4m3fn_rowwise",
            "has blocks of 64 columns; they do not divide 32",
        ),
        ("int8_convrot", (3, 48), "int8_convrot", ""),
        (
            "int8_convrot",
            (16, 40),
            "int8_rowwise",
            "int8_convrot rotates groups of 256, 64, 16 columns; none of them divides 40",
        ),
        ("mxfp8", (3, 5), "mxfp8", ""),
        ("nvfp4", (3, 5), "nvfp4", ""),
        ("int8_tensorwise", (3, 5), "int8_tensorwise", ""),
    ],
    ids=str,
)
def test_choose_format_falls_back_where_a_shape_does_not_fit(
    name: str, shape: tuple[int, int], taken: str, reason: str
) -> None:
    assert choose_format(name, *shape) is FORMATS[taken]

    said = FORMATS[name].unsupported_reason(*shape)

    assert (said is None) == (not reason)
    assert reason in (said or "")


@pytest.mark.parametrize(
    ("columns", "group"), [(4096, 256), (2560, 256), (320, 64), (48, 16), (40, 0), (4, 0)]
)
def test_rotation_group_size_is_the_largest_that_divides(columns: int, group: int) -> None:
    assert FORMATS["int8_convrot"].get_rotation_group_size(columns) == group
    assert FORMATS["int8_rowwise"].get_rotation_group_size(columns) == 0


def test_unknown_format_raises_with_the_choices() -> None:
    with pytest.raises(
        ConfigError,
        match=r"format is 'int8_row'; did you mean 'int8_rowwise'\? choose from float8_e4m3fn, "
        r".*w6a8$",
    ):
        choose_format("int8_row", 4, 4)


@pytest.mark.parametrize(("name", "written"), [("nvfp4_modelopt", "nvfp4"), ("mxfp8_rows", "mxfp8")])
def test_read_only_formats_cannot_quantize(name: str, written: str) -> None:
    assert FORMATS[name].unsupported_reason(16, 16) == f"{name} is read and never written"
    assert choose_format(name, 16, 16) is FORMATS[written]
    with pytest.raises(ValueError, match=f"{name} is read and never written"):
        FORMATS[name].quantize(randn(16, 16))


def test_every_fallback_holds_every_shape() -> None:
    assert all(name == form.name for name, form in FORMATS.items())
    for form in WRITABLE_FORMATS:
        other = None if form.fallback is None else FORMATS[form.fallback]
        # the substitute takes every shape
        assert other is None or (
            other.qdata_dtype == form.qdata_dtype and other.unsupported_reason(1, 1) is None
        )
        assert other is not None or form.unsupported_reason(1, 1) is None
