"""Tile sizes of attention: what is refused, and what each GPU gets."""

import pytest

from int8run.kernels.int8_attention.tile import (
    MAX_WIDTH,
    TILES,
    AttentionTile,
    choose_attention_tile,
    pad_width,
)
from int8run.kernels.int8_linear.tile import ARCHITECTURES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_m": 48}, "an attention tile's block_m is 48; it must be one of 16, 32, 64, 128$"),
        ({"block_n": 16}, "an attention tile's block_n is 16; it must be one of 32, 64, 128$"),
        ({"warps": 3}, "an attention tile's warps is 3; it must be one of 1, 2, 4, 8$"),
        ({"stages": 0}, "an attention tile's stages is 0; it must be one of 1, 2, 3, 4, 5, 6, 7, 8$"),
    ],
)
def test_impossible_tile_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        AttentionTile(**{"block_m": 64, "block_n": 64, "warps": 4, "stages": 2, **changed})


def test_a_tile_survives_as_list():
    tile = AttentionTile(128, 32, 8, 3)
    assert AttentionTile(*tile.as_list()) == tile


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_gpu_has_a_tile_for_every_head(architecture):
    tiles = TILES[architecture]
    assert choose_attention_tile(architecture, 64, 4096) == tiles.many[0]
    assert choose_attention_tile(architecture, 65, 17, has_row_mask=True) == tiles.row_mask[1]
    assert choose_attention_tile(architecture, MAX_WIDTH, 16, has_row_mask=True) == tiles.few[2]
    # a wider head has no larger tile: its output fills the registers
    for group in (tiles.many, tiles.row_mask):
        assert group[1].block_m * group[1].block_n >= group[2].block_m * group[2].block_n


def test_a_newer_nvidia_gpu_gets_the_newest_tiles():
    assert choose_attention_tile("sm_130", 128, 4608) == TILES["sm_121"].many[1]


@pytest.mark.parametrize(
    ("architecture", "width", "message"),
    [
        ("sm_75", 64, "needs compute capability 8.0 or newer, not 7.5"),
        ("gfx1030", 64, "has no tiles for gfx1030"),
        ("sm_90", 320, "a head has 320 channels; the kernel takes up to 256"),
    ],
)
def test_what_has_no_tile_raises(architecture, width, message):
    with pytest.raises(ValueError, match=message):
        choose_attention_tile(architecture, width, 4096)


@pytest.mark.parametrize(("width", "padded"), [(1, 32), (32, 32), (40, 64), (64, 64), (72, 128), (256, 256)])
def test_heads_are_padded_to_a_power_of_two(width, padded):
    assert pad_width(width) == padded
