"""Tile sizes of convolutions: those of grouped scales, with no more sums for a thread than it can hold."""

from dataclasses import replace

import pytest

from int8run.kernels.int8_conv.tile import FEWER_SUMS, MOST_SUMS, MOST_WARPS, choose_conv_tile
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, choose_tile


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_thread_holds_few_sums(architecture):
    for pixels in BUCKETS:
        tile = choose_conv_tile(architecture, pixels)

        assert tile.sums_per_thread <= FEWER_SUMS.get(architecture, MOST_SUMS)
        assert tile.warps <= MOST_WARPS


def test_more_warps_share_a_tile_before_it_becomes_smaller():
    assert choose_conv_tile("sm_90", 4096) == replace(choose_tile("sm_90", 4096, grouped=True), warps=8)
    assert choose_conv_tile("sm_86", 4096) == replace(choose_tile("sm_86", 4096, grouped=True), block_n=64)


def test_a_gpu_without_tiles_raises():
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, not 7\.5"):
        choose_conv_tile("sm_75", 4096)
