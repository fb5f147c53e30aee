"""Tile sizes: what is refused, and what each GPU gets."""

import pytest

from int8run.kernels.int8_linear.tile import (
    BUCKETS,
    DEFAULTS,
    MOST_SUMS,
    SHARED_MEMORY,
    Tile,
    choose_tile,
    find_bucket,
    list_candidates,
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_m": 48}, r"tile.block_m is 48; it must be one of 16, 32, 64, 128, 256$"),
        ({"block_k": 16}, r"tile.block_k is 16; it must be one of 32"),
        ({"group_m": 0}, r"tile.group_m is 0; it must be 1 to 64$"),
        ({"stages": 9}, r"tile.stages is 9; it must be 1 to 8$"),
        ({"warps": 3}, r"tile.warps is 3; it must be one of 1, 2, 4, 8, 16$"),
        ({"block_n": 256, "warps": 4}, r"128x256 needs more than 4 warps"),
    ],
)
def test_impossible_tile_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        Tile(**{"block_m": 128, "block_n": 128, "block_k": 64, **changed})


def test_as_list_returns_the_fields_in_order():
    tile = Tile(128, 64, 32, 7, 8, 5)
    assert Tile(*tile.as_list()) == tile
    assert tile.as_list() == [128, 64, 32, 7, 8, 5]


@pytest.mark.parametrize(
    ("rows", "name"), [(1, 16), (16, 16), (17, 128), (128, 128), (129, 1024), (4608, 2**31 - 1)]
)
def test_rows_fall_into_buckets(rows, name):
    assert find_bucket(rows) == name


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("number", sorted(SHARED_MEMORY))
def test_candidates_fit_the_gpu_and_begin_with_the_default(number, grouped):
    for rows in BUCKETS:
        tiles = list_candidates(divmod(number, 10), rows, grouped=grouped)

        assert tiles[0] == choose_tile(divmod(number, 10), rows, grouped=grouped)
        assert len(tiles) == len(set(tiles)) > 5
        assert all(t.shared_bytes < SHARED_MEMORY[number] for t in tiles)

        most = MOST_SUMS[max(n for n in MOST_SUMS if n <= number)] // (2 if grouped else 1)

        assert all(t.sums_per_thread <= most for t in tiles)


def test_each_default_serves_its_bucket():
    assert all(len(tiles) == len(BUCKETS) for tiles in DEFAULTS.values())
    assert choose_tile((8, 9), 4096) == DEFAULTS[80][-1]
    assert choose_tile((9, 0), 1) == DEFAULTS[90][0]


def test_old_gpu_raises():
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 or newer, not 7.5"):
        choose_tile((7, 5), 1)
