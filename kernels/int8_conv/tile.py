"""Tile sizes of the Triton kernel of convolutions: those of a linear layer with scales per group, adjusted.

Whoever calls `kernel.py` chooses with this module. Needs no Triton and no GPU.
"""

from dataclasses import replace

from int8run.kernels.int8_linear.tile import Tile, choose_tile

# of a thread. Each is held twice, as an integer and in float32, beside the places of its pixels: more would
# spill, as tests/support/static_gate.py shows
MOST_SUMS = 32
MOST_WARPS = 8  # beyond, a thread has 128 registers at most


def choose_conv_tile(architecture: str, pixels: int) -> Tile:
    """The tile to start with.

    Args:
        architecture: of the GPU, `sm_90` or `gfx942`.
        pixels: of the output, of the whole batch.

    Raises:
        ValueError: for a GPU without tiles.
    """
    tile = choose_tile(architecture, pixels, grouped=True)
    if tile.sums_per_thread > MOST_SUMS and tile.warps < MOST_WARPS:
        return replace(tile, warps=2 * tile.warps)
    return tile
