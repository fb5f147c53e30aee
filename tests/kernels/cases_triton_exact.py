"""Cases for test_triton_exact.py: exact results, on a GPU at full size, interpreted at a small one.

On a GPU `pytest -m gpu tests/kernels/test_triton_exact.py` runs them all, and
`pytest tests/kernels/cases_triton_exact.py -k rank64` some.
"""

import pytest
import torch
from support.exact_kernels import (
    ROWS,
    LinearCase,
    RowwiseCase,
    list_default_tiles,
    list_grouped_tiles,
    list_hopper_tiles,
    list_linear_cases,
    list_rowwise_cases,
    make_integers,
    make_linear_inputs,
    make_powers_of_two,
    make_rowwise_inputs,
    shrink_linear_cases,
    shrink_rowwise_cases,
)
from support.triton_process import case_device

from int8run.backends.grouped_tuning import draw_grouped_weight
from int8run.kernels.grouped_weight.kernel import decode_weight, grouped_linear
from int8run.kernels.grouped_weight.layout import PackedCodes, pack_pieces, pack_scales
from int8run.kernels.grouped_weight.reference import unpack_codes
from int8run.kernels.grouped_weight.tile import fit_tile
from int8run.kernels.int8_linear.kernel import int8_linear
from int8run.kernels.int8_linear.tile import Tile, count_shared_bytes, find_architecture
from int8run.kernels.quantize_rowwise.kernel import quantize_rowwise
from int8run.utils.hardware import get_gpu_architecture

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
ON_GPU = DEVICE.type == "cuda"

if ON_GPU:
    GPU = find_architecture(get_gpu_architecture(DEVICE))
    TILES = list_default_tiles() + (list_hopper_tiles() if GPU.has_hopper_kernel else [])
    LINEAR_CASES = [case for tile in TILES for case in list_linear_cases(tile)]
    ROWWISE_CASES = list_rowwise_cases()
    ROWS_HERE = ROWS
    GROUPED_TILES, GROUPED_SHAPES = list_grouped_tiles(), ((512, 15360), (333, 1040))
else:
    LINEAR_CASES = list(shrink_linear_cases(Tile(32, 32, 64, group_m=2, warps=4, stages=2)))
    ROWWISE_CASES = list(shrink_rowwise_cases())
    ROWS_HERE = (1, 17, 63)
    GROUPED_TILES, GROUPED_SHAPES = [Tile(32, 32, 128, group_m=2, warps=4, stages=2)], ((64, 256), (45, 144))


def skip_unless_tile_fits(tile: Tile) -> None:
    """Skip a tile of another architecture that asks for more shared memory than this GPU has."""
    if not ON_GPU:
        return
    available = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    needed = count_shared_bytes(tile, GPU)
    if needed > available:
        pytest.skip(f"the tile needs {needed} bytes of shared memory, {available} there are")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_products_are_exact(case: LinearCase) -> None:
    skip_unless_tile_fits(case.tile)
    inputs = make_linear_inputs(case, max(ROWS_HERE), DEVICE)
    for rows in ROWS_HERE:
        y = int8_linear(
            inputs.q[:rows],
            inputs.x_scale[:rows],
            inputs.qdata,
            inputs.w_scale,
            group=0,
            bias=inputs.bias,
            h=None if inputs.h is None else inputs.h[:rows],
            up=inputs.up,
            out_dtype=case.dtype,
            tile=case.tile,
            strengths=inputs.strengths,
        )

        assert torch.equal(y, inputs.expected[:rows]), f"{rows} rows"


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=str)
@pytest.mark.parametrize("tile", GROUPED_TILES, ids=str)
def test_products_with_few_bits_are_those_of_the_weight_that_they_decode_to(tile, shape, bits) -> None:
    tile = fit_tile(tile, bits)
    skip_unless_tile_fits(tile)
    n, k = shape
    weight = draw_grouped_weight(n, k, bits, DEVICE)
    packed = PackedCodes(
        codes=pack_pieces(unpack_codes(weight.codes, bits), bits),
        group_scale=pack_scales(weight.group_scale, bits, weight.codebook),
        codebook=weight.codebook,
        bits=bits,
        group=weight.group_size,
    )
    q = make_integers(max(ROWS_HERE), k, limit=127, seed=0).to(DEVICE, torch.int8)
    x_scale = make_powers_of_two(max(ROWS_HERE), 1, exponents=(-10, -8), seed=2).to(DEVICE)
    w_scale = make_powers_of_two(n, exponents=(-10, -8), seed=3).to(DEVICE)
    decoded = weight.decode().qdata
    assert torch.equal(decode_weight(packed, k), decoded)

    for rows in ROWS_HERE:
        y = grouped_linear(q[:rows], x_scale[:rows], packed, w_scale, None, None, None, torch.float32, tile)
        sums = q[:rows].double() @ decoded.double().T
        assert torch.equal(y, sums.float() * w_scale * x_scale[:rows]), f"{rows} rows"


@pytest.mark.parametrize("case", ROWWISE_CASES, ids=str)
def test_quantizations_are_exact(case: RowwiseCase) -> None:
    inputs = make_rowwise_inputs(case, max(ROWS_HERE), DEVICE)
    for rows in ROWS_HERE:
        q, scale, h = quantize_rowwise(
            inputs.x[:rows],
            inputs.factor,
            case.rotation,
            sylvester=case.sylvester,
            gelu_from=case.first_gelu_column,
            down=inputs.down,
        )

        assert torch.equal(q, inputs.q[:rows]), f"{rows} rows"
        assert torch.equal(scale, inputs.scale[:rows]), f"{rows} rows"
        if inputs.h is not None:
            assert torch.equal(h, inputs.h[:rows]), f"{rows} rows"
