"""Tile sizes of the product with weights of 4 and 6 bits: what each GPU gets, and what a tuner tries."""

import pytest

from int8run.kernels.grouped_weight.layout import count_span_columns
from int8run.kernels.grouped_weight.tile import (
    choose_grouped_tile,
    count_grouped_bytes,
    fit_tile,
    list_grouped_candidates,
    shrink_tile,
)
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, HOPPER, PORTABLE, Tile


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile_that_is_tried_has_whole_spans_and_fits(architecture, bits):
    gpu = ARCHITECTURES[architecture]
    for rows in BUCKETS:
        default = choose_grouped_tile(architecture, rows, bits)
        candidates = list_grouped_candidates(architecture, rows, bits)

        assert candidates[0] == default and len(set(candidates)) == len(candidates) > 1
        for tile in candidates:
            assert tile.block_k % count_span_columns(bits) == 0
            assert tile.kernel == PORTABLE
            assert count_grouped_bytes(tile, gpu, bits) <= gpu.shared_memory


def test_a_newer_gpu_gets_the_tiles_of_the_newest_that_is_older():
    assert choose_grouped_tile("sm_101", 4096, 4) == choose_grouped_tile("sm_100", 4096, 4)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, not 7\.5"):
        choose_grouped_tile("sm_75", 4096, 4)


def test_a_tile_of_the_int8_product_is_raised_to_whole_spans():
    assert fit_tile(Tile(64, 64, 32, 8, 4, 4), 4) == Tile(64, 64, 64, 8, 4, 3)
    assert fit_tile(Tile(64, 64, 128, 8, 4, 4), 6) == Tile(64, 64, 128, 8, 4, 4)
    assert fit_tile(Tile(128, 128, 128, 8, 4, 4, HOPPER), 4) == Tile(128, 128, 128, 8, 4, 3)


@pytest.mark.parametrize(
    ("tile", "smaller"),
    [
        (Tile(16, 64, 256, 1, 4, 4), Tile(16, 64, 128, 1, 4, 4)),
        (Tile(256, 128, 64, 8, 8, 3), Tile(128, 128, 64, 8, 8, 3)),
        (Tile(64, 64, 64, 8, 4, 4), Tile(64, 64, 64, 8, 4, 4)),
    ],
)
def test_scales_of_float32_get_a_smaller_tile(tile, smaller):
    assert shrink_tile(tile, 4) == smaller
