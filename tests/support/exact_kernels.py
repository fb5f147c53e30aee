"""Calls of the GPU kernels whose results are exact: small integers and powers of two, in any order of sums.

One list for two uses: `tests/kernels/cases_triton_exact.py` runs it, on a GPU or interpreted, and
`tests/support/static_gate.py` compiles it for each architecture. Nothing here imports Triton.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.kernels.grouped_weight.tile import choose_grouped_tile
from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups, sylvester_hadamard
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, HOPPER, Tile, list_candidates

# one row, a whole tile of few rows, one more, one less than a tile, and many with a tail
ROWS = (1, 16, 17, 63, 4099)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class LinearCase:
    """One variant of `int8_linear`; it is compiled once and runs for every number of rows.

    Args:
        tile: cuts the output up.
        n: rows of the weight.
        k: its columns.
        dtype: of the output, the bias and the branch.
        bias: whether there is one.
        rank: of the low-rank branch; 0: none.
    """

    tile: Tile
    n: int
    k: int
    dtype: torch.dtype
    bias: bool = False
    rank: int = 0

    def __str__(self) -> str:
        t = self.tile
        tile = f"{t.kernel}-{t.block_m}x{t.block_n}x{t.block_k}-w{t.warps}-s{t.stages}"
        bias = "-bias" if self.bias else ""
        rank = f"-rank{self.rank}" if self.rank else ""
        return f"{tile}-{self.n}x{self.k}-{name_dtype(self.dtype)}{bias}{rank}"


@dataclass(frozen=True)
class RowwiseCase:
    """One variant of `quantize_rowwise`; it is compiled once and runs for every number of rows.

    Args:
        k: columns.
        dtype: of the input and of `down`.
        rotation: columns of a rotated group, a power of 4; 0: none.
        sylvester: by Sylvester's matrix.
        gelu: whether the columns from `first_gelu_column` on pass through a GELU.
        factor: whether each column has a factor.
        rank: rows of `down`; 0: none.
    """

    k: int
    dtype: torch.dtype
    rotation: int = 0
    sylvester: bool = False
    gelu: bool = False
    factor: bool = False
    rank: int = 0

    def __str__(self) -> str:
        parts = [str(self.k), name_dtype(self.dtype)]
        if self.rotation:
            parts.append(f"sylvester{self.rotation}" if self.sylvester else f"rotation{self.rotation}")
        if self.gelu:
            parts.append("gelu")
        if self.factor:
            parts.append("factor")
        if self.rank:
            parts.append(f"rank{self.rank}")
        return "-".join(parts)

    @property
    def first_gelu_column(self) -> int:
        """The first column that passes through a GELU, after the first rotated group; -1: none does."""
        if not self.gelu:
            return -1
        return max(self.rotation, 64)


def name_dtype(dtype: torch.dtype) -> str:
    """`bfloat16`, without the library's name."""
    return str(dtype).removeprefix("torch.")


# -- the lists -------------------------------------------------------------------------------------


def list_default_tiles() -> list[Tile]:
    """Every tile that some architecture starts with, each once."""
    tiles = (tile for gpu in ARCHITECTURES.values() for tile in gpu.defaults)
    return list(dict.fromkeys(tiles))


def list_hopper_tiles() -> list[Tile]:
    """Every tile of the Hopper kernel that a tuner tries, each once."""
    candidates = (tile for rows in BUCKETS for tile in list_candidates("sm_90", rows))
    return list(dict.fromkeys(tile for tile in candidates if tile.kernel == HOPPER))


def list_grouped_tiles() -> list[Tile]:
    """Every tile that decodes weights of 4 bits on some architecture, each once."""
    tiles = (choose_grouped_tile(name, rows, 4) for name in ARCHITECTURES for rows in BUCKETS)
    return list(dict.fromkeys(tiles))


