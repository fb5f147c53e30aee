"""Tile sizes of the Triton kernel of convolutions: those of a linear layer with scales per group, adjusted.

Whoever calls `kernel.py` chooses with this module. Needs no Triton and no GPU.
"""

from dataclasses import replace

from int8run.kernels.int8_linear.tile import Tile, choose_tile, find_known_name

# of a thread. Each is held twice, as an integer and in float32, beside the places of its pixels: more would
# spill, as tests/support/static_gate.py shows
MOST_SUMS = 32
# where sums lie in a memory of their own, and all of a tap's pass through registers at once
FEWER_SUMS = {"sm_100": 16}
MOST_WARPS = 8  # beyond, a thread has 128 registers at most
ROWS_OF_WARP = 16  # of the smallest tensor-core product


def choose_conv_tile(architecture: str, pixels: int) -> Tile:
    """The tile to start with.

    Args:
        architecture: of the GPU, `sm_90` or `gfx942`.
        pixels: of the output, of the whole batch.

    Raises:
        ValueError: for a GPU without tiles.
    """
    tile = choose_tile(architecture, pixels, grouped=True)
    most_sums = FEWER_SUMS.get(find_known_name(architecture), MOST_SUMS)
    while tile.sums_per_thread > most_sums:
        has_rows_for_more = tile.block_m >= ROWS_OF_WARP * 2 * tile.warps
        if tile.warps < MOST_WARPS and has_rows_for_more:
            tile = replace(tile, warps=2 * tile.warps)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile
