"""Tile sizes of the Triton kernels: what is allowed, what each GPU starts with, and what a tuner should try.

`backends/triton.py` chooses and tunes with this module, `kernel.py` launches a `Tile`. Needs no Triton and no
GPU: a GPU is known by the name of its architecture, `sm_90` or `gfx942`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product

# M falls into one of these buckets, named by its largest number of rows; a tuner measures once per bucket,
# not per M
FEW_ROWS, MANY_ROWS = 16, 2**31 - 1
BUCKETS = (FEW_ROWS, 128, 1024, MANY_ROWS)

# `kernel.py` runs everywhere; `hopper.py` on compute capability 9.0 alone
PORTABLE, HOPPER = "portable", "hopper"
KERNELS = (PORTABLE, HOPPER)

# allowed values of a tile's fields; 32 is the depth of one int8 tensor-core instruction
ALLOWED = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128, 256, 512),
    "group_m": range(1, 65),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 9),
    "kernel": KERNELS,
}
RESERVED_SHARED_MEMORY = 64  # bytes, of barriers
MAX_SUMS_PER_THREAD = 128  # of the 255 registers that a thread can have

# the Hopper kernel: warps work in groups of four, which have 64 rows; what a copy brings is at most 128 bytes
# wide; a tile is stored HOPPER_PIECE columns at a time
HOPPER_ALLOWED = {"block_n": (64, 128, 256), "block_k": (64, 128), "warps": (4, 8), "stages": range(2, 9)}
HOPPER_PIECE = 64
# what a multiprocessor has for all of its programs
HOPPER_SHARED_MEMORY, SHARED_MEMORY_PER_PROGRAM = 233472, 1024
HOPPER_REGISTERS, MOST_REGISTERS = 65536, 256


@dataclass(frozen=True)
class Tile:
    """How the output [M, N] is cut up, and how one program walks along K.

    Args:
        block_m: rows of the output that one program computes.
        block_n: columns of it.
        block_k: input columns that are multiplied at a time.
        group_m: row blocks that run side by side, so that they find the same weight in L2.
        warps: of one program, 32 threads each (64 on AMD's Instinct).
        stages: tiles of K in flight; 1: no pipeline.
        kernel: `portable`, or `hopper` for the kernel of compute capability 9.0.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    warps: int = 8
    stages: int = 3
    kernel: str = PORTABLE

    def __post_init__(self) -> None:
        for name, values in ALLOWED.items():
            self._check_field(name, values)
        if self.sums_per_thread > MAX_SUMS_PER_THREAD:
            raise ValueError(
                f"a tile of {self.block_m}x{self.block_n} needs more than {self.warps} warps: "
                "its sums spill from the registers"
            )
        if self.kernel == HOPPER:
            for name, values in HOPPER_ALLOWED.items():
                self._check_field(name, values)
            self._check_field("block_m", (16 * self.warps, 32 * self.warps))

    def _check_field(self, name: str, values: Sequence[int | str]) -> None:
        if getattr(self, name) in values:
            return
        if isinstance(values, range):
            allowed = f"{values[0]} to {values[-1]}"
        else:
            allowed = f"one of {', '.join(map(str, values))}"
        condition = f" with tile.kernel={HOPPER}" if self.kernel == HOPPER else ""
        raise ValueError(f"tile.{name} is {getattr(self, name)}; it must be {allowed}{condition}")

    @property
    def sums_per_thread(self) -> int:
        """Registers that hold sums, of the 255 that a thread can have."""
        return self.block_m * self.block_n // (32 * self.warps)

    @property
    def bytes_per_stage(self) -> int:
        """Shared memory of one stage's operands."""
        return (self.block_m + self.block_n) * self.block_k

    def as_list(self) -> list[int]:
        """The fields in order, the kernel as its place in KERNELS, as the operator takes them."""
        *sizes, kernel = astuple(self)
        return [*sizes, KERNELS.index(kernel)]

    @classmethod
    def from_list(cls, fields: Sequence[int]) -> "Tile":
        """The tile of `as_list`; lists without a kernel are of the portable one."""
        block_m, block_n, block_k, group_m, warps, stages, *rest = fields
        kernel = KERNELS[rest[0]] if rest else PORTABLE
        return cls(block_m, block_n, block_k, group_m, warps, stages, kernel)

    def as_portable(self) -> "Tile":
        """This tile for the portable kernel, whose buffers it must leave room for."""
        return replace(self, kernel=PORTABLE, stages=min(self.stages, 3))


@dataclass(frozen=True)
class Architecture:
    """What one generation of GPUs gives to a program, and where it starts.

    Args:
        shared_memory: bytes that one program may use of a multiprocessor's.
        defaults: a tile for each bucket. None of them spills registers
            (tests/support/static_gate.py); which is fastest is for a tuner to find out.
        stages_in_registers: stages that need no buffer in shared memory, because the operands that are being
            multiplied lie in registers; 0 where tensor cores read shared memory.
        bytes_per_sum: shared memory that storing a tile takes, at most, for each of its sums.
        most_sums: per thread, beyond which the kernel spills.
        most_grouped_sums: the same with scales per group, which keep a second sum of each.
        stages: what a tuner tries.
        has_hopper_kernel: whether `hopper.py` runs on it.
    """

    shared_memory: int
    defaults: tuple[Tile, ...]
    stages_in_registers: int = 1
    bytes_per_sum: int = 2
    most_sums: int = MAX_SUMS_PER_THREAD
    most_grouped_sums: int = MAX_SUMS_PER_THREAD // 2
    stages: tuple[int, ...] = (3, 4, 5)
    has_hopper_kernel: bool = False


# With few rows the weight is all that moves: long block_k, many stages. With many rows the product dominates:
# the larger the tile, the more often an operand that was loaded is used.
_AMPERE = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=4),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=64, block_n=128, block_k=64, group_m=8, warps=4, stages=4),
    # leaves room for two programs on one multiprocessor
    Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=8, stages=4),
)
# The A100 multiplies twice as much per cycle as other chips of its time and reads shared memory no faster:
# four warps of 64x64 sums read a third less than eight of 64x32.
_A100 = (*_AMPERE[:3], Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=4, stages=5))
_HOPPER = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=5),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=4),
    Tile(block_m=64, block_n=128, block_k=128, group_m=8, warps=4, stages=4),
    # Triton waits for each product; two programs on one multiprocessor are meant to fill each other's waits
    Tile(block_m=128, block_n=128, block_k=128, group_m=8, warps=4, stages=3),
)
_BLACKWELL = (*_HOPPER[:3], Tile(block_m=128, block_n=128, block_k=128, group_m=8, warps=8, stages=4))
_CDNA = (
    Tile(block_m=16, block_n=64, block_k=256, group_m=1, warps=4, stages=2),
    Tile(block_m=64, block_n=64, block_k=128, group_m=8, warps=4, stages=2),
    Tile(block_m=64, block_n=128, block_k=64, group_m=8, warps=4, stages=2),
    Tile(block_m=128, block_n=128, block_k=128, group_m=8, warps=8, stages=2),
)
_RDNA4 = (
    Tile(block_m=16, block_n=64, block_k=128, group_m=1, warps=4, stages=2),
    *_CDNA[1:3],
    Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=8, stages=2),
)
# operands take twice the registers of RDNA 4: beside a branch of rank 64, 64 sums per thread spill
_RDNA3 = (
    *_RDNA4[:2],
    Tile(block_m=64, block_n=128, block_k=64, group_m=8, warps=8, stages=2),
    Tile(block_m=128, block_n=64, block_k=64, group_m=8, warps=8, stages=2),
)

