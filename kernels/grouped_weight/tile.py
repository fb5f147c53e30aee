"""Tile sizes of the product with grouped weights, for each GPU; `int8_linear/tile.py` says what a tile is.

A program decodes its part of the weight anew, so that tiles have more rows than those of the INT8 product:
twice as many rows are half as much decoding. The weight's rows are spread over the warps. None of the
defaults spills registers (tests/support/static_gate.py); which is fastest is for a tuner to find out.
"""

from dataclasses import replace

from int8run.kernels.grouped_weight.layout import count_span_columns
from int8run.kernels.int8_linear.tile import (
    BUCKETS,
    FEW_ROWS,
    MANY_ROWS,
    PORTABLE,
    RESERVED_SHARED_MEMORY,
    Architecture,
    Tile,
    find_architecture,
    find_bucket,
    find_known_name,
)

_AMPERE = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=4),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=128, block_n=64, block_k=128, group_m=8, warps=4, stages=3),
    Tile(block_m=256, block_n=128, block_k=64, group_m=8, warps=8, stages=3),
)
# products wait for each other; two programs on one multiprocessor fill each other's waits
_HOPPER = (*_AMPERE[:3], Tile(block_m=256, block_n=64, block_k=64, group_m=8, warps=4, stages=4))
_SM_103 = (Tile(block_m=16, block_n=64, block_k=128, group_m=1, warps=4, stages=4), *_AMPERE[1:])
_BLACKWELL = (*_AMPERE[:3], Tile(block_m=256, block_n=64, block_k=128, group_m=8, warps=8, stages=3))
# with 6 bits a step has four pieces: more rows or longer steps spill
_SIX_BITS = (
    Tile(block_m=16, block_n=64, block_k=128, group_m=1, warps=4, stages=5),
    *_AMPERE[1:3],
    _AMPERE[2],
)
_CDNA = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=2),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=2),
    Tile(block_m=128, block_n=64, block_k=128, group_m=8, warps=4, stages=2),
    Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=8, stages=2),
)
_RDNA = (
    Tile(block_m=16, block_n=64, block_k=128, group_m=1, warps=4, stages=2),
    _CDNA[1],
    Tile(block_m=128, block_n=64, block_k=64, group_m=8, warps=8, stages=2),
    Tile(block_m=128, block_n=64, block_k=64, group_m=8, warps=8, stages=2),
)
_AMD_DEFAULTS = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"), _RDNA),
}
_NVIDIA_DEFAULTS = {"sm_90": _HOPPER, "sm_100": _BLACKWELL, "sm_103": _SM_103}

# bucket -> block_m, block_n and warps that a tuner tries
_CANDIDATE_SHAPES = {
    FEW_ROWS: ((16, 32, 4), (16, 64, 4), (16, 128, 4)),
    128: ((64, 64, 4), (128, 64, 4)),
    1024: ((64, 64, 4), (128, 64, 4), (128, 128, 8), (256, 64, 8)),
    MANY_ROWS: ((128, 128, 4), (128, 128, 8), (256, 64, 4), (256, 64, 8), (256, 128, 8)),
}
_CANDIDATE_DEPTHS_FEW_ROWS, _CANDIDATE_DEPTHS = (128, 256, 512), (64, 128)


def choose_grouped_tile(architecture: str, rows: int, bits: int) -> Tile:
    """The tile to start with.

    Args:
        architecture: of the GPU, `sm_90` or `gfx942`.
        rows: M.
        bits: of the codes.

    Raises:
        ValueError: as `find_known_name`.
    """
    name = find_known_name(architecture)
    if name in _AMD_DEFAULTS:
        tiles = _AMD_DEFAULTS[name]
    elif bits == 6:
        tiles = _SIX_BITS
    else:
        tiles = _NVIDIA_DEFAULTS.get(name, _AMPERE)
    return fit_tile(tiles[BUCKETS.index(find_bucket(rows))], bits)


def fit_tile(tile: Tile, bits: int) -> Tile:
    """A tile of the portable kernel whose steps are whole spans of the weight."""
    portable = tile if tile.kernel == PORTABLE else tile.as_portable()
    span = count_span_columns(bits)
    if portable.block_k >= span:
        return portable
    return replace(portable, block_k=span, stages=min(portable.stages, 3))


def shrink_tile(tile: Tile, bits: int) -> Tile:
    """A tile for scales of float32, whose levels and products would spill in a tile of full size."""
    if tile.block_k > count_span_columns(bits):
        return replace(tile, block_k=tile.block_k // 2)
    if tile.block_m >= 128:
        return replace(tile, block_m=tile.block_m // 2)
    return tile


def list_grouped_candidates(architecture: str, rows: int, bits: int) -> list[Tile]:
    """What a tuner should measure for a bucket of rows, the default first.

    Arguments and errors as for `choose_grouped_tile`.
    """
    gpu = find_architecture(architecture)
    first = choose_grouped_tile(architecture, rows, bits)
    bucket = find_bucket(rows)
    depths = _CANDIDATE_DEPTHS_FEW_ROWS if bucket == FEW_ROWS else _CANDIDATE_DEPTHS
    candidates = [first]
    for block_m, block_n, warps in _CANDIDATE_SHAPES[bucket]:
        for block_k in depths:
            for stages in gpu.stages[:2]:
                tile = fit_tile(Tile(block_m, block_n, block_k, first.group_m, warps, stages), bits)
                if tile not in candidates and count_grouped_bytes(tile, gpu, bits) <= gpu.shared_memory:
                    candidates.append(tile)
    return candidates


def count_grouped_bytes(tile: Tile, gpu: Architecture, bits: int) -> int:
    """Shared memory of one program, at most: the operands in flight, then the tile on its way out.

    Codes pass through it on their way to the threads that decode them; where tensor cores read shared memory
    alone, decoded weights do, too.
    """
    q = tile.block_m * tile.block_k
    codes = tile.block_n * tile.block_k * bits // 8
    decoded = tile.block_n * tile.block_k
    buffers = max(1, tile.stages - gpu.stages_in_registers)
    operands = (q + codes) * buffers + decoded
    out = tile.block_m * tile.block_n * gpu.bytes_per_sum
    return max(operands, out) + RESERVED_SHARED_MEMORY
