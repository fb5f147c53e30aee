"""Tile sizes: what is refused, and what each GPU gets."""

import pytest

from int8run.kernels.int8_linear.tile import (
    ARCHITECTURES,
    BUCKETS,
    HOPPER,
    MANY_ROWS,
    Tile,
    choose_tile,
    count_hopper_programs,
    count_shared_bytes,
    find_architecture,
    find_bucket,
    find_bucket_index,
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
        ({"kernel": "ampere"}, r"tile.kernel is ampere; it must be one of portable, hopper$"),
        ({"block_n": 256, "warps": 4}, r"128x256 needs more than 4 warps"),
        ({"kernel": HOPPER, "stages": 1}, r"tile.stages is 1; it must be 2 to 8 with tile.kernel=hopper$"),
        ({"kernel": HOPPER, "block_m": 64}, r"tile.block_m is 64; it must be one of 128, 256 with"),
        ({"kernel": HOPPER, "block_k": 256}, r"tile.block_k is 256; it must be one of 64, 128 with"),
    ],
)
def test_impossible_tile_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        Tile(**{"block_m": 128, "block_n": 128, "block_k": 64, **changed})


@pytest.mark.parametrize("kernel", ["portable", "hopper"])
def test_a_tile_survives_as_list(kernel):
    tile = Tile(128, 64, 64, 7, 8, 5, kernel)
    assert Tile.from_list(tile.as_list()) == tile


def test_a_list_without_a_kernel_is_of_the_portable_one():
    assert Tile.from_list([128, 64, 32, 7, 8, 5]) == Tile(128, 64, 32, 7, 8, 5)


@pytest.mark.parametrize(
    ("rows", "name"), [(1, 16), (16, 16), (17, 128), (128, 128), (129, 1024), (4608, 2**31 - 1)]
)
def test_rows_fall_into_buckets(rows, name):
    assert find_bucket(rows) == name


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_fit_the_gpu_and_begin_with_the_default(architecture, grouped):
    gpu = ARCHITECTURES[architecture]
    most_sums = gpu.most_grouped_sums if grouped else gpu.most_sums
    for rows in BUCKETS:
        tiles = list_candidates(architecture, rows, grouped=grouped)

        assert tiles[0] == choose_tile(architecture, rows, grouped=grouped)
        assert len(tiles) == len(set(tiles)) > 3
        assert all(count_shared_bytes(tile, gpu) <= gpu.shared_memory for tile in tiles)
        assert all(tile.sums_per_thread <= most_sums for tile in tiles)


def test_the_hopper_kernel_is_a_candidate_on_hopper_alone():
    with_it = {
        name
        for name in ARCHITECTURES
        if any(tile.kernel == HOPPER for tile in list_candidates(name, MANY_ROWS))
    }
    assert with_it == {"sm_90"}
    assert not any(tile.kernel == HOPPER for tile in list_candidates("sm_90", MANY_ROWS, grouped=True))


@pytest.mark.parametrize(
    "tile",
    [
        Tile(128, 256, 128, 8, 8, 3),
        Tile(128, 256, 128, 8, 8, 4),
        Tile(256, 128, 128, 8, 8, 3),
        Tile(128, 128, 128, 8, 4, 3),
        Tile(128, 128, 128, 8, 8, 3),
        Tile(64, 256, 128, 8, 8, 3),
        Tile(128, 256, 128, 8, 8, 4, HOPPER),
        Tile(128, 128, 128, 8, 4, 3, HOPPER),
    ],
    ids=str,
)
def test_tiles_worth_a_try_on_hopper_are_candidates(tile):
    assert tile in list_candidates("sm_90", 4608)


def test_ampere_and_ada_try_a_step_of_128_columns():
    # two buffers of 32,768 bytes, because the third stage lies in registers
    tile = Tile(128, 128, 128, 8, 8, 3)
    assert count_shared_bytes(tile, ARCHITECTURES["sm_86"]) // 2**15 == 2
    assert tile in list_candidates("sm_86", 4608)


def test_two_programs_of_the_small_hopper_tile_share_a_multiprocessor():
    assert count_hopper_programs(Tile(128, 128, 128, 8, 4, 3, HOPPER), out_bytes=2) == 2
    assert count_hopper_programs(Tile(128, 256, 128, 8, 8, 4, HOPPER), out_bytes=2) == 1


def test_each_default_serves_its_bucket():
    assert all(len(gpu.defaults) == len(BUCKETS) for gpu in ARCHITECTURES.values())
    assert choose_tile("sm_89", 4096) == ARCHITECTURES["sm_86"].defaults[-1]
    assert choose_tile("sm_90", 1) == ARCHITECTURES["sm_90"].defaults[0]


def test_a_newer_nvidia_gpu_gets_the_newest_tiles():
    assert find_architecture("sm_130") is ARCHITECTURES["sm_121"]


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("sm_75", "needs compute capability 8.0 or newer, not 7.5"),
        ("gfx1030", "has no tiles for gfx1030; of AMD's GPUs it knows gfx90a, gfx942"),
    ],
)
def test_a_gpu_without_tiles_raises(architecture, message):
    with pytest.raises(ValueError, match=message):
        choose_tile(architecture, 1)


@pytest.mark.parametrize("rows", [1, 16, 17, 128, 129, 1024, 1025, 10**6])
def test_the_index_of_a_bucket_is_that_of_its_name(rows):
    assert BUCKETS[find_bucket_index(rows)] == find_bucket(rows)