_SM_80 = Architecture(166912, _A100)
_SM_86 = Architecture(101376, _AMPERE)
_SM_90 = Architecture(232448, _HOPPER, stages_in_registers=0, bytes_per_sum=4, has_hopper_kernel=True)
# Triton 3.6 and 3.9 know no int8 product of its own and compile Ampere's
_SM_103 = Architecture(232448, (Tile(16, 128, 128, group_m=1, warps=4, stages=4), *_AMPERE[1:]))
# the sums lie in a memory of their own and pass through registers once, at the end
_SM_100 = Architecture(232448, _BLACKWELL, stages_in_registers=0, most_sums=64, most_grouped_sums=32)
_GFX9 = Architecture(65536, _CDNA, stages=(2, 3))
_GFX11 = Architecture(65536, _RDNA3, most_grouped_sums=32, stages=(2, 3))
_GFX12 = Architecture(65536, _RDNA4, most_grouped_sums=32, stages=(2, 3))
ARCHITECTURES = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_87": _SM_80,
    "sm_89": _SM_86,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_103": _SM_103,
    "sm_120": _SM_86,
    "sm_121": _SM_86,
    "gfx90a": _GFX9,
    "gfx942": _GFX9,
    "gfx1100": _GFX11,
    "gfx1101": _GFX11,
    "gfx1102": _GFX11,
    "gfx1200": _GFX12,
    "gfx1201": _GFX12,
}
AMD_ARCHITECTURES = tuple(name for name in ARCHITECTURES if name.startswith("gfx"))