def list_linear_cases(tile: Tile) -> list[LinearCase]:
    """The variants of one tile: dtypes, bias, branch, and tails in N and K.

    Tails of 8 and of odd numbers: a width that 16 does not divide compiles to other loads.
    """
    whole = LinearCase(tile, n=512, k=15360, dtype=BRAIN)
    return [
        whole,
        replace(whole, bias=True, rank=64),
        replace(whole, dtype=HALF, bias=True, rank=16),
        replace(whole, dtype=FULL, bias=True),
        replace(whole, dtype=FULL, rank=20),
        replace(whole, n=520),
        replace(whole, k=15368, dtype=HALF),
        replace(whole, n=333, k=1027, bias=True, rank=64),
        # a tail that the copy engine of the Hopper kernel takes: rows begin at multiples of 16 bytes
        replace(whole, n=333, k=1040, bias=True, rank=64),
    ]


def list_rowwise_cases() -> list[RowwiseCase]:
    """What layers ask for: plain rows, GELU, factors, rotations, branches of small and large rank, tails."""
    plain = RowwiseCase(k=15360, dtype=BRAIN)
    rotated = replace(plain, rotation=256)
    return [
        plain,
        replace(plain, dtype=FULL, gelu=True, factor=True),
        replace(plain, k=4095, dtype=HALF),
        replace(plain, k=20001, dtype=FULL),
        replace(plain, rank=16),
        replace(plain, k=3077, rank=256, gelu=True),
        rotated,
        replace(rotated, dtype=FULL),
        replace(rotated, gelu=True, factor=True),
        replace(rotated, rank=64),
        replace(rotated, dtype=HALF, rank=128, gelu=True, factor=True),
        replace(rotated, dtype=FULL, rank=32),
        replace(rotated, k=15424, rotation=64, rank=16),
        replace(rotated, rotation=1024, rank=16),
        replace(rotated, sylvester=True),
        replace(rotated, k=3136, rotation=64, sylvester=True, gelu=True, rank=16),
    ]


# -- inputs and the exact results ------------------------------------------------------------------


