"""Tile sizes of the Triton kernel: what is allowed, what each GPU starts with, and what a tuner should try.

`backends/triton.py` chooses and tunes with this module, `kernel.py` launches a `Tile`. Needs no Triton.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from itertools import product

# what one program may use of a multiprocessor's shared memory, in bytes, by compute capability
SHARED_MEMORY = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
}
RESERVED_SHARED_MEMORY = 4096  # what the compiler adds to the operand tiles, at most

# M falls into one of these buckets, named by its largest number of rows; a tuner measures once per bucket,
# not per M
FEW_ROWS, MANY_ROWS = 16, 2**31 - 1
BUCKETS = (FEW_ROWS, 128, 1024, MANY_ROWS)

# allowed values of a tile's fields; 32 is the depth of one int8 tensor-core instruction
ALLOWED = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128, 256, 512),
    "group_m": range(1, 65),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 9),
}
MAX_SUMS_PER_THREAD = 128  # of the 255 registers that a thread can have


@dataclass(frozen=True)
class Tile:
    """How the output [M, N] is cut up, and how one program walks along K.

    Args:
        block_m: rows of the output that one program computes.
        block_n: columns of it.
        block_k: input columns that are multiplied at a time.
        group_m: row blocks that run side by side, so that they find the same weight in L2.
        warps: of one program, 32 threads each.
        stages: tiles of K in flight; 1: no pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        for name, values in ALLOWED.items():
            if getattr(self, name) in values:
                continue
            if isinstance(values, range):
                allowed = f"1 to {values[-1]}"
            else:
                allowed = f"one of {', '.join(map(str, values))}"
            raise ValueError(f"tile.{name} is {getattr(self, name)}; it must be {allowed}")
        if self.sums_per_thread > MAX_SUMS_PER_THREAD:
            raise ValueError(
                f"a tile of {self.block_m}x{self.block_n} needs more than {self.warps} warps: "
                "its sums spill from the registers"
            )

    @property
    def sums_per_thread(self) -> int:
        """Registers that hold sums, of the 255 that a thread can have."""
        return self.block_m * self.block_n // (32 * self.warps)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the operand tiles in flight, at most; the compiler adds up to a few kilobytes."""
        return (self.block_m + self.block_n) * self.block_k * self.stages

    def as_list(self) -> list[int]:
        """The fields in order, as the operator takes them."""
        return list(astuple(self))


# Compute capability -> a tile for each bucket. None of them spills registers, and on 8.x the largest leaves
# room for two programs on one multiprocessor (tests/support/static_gate.py); which is fastest is for a tuner
# to find out. With few rows the weight is all that moves: long block_k, many stages. With many rows the
# product dominates: the larger the tile, the more often an operand that was loaded is used.
_AMPERE = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=4),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=64, block_n=128, block_k=64, group_m=8, warps=4, stages=4),
    Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=8, stages=4),
)
_HOPPER = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=5),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=64, block_n=128, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=128, block_n=256, block_k=128, group_m=8, warps=8, stages=3),
)
_BLACKWELL = (*_HOPPER[:3], Tile(block_m=128, block_n=128, block_k=128, group_m=8, warps=8, stages=4))
DEFAULTS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _AMPERE}
# sums per thread beyond which the kernel spills; scales per group keep two sums
MOST_SUMS = {80: 128, 90: 128, 100: 64, 120: 128}

# bucket -> block_m, block_n and warps that a tuner tries
CANDIDATE_SHAPES = {
    FEW_ROWS: ((16, 32, 4), (16, 64, 4), (16, 128, 4)),
    128: ((32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4)),
    1024: ((64, 64, 4), (64, 128, 4), (128, 128, 8), (64, 256, 8), (128, 128, 4), (128, 64, 8)),
    MANY_ROWS: ((64, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (128, 128, 4), (128, 64, 8)),
}
# block_k and stages that it tries with each shape
CANDIDATE_DEPTHS_FEW_ROWS, CANDIDATE_DEPTHS = (128, 256, 512), (64, 128)
CANDIDATE_STAGES = (3, 4, 5)


def find_bucket(rows: int) -> int:
    """The bucket that a number of rows falls into."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def choose_tile(capability: tuple[int, int], rows: int, *, grouped: bool = False) -> Tile:
    """The tile to start with.

    Args:
        capability: of the GPU, as `torch.cuda.get_device_capability` gives it.
        rows: M.
        grouped: whether the weight has scales per group; those need twice the sums.

    Raises:
        ValueError: below compute capability 8.0.
    """
    tiles = DEFAULTS[_newest_supported(DEFAULTS, capability)]
    tile = tiles[BUCKETS.index(find_bucket(rows))]
    if tile.sums_per_thread > _most_sums(capability, grouped=grouped):
        return replace(tile, block_n=tile.block_n // 2)
    return tile


def list_candidates(capability: tuple[int, int], rows: int, *, grouped: bool = False) -> list[Tile]:
    """What a tuner should measure for a bucket of rows, the default first.

    Arguments and errors as for `choose_tile`.
    """
    first = choose_tile(capability, rows, grouped=grouped)
    shared_memory = SHARED_MEMORY[_newest_supported(SHARED_MEMORY, capability)] - RESERVED_SHARED_MEMORY
    most_sums = _most_sums(capability, grouped=grouped)
    shapes = CANDIDATE_SHAPES[find_bucket(rows)]
    depths = CANDIDATE_DEPTHS_FEW_ROWS if rows <= FEW_ROWS else CANDIDATE_DEPTHS
    candidates = [first]
    for (block_m, block_n, warps), block_k, stages in product(shapes, depths, CANDIDATE_STAGES):
        tile = Tile(block_m, block_n, block_k, group_m=first.group_m, warps=warps, stages=stages)
        fits_memory = tile.shared_bytes <= shared_memory
        fits_registers = tile.sums_per_thread <= most_sums
        if fits_memory and fits_registers and tile != first:
            candidates.append(tile)
    return candidates


def _most_sums(capability: tuple[int, int], *, grouped: bool) -> int:
    """How many sums a thread can hold; see MOST_SUMS."""
    most = MOST_SUMS[_newest_supported(MOST_SUMS, capability)]
    return most // 2 if grouped else most


def _newest_supported(table: Mapping[int, object], capability: tuple[int, int]) -> int:
    """The newest entry that this GPU is not older than."""
    number = 10 * capability[0] + capability[1]
    supported = [entry for entry in table if entry <= number]
    if not supported:
        raise ValueError(
            f"the kernel needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
        )
    return max(supported)
