"""Tile sizes of convolutions: those of grouped scales, with no more sums for a thread than it can hold."""

import pytest

from int8run.kernels.int8_conv.tile import MOST_SUMS, MOST_WARPS, choose_conv_tile
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, choose_tile


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_thread_holds_few_sums_and_the_tile_stays(architecture):
    for pixels in BUCKETS:
        tile = choose_conv_tile(architecture, pixels)
        grouped = choose_tile(architecture, pixels, grouped=True)

        assert tile.sums_per_thread <= MOST_SUMS or tile.warps == MOST_WARPS
        assert (tile.block_m, tile.block_n, tile.block_k) == (
            grouped.block_m,
            grouped.block_n,
            grouped.block_k,
        )


def test_a_gpu_without_tiles_raises():
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, not 7\.5"):
        choose_conv_tile("sm_75", 4096)