def make_integers(*shape: int, limit: int, seed: int) -> Tensor:
    """Seeded integers of -limit..limit as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def make_powers_of_two(*shape: int, exponents: tuple[int, int], seed: int) -> Tensor:
    """Seeded powers of two as float32, exponents from the first up to the second."""
    low, high = exponents
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(low, high + 1, shape, generator=generator)


@dataclass(frozen=True)
class LinearInputs:
    """What `int8_linear` takes for a case, for the most rows, and what it returns.

    `expected` is rounded once to float32, then with each operation as the kernel does it, and to the dtype.
    """

    q: Tensor
    x_scale: Tensor
    qdata: Tensor
    w_scale: Tensor
    bias: Tensor | None
    h: Tensor | None
    up: Tensor | None
    strengths: Tensor | None
    expected: Tensor


def make_linear_inputs(case: LinearCase, rows: int, device: torch.device) -> LinearInputs:
    """Seeded inputs of a case.

    Without a branch half of the sums have one sign and need more than float32's 24 bits: the first operation
    after the loop rounds them. A branch is summed by tensor cores, which add exactly what fits into 24 bits,
    so that with one the inputs are small.
    """
    limit, exponents = (7, (-4, -2)) if case.rank else (127, (-10, -8))
    q = make_integers(rows, case.k, limit=limit, seed=0).to(device)
    qdata = make_integers(case.n, case.k, limit=127, seed=1).to(device)
    if not case.rank:
        q[::2].abs_()
        qdata[::2].abs_()
    x_scale = make_powers_of_two(rows, 1, exponents=exponents, seed=2).to(device)
    w_scale = make_powers_of_two(case.n, exponents=exponents, seed=3).to(device)

    sums = q.double() @ qdata.double().T  # exact: integers below 2^53
    y = sums.float() * w_scale * x_scale
    bias = h = up = strengths = None
    if case.bias:
        bias = make_integers(case.n, limit=64, seed=4).to(device, case.dtype)
        y = y + bias.float()
    if case.rank:
        h = make_integers(rows, case.rank, limit=4, seed=5).to(device)
        up = make_integers(case.n, case.rank, limit=4, seed=6).to(device, case.dtype)
        strengths = make_powers_of_two(case.rank, exponents=(-1, 1), seed=7).to(device)
        y = (y.double() + (h * strengths).double() @ up.double().T).float()
    return LinearInputs(
        q=q.to(torch.int8),
        x_scale=x_scale,
        qdata=qdata.to(torch.int8),
        w_scale=w_scale,
        bias=bias,
        h=h,
        up=up,
        strengths=strengths,
        expected=y.to(case.dtype),
    )


@dataclass(frozen=True)
class RowwiseInputs:
    """What `quantize_rowwise` takes for a case, for the most rows, and what it returns."""

    x: Tensor
    factor: Tensor | None
    down: Tensor | None
    q: Tensor
    scale: Tensor
    h: Tensor | None


def make_rowwise_inputs(case: RowwiseCase, rows: int, device: torch.device) -> RowwiseInputs:
    """Seeded inputs of a case.

    Each row's largest magnitude is 127 times a power of two, so that its scale is that power and no division
    rounds. It stands in the first rotated group, which is set by what it is rotated to.
    """
    if case.rotation:
        scale, limit = 8.0, int(min(1008 / case.rotation**0.5, 254))
    else:
        scale, limit = 2.0, 254
    factor = None
    if case.factor:
        factor = make_powers_of_two(case.k, exponents=(-1, 1), seed=1).to(device)
        limit //= 2
    x = make_integers(rows, case.k, limit=limit, seed=0).to(device)
    if case.gelu:
        # from 16 on a GELU is x or 0, without rounding
        after = x[:, case.first_gelu_column :]
        after[after.abs() < 16] = 0
    first = max(case.rotation, 1)
    top = torch.zeros(rows, first, device=device)
    every_row = torch.arange(rows, device=device)
    top[every_row, every_row % first] = 127 * scale
    matrix = None
    if case.rotation:
        build = sylvester_hadamard if case.sylvester else regular_hadamard
        matrix = build(case.rotation).to(device)
        top = rotate_groups(top, matrix)
    x[:, :first] = top if factor is None else top / factor[:first]

    y = x.double()
    if case.gelu:
        y[:, case.first_gelu_column :].clamp_(min=0)
    if factor is not None:
        y = y * factor
    if matrix is not None:
        y = rotate_groups(y, matrix.double())
    down = h = None
    if case.rank:
        down = make_integers(case.rank, case.k, limit=2, seed=2).to(device, case.dtype)
        h = (y.to(case.dtype).double() @ down.double().T).float()
    return RowwiseInputs(
        x=x.to(case.dtype),
        factor=factor,
        down=down,
        q=(y / scale).round().to(torch.int8),
        scale=torch.full((rows, 1), scale, device=device),
        h=h,
    )


def shrink_linear_cases(tile: Tile) -> Iterator[LinearCase]:
    """The same variants at sizes that an interpreter walks in a moment: two tiles of N, and tails."""
    for case in list_linear_cases(tile):
        is_whole = case.k % 512 == 0
        k = 2 * tile.block_k if is_whole else tile.block_k + case.k % 64
        n = 2 * tile.block_n if case.n % 512 == 0 else tile.block_n + case.n % 16
        yield replace(case, n=n, k=k)


def shrink_rowwise_cases() -> Iterator[RowwiseCase]:
    """The same variants at sizes that an interpreter walks in a moment."""
    for case in list_rowwise_cases():
        if case.rotation:
            yield replace(case, k=max(2 * case.rotation, 256) + case.k % 256)
        elif case.k < 16384:
            yield replace(case, k=256 + case.k % 256)
        else:
            yield case  # the length is what chooses the kernel
