"""Tile sizes of the Triton kernel of attention: what is allowed, and what each GPU starts with.

Whoever calls `kernel.py` chooses with this module. Needs no Triton and no GPU: a GPU is known by the name of
its architecture, `sm_90` or `gfx942`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from int8run.kernels.int8_linear.tile import ARCHITECTURES, find_known_name

ALLOWED: dict[str, Sequence[int]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64, 128),  # 32 is the depth of one int8 tensor-core instruction, of heads and of keys
    "warps": (1, 2, 4, 8),
    "stages": range(1, 9),
}
# heads are padded to a power of two; those that are wider than the last one are not computed
WIDTHS = (64, 128, 256)
SMALLEST_WIDTH, MAX_WIDTH = 32, WIDTHS[-1]
FEW_QUERIES = 16


@dataclass(frozen=True)
class AttentionTile:
    """How the scores [Lq, Lk] of one head are cut up.

    Args:
        block_m: queries of one program.
        block_n: keys that it takes at a time.
        warps: of one program, 32 threads each (64 on AMD's Instinct). Where each has 16 queries or more, the
            largest score of a row and its sum need no other warp.
        stages: steps of keys and values in flight; 1: no pipeline.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, values in ALLOWED.items():
            value = getattr(self, name)
            if value not in values:
                allowed = ", ".join(map(str, values))
                raise ValueError(f"an attention tile's {name} is {value}; it must be one of {allowed}")

    def as_list(self) -> list[int]:
        """The fields in order, as the operator takes them."""
        return list(astuple(self))


@dataclass(frozen=True)
class ArchitectureTiles:
    """What one generation of GPUs starts with, a tile for each of `WIDTHS`.

    None of them spills registers (tests/support/static_gate.py); which is fastest is for a GPU to find out.

    Args:
        many: for more than `FEW_QUERIES`.
        row_mask: for as many with a mask whose rows differ, which is a third operand in flight.
        few: for at most `FEW_QUERIES`.
    """

    many: tuple[AttentionTile, ...]
    row_mask: tuple[AttentionTile, ...]
    few: tuple[AttentionTile, ...]


# A thread holds its share of the output in float32, and of the scores as integers and as floats. 128 queries
# and 64 keys are the most that fit beside 128 channels: each key that was loaded serves 128 queries. With 256
# channels the output would take 128 registers of each thread of 8 warps; 64 queries leave room for the
# scores, and two warps share each row.
_NVIDIA = ArchitectureTiles(
    many=(AttentionTile(128, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(64, 32, 8, 2)),
    row_mask=(AttentionTile(128, 32, 8, 3), AttentionTile(128, 32, 8, 3), AttentionTile(64, 32, 8, 2)),
    few=(AttentionTile(16, 32, 1, 2), AttentionTile(16, 32, 4, 2), AttentionTile(16, 32, 4, 2)),
)
# warps of 64 threads: half as many of them
_GFX9 = ArchitectureTiles(
    many=(AttentionTile(128, 64, 4, 2), AttentionTile(128, 64, 4, 2), AttentionTile(64, 32, 8, 2)),
    row_mask=(AttentionTile(128, 32, 4, 2), AttentionTile(128, 32, 4, 2), AttentionTile(32, 32, 8, 2)),
    few=_NVIDIA.few,
)
# RDNA multiplies 16 x 16 tiles whose operands fill many registers, on RDNA 3 twice as many as on RDNA 4
_GFX12 = ArchitectureTiles(
    many=(AttentionTile(64, 32, 4, 2), AttentionTile(64, 32, 8, 2), AttentionTile(32, 32, 8, 2)),
    row_mask=(AttentionTile(64, 32, 8, 2), AttentionTile(64, 32, 8, 2), AttentionTile(16, 32, 8, 2)),
    few=_NVIDIA.few,
)
_GFX11 = ArchitectureTiles(
    many=(AttentionTile(64, 32, 4, 2), AttentionTile(64, 32, 8, 2), AttentionTile(16, 32, 8, 1)),
    row_mask=(AttentionTile(32, 32, 8, 2), AttentionTile(32, 32, 8, 2), AttentionTile(16, 32, 8, 2)),
    few=(AttentionTile(16, 32, 2, 2), AttentionTile(16, 32, 4, 2), AttentionTile(16, 32, 8, 1)),
)
_BY_PREFIX = {"sm_": _NVIDIA, "gfx9": _GFX9, "gfx11": _GFX11, "gfx12": _GFX12}
TILES: dict[str, ArchitectureTiles] = {}
for _name in ARCHITECTURES:
    TILES[_name] = next(tiles for prefix, tiles in _BY_PREFIX.items() if _name.startswith(prefix))


def pad_width(width: int) -> int:
    """A head's channels as the kernel computes them: up to a power of two."""
    return max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())


def choose_attention_tile(
    architecture: str, width: int, queries: int, *, has_row_mask: bool = False
) -> AttentionTile:
    """The tile to start with.

    Args:
        architecture: of the GPU, `sm_90` or `gfx942`.
        width: channels of a head, of its queries or its values, whichever has more.
        queries: Lq.
        has_row_mask: whether there is a mask whose rows differ.

    Raises:
        ValueError: for a GPU without tiles or a head that is wider than 256 channels.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"a head has {width} channels; the kernel takes up to {MAX_WIDTH}")
    tiles = TILES[find_known_name(architecture)]
    bucket = next(i for i, limit in enumerate(WIDTHS) if width <= limit)
    if queries <= FEW_QUERIES:
        return tiles.few[bucket]
    return tiles.row_mask[bucket] if has_row_mask else tiles.many[bucket]
