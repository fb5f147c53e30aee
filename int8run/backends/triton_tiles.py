"""Which tiles the Triton backend takes: those that `task=bench` measured, else a GPU's defaults."""

import torch

from int8run.backends.autotune_cache import AutotuneCache
from int8run.errors import BackendError
from int8run.kernels.grouped_weight.tile import choose_grouped_tile
from int8run.kernels.int8_linear.tile import (
    BUCKETS,
    HOPPER,
    PORTABLE,
    Tile,
    choose_tile,
    find_architecture,
    find_bucket,
)
from int8run.utils.hardware import get_gpu_architecture

# in the autotune cache, in a tile's place: the weight is decoded before the INT8 product
AHEAD = "ahead"


def load_tiles(cache: AutotuneCache, architecture: str, k: int, n: int) -> tuple[Tile, ...]:
    """A tile for each bucket of rows.

    Args:
        cache: has the measured ones.
        architecture: of the GPU.
        k: input features of a layer.
        n: its output features.
    """
    tiles = []
    for rows in BUCKETS:
        measured = parse_measured_tile(cache.get(tile_key(rows, k, n)))
        tiles.append(measured or choose_tile(architecture, rows))
    return tuple(tiles)


def load_grouped_tiles(
    cache: AutotuneCache, architecture: str, k: int, n: int, bits: int
) -> tuple[Tile | None, ...]:
    """The same for a weight of 4 or 6 bits; None where decoding it before the product was faster."""
    tiles: list[Tile | None] = []
    for rows in BUCKETS:
        entry = cache.get(grouped_tile_key(rows, k, n, bits))
        if entry == AHEAD:
            tiles.append(None)
        else:
            tiles.append(parse_measured_tile(entry) or choose_grouped_tile(architecture, rows, bits))
    return tuple(tiles)


def tile_key(rows: int, k: int, n: int) -> str:
    """The key of a measured tile in the autotune cache."""
    return f"triton tile | up to {find_bucket(rows)} rows | {k}x{n}"


def grouped_tile_key(rows: int, k: int, n: int, bits: int) -> str:
    """The key of a measured tile for weights of 4 or 6 bits in the autotune cache."""
    return f"triton tile for {bits} bits | up to {find_bucket(rows)} rows | {k}x{n}"


def parse_measured_tile(entry: str | None) -> Tile | None:
    """A tile out of the autotune cache: its fields, separated by commas."""
    if not entry:
        return None
    return Tile.from_list([int(number) for number in entry.split(",")])


def check_tile(tile: Tile, device: torch.device) -> None:
    """Check that a tile that was asked for can run.

    Raises:
        BackendError: for the Hopper kernel on another GPU.
    """
    if tile.kernel != HOPPER or device.type != "cuda":
        return
    architecture = get_gpu_architecture(device)
    if not find_architecture(architecture).has_hopper_kernel:
        raise BackendError(
            f"backend.tile.kernel={HOPPER} needs compute capability 9.0, this GPU is {architecture}; "
            f"use backend.tile.kernel={PORTABLE}"
        )