# bucket -> block_m, block_n and warps that a tuner tries
CANDIDATE_SHAPES = {
    FEW_ROWS: ((16, 32, 4), (16, 64, 4), (16, 128, 4)),
    128: ((32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4)),
    1024: ((64, 64, 4), (64, 128, 4), (128, 128, 8), (64, 256, 8), (128, 128, 4), (128, 64, 8)),
    MANY_ROWS: (
        (64, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
        (256, 128, 8),
        (128, 128, 4),
        (128, 64, 8),
        (64, 256, 8),
    ),
}
# block_k that it tries with each shape
CANDIDATE_DEPTHS_FEW_ROWS, CANDIDATE_DEPTHS = (128, 256, 512), (64, 128)
# bucket -> block_m, block_n, warps and stages that it tries with the Hopper kernel
HOPPER_CANDIDATES = {
    FEW_ROWS: (),
    128: (),
    1024: ((64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 3), (128, 128, 8, 4)),
    MANY_ROWS: (
        (128, 128, 4, 3),
        (128, 128, 8, 4),
        (128, 256, 8, 3),
        (128, 256, 8, 4),
        (256, 128, 8, 3),
    ),
}


def find_bucket(rows: int) -> int:
    """The bucket that a number of rows falls into."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def find_bucket_index(rows: int) -> int:
    """The place of that bucket among all; a loop, because torch.compile follows it and no `bisect`."""
    index = 0
    while rows > BUCKETS[index]:
        index += 1
    return index


def find_architecture(name: str) -> Architecture:
    """What is known of `sm_90`, `gfx942` and so on. Arguments and errors as for `find_known_name`."""
    return ARCHITECTURES[find_known_name(name)]


def find_known_name(name: str) -> str:
    """The architecture whose tiles a GPU takes: of a newer NVIDIA GPU the newest that is older.

    Raises:
        ValueError: below compute capability 8.0, and for an AMD GPU that is not in the table.
    """
    if name in ARCHITECTURES:
        return name
    if not name.startswith("sm_"):
        known = ", ".join(AMD_ARCHITECTURES)
        raise ValueError(f"the kernel has no tiles for {name}; of AMD's GPUs it knows {known}")
    number = int(name.removeprefix("sm_"))
    nvidia = {int(known.removeprefix("sm_")): known for known in ARCHITECTURES if known.startswith("sm_")}
    older = [known for known in nvidia if known < number]
    if not older:
        raise ValueError(
            f"the kernel needs compute capability 8.0 or newer, not {number // 10}.{number % 10}"
        )
    return nvidia[max(older)]


def choose_tile(architecture: str, rows: int, *, grouped: bool = False) -> Tile:
    """The tile to start with.

    Args:
        architecture: of the GPU, `sm_90` or `gfx942`.
        rows: M.
        grouped: whether the weight has scales per group; those need twice the sums.

    Raises:
        ValueError: as `find_architecture`.
    """
    gpu = find_architecture(architecture)
    tile = gpu.defaults[BUCKETS.index(find_bucket(rows))]
    if tile.sums_per_thread > _limit_sums(gpu, grouped=grouped):
        return replace(tile, block_n=tile.block_n // 2)
    return tile


def list_candidates(architecture: str, rows: int, *, grouped: bool = False) -> list[Tile]:
    """What a tuner should measure for a bucket of rows, the default first.

    Arguments and errors as for `choose_tile`.
    """
    gpu = find_architecture(architecture)
    first = choose_tile(architecture, rows, grouped=grouped)
    bucket = find_bucket(rows)
    depths = CANDIDATE_DEPTHS_FEW_ROWS if bucket == FEW_ROWS else CANDIDATE_DEPTHS
    tiles = []
    for (block_m, block_n, warps), block_k, stages in product(CANDIDATE_SHAPES[bucket], depths, gpu.stages):
        tiles.append(Tile(block_m, block_n, block_k, first.group_m, warps, stages))
    if gpu.has_hopper_kernel and not grouped:
        for block_m, block_n, warps, stages in HOPPER_CANDIDATES[bucket]:
            tiles.append(Tile(block_m, block_n, 128, first.group_m, warps, stages, HOPPER))
    most_sums = _limit_sums(gpu, grouped=grouped)
    candidates = [first]
    for tile in tiles:
        fits_memory = count_shared_bytes(tile, gpu) <= gpu.shared_memory
        fits_registers = tile.sums_per_thread <= most_sums
        if fits_memory and fits_registers and tile != first:
            candidates.append(tile)
    return candidates


def choose_block_r(rank: int) -> int:
    """How many columns of h and up a kernel multiplies at a time; 0 without any.

    16 is the least that tensor cores take; more than 32 spill beside a full tile.
    """
    if rank == 0:
        return 0
    return 16 if rank <= 16 else 32


def count_shared_bytes(tile: Tile, gpu: Architecture) -> int:
    """Shared memory of one program, at most: the operands in flight, then the tile on its way out.

    The compiler's own numbers are below it (tests/kernels/test_triton_static.py).
    """
    if tile.kernel == HOPPER:
        return count_hopper_bytes(tile, out_bytes=4)
    buffers = max(1, tile.stages - gpu.stages_in_registers)
    operands = tile.bytes_per_stage * buffers
    out = tile.block_m * tile.block_n * gpu.bytes_per_sum
    return max(operands, out) + RESERVED_SHARED_MEMORY


def count_hopper_bytes(tile: Tile, out_bytes: int) -> int:
    """Shared memory of one program of the Hopper kernel, at most.

    Its operands stay while a tile goes out, because the next tile's first ones have been ordered.

    Args:
        tile: of the Hopper kernel.
        out_bytes: of an element of the output.
    """
    out = tile.block_m * HOPPER_PIECE * out_bytes
    return tile.bytes_per_stage * tile.stages + out + RESERVED_SHARED_MEMORY


def count_hopper_programs(tile: Tile, out_bytes: int) -> int:
    """How many programs of the Hopper kernel a multiprocessor runs at once. Arguments as above."""
    by_memory = HOPPER_SHARED_MEMORY // (count_hopper_bytes(tile, out_bytes) + SHARED_MEMORY_PER_PROGRAM)
    by_registers = HOPPER_REGISTERS // (MOST_REGISTERS * 32 * tile.warps)
    return max(1, min(by_memory, by_registers))


def _limit_sums(gpu: Architecture, *, grouped: bool) -> int:
    """How many sums a thread can hold."""
    return gpu.most_grouped_sums if grouped else gpu.most_sums
