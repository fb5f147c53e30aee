"""Cases for test_triton_grouped_linear.py, which runs this file in a process of its own."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import full_range, randn
from support.triton_process import case_device

from int8run.kernels.grouped_weight.kernel import decode_weight, grouped_linear
from int8run.kernels.grouped_weight.layout import PackedCodes, pack_pieces, pack_scales
from int8run.kernels.grouped_weight.reference import decode_grouped_weight, pack_codes
from int8run.kernels.int8_linear.kernel import int8_linear
from int8run.kernels.int8_linear.reference import int8_linear as reference
from int8run.kernels.int8_linear.tile import Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FEW, SMALL = Tile(16, 32, 256, 1, 4, 2), Tile(32, 32, 128, 2, 4, 2)
ROUNDING = {FULL: 1e-6, HALF: 1e-3, BRAIN: 4e-3}
CODEBOOK = torch.linspace(-0.98, 0.97, 16) ** 3  # of no even steps


def make_weight(n, k, bits, group, *, is_float=False, codebook=None):
    """A weight as the kernel takes it, and the int8 numbers of the definition."""
    generator = torch.Generator().manual_seed(bits * k + group)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    largest = 2 ** (bits - 1) if codebook is None else 1
    group_scale = torch.rand(n, k // group, generator=generator) * 140 / largest
    codes[0, 0], group_scale[0, 0] = 0, 200 / largest  # a product beyond 127
    if not is_float:
        group_scale = group_scale.to(torch.float8_e4m3fn)
    decoded = decode_grouped_weight(pack_codes(codes, bits), group_scale, bits=bits, codebook=codebook)
    assert (decoded.abs() == 127).any()
    packed = PackedCodes(
        codes=pack_pieces(codes, bits).to(DEVICE),
        group_scale=pack_scales(group_scale, bits, codebook).to(DEVICE),
        codebook=None if codebook is None else codebook.to(DEVICE),
        bits=bits,
        group=group,
    )
    return packed, decoded.to(DEVICE)


def make_input(m, k):
    return full_range(m, k).to(DEVICE), ((randn(m, 1).abs() + 0.1) / k).to(DEVICE)


def read_weight(packed, k, tile):
    """The integers that the kernel decodes: its product with rows of which each has a single 1."""
    n = packed.codes.shape[0]
    ones = torch.ones(max(n, k), device=DEVICE)
    units = torch.eye(k, dtype=torch.int8, device=DEVICE)
    columns = grouped_linear(
        units, ones[:k, None], packed, ones[:n].contiguous(), None, None, None, FULL, tile
    )
    return columns.T.to(torch.int8)


@pytest.mark.parametrize("is_float", [False, True], ids=["e4m3", "float32"])
@pytest.mark.parametrize("group", [4, 8, 16, 32, 48, 64, 192])
def test_decoded_integers_of_four_bits_are_those_of_the_definition(group, is_float):
    for codebook in (None, CODEBOOK):
        packed, decoded = make_weight(33, 192, 4, group, is_float=is_float, codebook=codebook)
        assert torch.equal(read_weight(packed, 192, SMALL), decoded)
        assert torch.equal(decode_weight(packed, 192), decoded)


@pytest.mark.parametrize("is_float", [False, True], ids=["e4m3", "float32"])
@pytest.mark.parametrize("group", [16, 32, 48, 96])
def test_decoded_integers_of_six_bits_are_those_of_the_definition(group, is_float):
    packed, decoded = make_weight(33, 288, 6, group, is_float=is_float)

    assert torch.equal(read_weight(packed, 288, SMALL), decoded)
    assert torch.equal(decode_weight(packed, 288), decoded)


def test_products_half_way_between_integers_are_rounded_to_even():
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 4)
    for group_scale in (torch.full((1, 4), 0.5), torch.full((1, 4), 2.5)):
        for scales in (group_scale, group_scale.to(torch.float8_e4m3fn)):
            decoded = decode_grouped_weight(pack_codes(codes, 4), scales, bits=4)
            packed = PackedCodes(
                pack_pieces(codes, 4).to(DEVICE), pack_scales(scales, 4, None).to(DEVICE), None, 4, 16
            )
            assert torch.equal(read_weight(packed, 64, SMALL), decoded.to(DEVICE))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("tile", [FEW, SMALL], ids=["few", "small"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (17, 63, 160), (16, 32, 256), (33, 96, 512)], ids=str)
def test_scales_and_bias_equal_the_reference_on_awkward_shapes(shape, tile, dtype, bits):
    m, n, k = shape
    packed, decoded = make_weight(n, k, bits, 16)
    (q, x_scale), w_scale = make_input(m, k), (randn(n, seed=1).abs() / 100).to(DEVICE)
    bias = randn(n, seed=2, dtype=dtype).to(DEVICE)
    y = grouped_linear(q, x_scale, packed, w_scale, bias, None, None, dtype, tile)

    assert y.dtype == dtype
    assert_close("y", y, reference(q, x_scale, decoded, w_scale, bias), ROUNDING[dtype])


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("rank", [0, 20])
def test_results_are_those_of_the_int8_product_to_the_last_bit(rank, bits):
    packed, decoded = make_weight(96, 256, bits, 16)
    (q, x_scale), w_scale = make_input(40, 256), (randn(96, seed=1).abs() / 100).to(DEVICE)
    bias, h, up, strengths = randn(96, seed=2).to(DEVICE), None, None, None
    if rank:
        h, up = randn(40, rank, seed=3).to(DEVICE), randn(96, rank, seed=4, dtype=BRAIN).to(DEVICE)
        strengths = randn(rank, seed=9).to(DEVICE)
    y = grouped_linear(q, x_scale, packed, w_scale, bias, h, up, FULL, SMALL, strengths)
    expected = int8_linear(q, x_scale, decoded, w_scale, 0, bias, h, up, FULL, SMALL, strengths)

    if rank and DEVICE.type == "cuda":
        # sums of the branch may be added in another order
        assert_close("y", y, expected, ROUNDING[FULL])
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 6, not 5"),
        ({"group": 24}, r"group must divide K, 64, and be a divisor or a multiple of 16, not 24"),
        ({"group": 0}, "group must divide K"),
        ({"codes": torch.zeros(6, 30, dtype=torch.uint8)}, r"codes must be contiguous uint8 \[N, 32\]"),
        ({"codes": torch.zeros(6, 32)}, "codes must be contiguous uint8"),
        (
            {"group_scale": torch.zeros(6, 4)},
            r"group_scale must be contiguous float32 \[4, 6\] or uint8 \[4120\]",
        ),
        ({"codebook": torch.zeros(15)}, r"codebook must be contiguous float32 \[16\]"),
        ({"tile": Tile(16, 32, 32, 1, 4, 2)}, "block_k of a tile for 4 bits is a multiple of 64, not 32"),
        ({"q": torch.zeros(4, 64)}, "q must be contiguous torch.int8"),
        ({"w_scale": torch.zeros(6, 1)}, r"w_scale must be \[6\]"),
        ({"h": torch.zeros(4, 2)}, "h and up come together"),
    ],
)
def test_arguments_that_do_not_fit_raise(changed, message):
    weight = {
        "codes": torch.zeros(6, 32, dtype=torch.uint8),
        "group_scale": torch.zeros(4, 6),
        "codebook": torch.zeros(16),
        "bits": 4,
        "group": 16,
    }
    arguments = {
        "q": torch.zeros(4, 64, dtype=torch.int8),
        "x_scale": torch.zeros(4, 1),
        "w_scale": torch.zeros(6),
        "bias": None,
        "h": None,
        "up": None,
        "out_dtype": BRAIN,
        "tile": FEW,
    }
    for name, value in changed.items():
        (weight if name in weight else arguments)[name] = value
    with pytest.raises(ValueError, match=message):
        grouped_linear(weight=PackedCodes(**weight), **arguments)


def test_operator_passes_opcheck_and_compiles():
    packed, _ = make_weight(6, 64, 4, 16)
    q, x_scale = make_input(5, 64)
    w_scale = torch.ones(6, device=DEVICE)
    op = torch.ops.int8run.triton_grouped_linear.default
    arguments = (q, x_scale, *packed, w_scale, None, None, None, None, HALF, FEW.as_list())
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    decode = torch.ops.int8run.triton_decode_weight.default
    torch.library.opcheck(decode, (*packed, 64), test_utils=("test_schema", "test_faketensor"))

    def layer(q, x_scale):
        return grouped_linear(q, x_scale, packed, w_scale, None, None, None, FULL, FEW)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)

    for rows in (5, 9):
        q, x_scale = make_input(rows, 64)
        assert torch.equal(compiled(q, x_scale), layer(q, x_scale))
