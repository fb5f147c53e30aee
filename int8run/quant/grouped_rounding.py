"""How a weight becomes codes of 4 or 6 bits: a scale for each group of columns, a level for each number.

The roundings of `rounding.py` call `round_groups` and `round_groups_by_output`. What codes and scales stand
for is told in `kernels/grouped_weight/reference.py`; the product that a layer computes is the decoded int8
weight's, so that levels are chosen by what they decode to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from int8run.errors import ConfigError, check_range
from int8run.kernels.grouped_weight.reference import BITS, INT8_MAX, pack_codes
from int8run.quant.codebook import FIXED_LEVELS, choose_codebook
from int8run.quant.grouped_weight import (
    COLUMN_MULTIPLES,
    GROUP_MULTIPLE,
    MIN_GROUP_SIZE,
    GroupedWeight,
    LayerWeight,
)

CHUNK_ELEMENTS = 2**18  # weights that are rounded at a time, which stay in the cache
DEFAULT_GROUP_SIZE = 16
MAX_GROUP_SIZE = 2**17  # no row is longer: files may have one scale for a whole row
# of 6 bits: -31 to 31; code 0, which would be -32, is not used
EVEN_LEVELS = 31
SCALE_DTYPE = torch.float8_e4m3fn
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max
SMALLEST = 1e-30  # of a scale: a row of zeros has one, too
# turns of scale and levels: the first brings most, a third nothing (experiments/w4a8)
REFINEMENTS = 2
# neighbors that are tried of each scale: what the makers of the format try, and what brings more
MAKERS_SEARCH = {4: 0, 6: 1}
WIDE_SEARCH = 3


@dataclass(frozen=True)
class GroupLayout:
    """How many bits a code has, and how many columns share a scale.

    Args:
        bits: 4, levels out of a table; 6, evenly spaced ones.
        group_size: columns; at 4 bits a divisor or a multiple of 16, at 6 bits a multiple of 16.
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"int8.bits is {self.bits!r}; weights in groups have 4 or 6 bits")
        check_range("int8.group_size", self.group_size, MIN_GROUP_SIZE, MAX_GROUP_SIZE, whole=True)
        divides = self.bits == 4 and GROUP_MULTIPLE % self.group_size == 0
        if not divides and self.group_size % GROUP_MULTIPLE:
            divisors = "4, 8 or " if self.bits == 4 else ""
            raise ConfigError(
                f"int8.group_size is {self.group_size}; with int8.bits={self.bits} a group has {divisors}a "
                "multiple of 16 columns"
            )

    @property
    def label(self) -> str:
        """For keys and messages: `4 bits in groups of 16`."""
        return f"{self.bits} bits in groups of {self.group_size}"

    @property
    def column_multiple(self) -> int:
        """What the columns of a weight must be a multiple of, beside the group."""
        return COLUMN_MULTIPLES[self.bits]

    def find_obstacle(self, in_features: int) -> str | None:
        """Why a weight of that many columns cannot have these bits; None: it can."""
        for number in (self.column_multiple, self.group_size):
            if in_features % number:
                return f"{self.bits} bits need in_features in multiples of {number}, not {in_features}"
        return None


def find_layout(weight: LayerWeight) -> GroupLayout | None:
    """The groups of a weight of 4 or 6 bits; None of one with 8 bits."""
    if isinstance(weight, GroupedWeight):
        return GroupLayout(weight.bits, weight.group_size)
    return None


class GroupedRows(NamedTuple):
    """Some rounded rows of a weight.

    Args:
        codes: uint8 [n, K].
        group_scale: float8_e4m3fn [n, K / g].
        scale: float32 [n, 1].
        error: float32 [n, K / g], squared, of each group.
    """

    codes: Tensor
    group_scale: Tensor
    scale: Tensor
    error: Tensor


class Levels(NamedTuple):
    """The levels of one weight.

    Args:
        values: float32 [L], rising.
        codebook: the same where the file has them; None: they are evenly spaced integers.
        first_code: the code of the first level.
        unit: the level that the largest number of a group has before its scale is refined.
    """

    values: Tensor
    codebook: Tensor | None
    first_code: int
    unit: float


def choose_levels(weight: Tensor, layout: GroupLayout) -> Levels:
    """The levels of a weight. weight: float32 [N, K], transformed already."""
    if layout.bits == 4:
        codebook = choose_codebook(weight, layout.group_size)
        return Levels(codebook, codebook, first_code=0, unit=1.0)
    return get_even_levels(weight.device)


def get_even_levels(device: torch.device) -> Levels:
    """The levels of 6 bits: integers about zero."""
    values = torch.arange(-EVEN_LEVELS, EVEN_LEVELS + 1.0, device=device)
    return Levels(values, codebook=None, first_code=1, unit=EVEN_LEVELS)


def round_groups(
    weight: Tensor, layout: GroupLayout, *, neighbors: int, levels: Levels | None = None
) -> GroupedWeight:
    """Codes and scales for a weight by itself.

    A group's scale begins with its largest number. Each refinement takes the least-squares scale of the
    levels that were chosen, `<w, level> / <level, level>`, and chooses the nearest levels at that scale.

    Args:
        weight: float32 [N, K], transformed already; K has no obstacle of the layout.
        layout: bits and group size.
        neighbors: how many 8-bit floats below and above each scale are tried as well; the one is taken whose
            decoded int8 numbers are nearest.
        levels: of the whole weight, where these are some of its rows; None: they are all.
    """
    levels = levels or choose_levels(weight, layout)
    parts = []
    for rows in split_rows(weight):
        grouped = rows.unflatten(1, (-1, layout.group_size))  # [n, groups, g]
        parts.append(round_rows(grouped, levels, neighbors))
    return join_rounded_rows(parts, levels, layout)


def split_rows(weight: Tensor) -> Iterator[Tensor]:
    """A weight in pieces of some rows. weight: [N, K]."""
    yield from weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))


def join_rounded_rows(parts: list[GroupedRows], levels: Levels, layout: GroupLayout) -> GroupedWeight:
    """The weight that all of its rows make."""
    return GroupedWeight(
        codes=pack_codes(torch.cat([part.codes for part in parts]), layout.bits),
        group_scale=torch.cat([part.group_scale for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        bits=layout.bits,
        codebook=levels.codebook,
    )


def round_rows(grouped: Tensor, levels: Levels, neighbors: int) -> GroupedRows:
    """The same for some of the rows. grouped: float32 [n, groups, g]."""
    scale = grouped.abs().amax(dim=2, keepdim=True) / levels.unit  # [n, groups, 1]
    chosen = choose_nearest(grouped, scale, levels)
    for _ in range(REFINEMENTS):
        scale = fit_scale(grouped, chosen, scale)
        chosen = choose_nearest(grouped, scale, levels)
    row_scale = (chosen * scale).abs().amax(dim=(1, 2)) / INT8_MAX  # [n]
    row_scale = row_scale.clamp(min=SMALLEST).unsqueeze(1)  # [n, 1]
    group_scale = to_scale_dtype(scale[:, :, 0] / row_scale)
    best = assign_codes(grouped, group_scale, row_scale, levels)
    for candidate in list_neighbors(group_scale, neighbors):
        best = keep_better_groups(best, assign_codes(grouped, candidate, row_scale, levels))
    return best


def choose_nearest(grouped: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """The level of each number that is nearest to it over its scale.

    grouped: [n, groups, g], scale: [n, groups, 1] -> [n, groups, g].
    """
    borders = (levels.values[1:] + levels.values[:-1]) / 2
    places = torch.bucketize(grouped / scale.clamp(min=SMALLEST), borders)
    return levels.values[places]


def fit_scale(grouped: Tensor, chosen: Tensor, scale: Tensor) -> Tensor:
    """The scale of each group with the least squared error for these levels; all in shapes of the above."""
    products = (grouped * chosen).sum(dim=2, keepdim=True)
    fitted = products / chosen.square().sum(dim=2, keepdim=True).clamp(min=SMALLEST)
    return torch.where(fitted > 0, fitted, scale)  # a group of zeros has no scale to fit


def to_scale_dtype(scale: Tensor) -> Tensor:
    """Scales as files hold them, none above the largest number of their dtype."""
    return scale.clamp(max=LARGEST_SCALE).to(SCALE_DTYPE)


def list_neighbors(group_scale: Tensor, count: int) -> Iterator[Tensor]:
    """The next smaller and larger 8-bit floats of each scale, the nearest first; none beyond the ends.

    group_scale: float8_e4m3fn [n, groups], not negative.
    """
    # such floats are in the order of their bits
    bits = group_scale.view(torch.uint8).short()
    largest = torch.tensor(LARGEST_SCALE, dtype=SCALE_DTYPE).view(torch.uint8).item()
    for distance in range(1, count + 1):
        for step in (-distance, distance):
            yield (bits + step).clamp(0, largest).to(torch.uint8).view(SCALE_DTYPE)


def decode_levels(levels: Tensor, group_scale: Tensor) -> Tensor:
    """The int8 number of each level in each group. group_scale: [n, groups] -> float32 [n, groups, L]."""
    products = levels * group_scale.float().unsqueeze(-1)
    return products.round().clamp(-INT8_MAX, INT8_MAX)


def assign_codes(grouped: Tensor, group_scale: Tensor, row_scale: Tensor, levels: Levels) -> GroupedRows:
    """The codes whose decoded int8 numbers are nearest, at given scales.

    Args:
        grouped: float32 [n, groups, g].
        group_scale: float8_e4m3fn [n, groups].
        row_scale: float32 [n, 1].
        levels: of the weight.
    """
    target = grouped / row_scale.unsqueeze(-1)  # in int8 steps
    table = decode_levels(levels.values, group_scale)
    borders = (table[..., 1:] + table[..., :-1]) / 2
    places = torch.searchsorted(borders, target.contiguous())
    error = (table.gather(2, places) - target).square().sum(dim=2)
    codes = (places + levels.first_code).to(torch.uint8).flatten(1)
    return GroupedRows(codes, group_scale, row_scale, error)


def keep_better_groups(best: GroupedRows, candidate: GroupedRows) -> GroupedRows:
    """Of each group the version with the smaller error."""
    is_better = candidate.error < best.error  # [n, groups]
    group_size = best.codes.shape[1] // is_better.shape[1]
    is_better_column = is_better.repeat_interleave(group_size, dim=1)
    # not every torch selects among 8-bit floats
    scale_bits = torch.where(
        is_better, candidate.group_scale.view(torch.uint8), best.group_scale.view(torch.uint8)
    )
    return GroupedRows(
        codes=torch.where(is_better_column, candidate.codes, best.codes),
        group_scale=scale_bits.view(SCALE_DTYPE),
        scale=best.scale,
        error=torch.where(is_better, candidate.error, best.error),
    )


def round_groups_by_output(
    weight: Tensor, layout: GroupLayout, *, order: Tensor, spread: Tensor, block: int
) -> GroupedWeight:
    """Codes whose errors make up for each other in the layer's output (GPTQ).

    Scales are those of `round_groups` for the unchanged weight; a column is rounded with the scale of its
    group whatever its turn is.

    Args:
        weight: float32 [N, K], transformed already.
        layout: bits and group size.
        order: int64 [K], from `Gptq.factor_hessian`.
        spread: float32 [K, K], the same.
        block: columns between two updates of all later ones.
    """
    plain = round_groups(weight, layout, neighbors=WIDE_SEARCH)
    levels = choose_levels(weight, layout)
    rest = weight[:, order] / plain.scale  # [N, K] in int8 steps; later columns carry earlier errors
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    group_scale = plain.group_scale.float()
    groups = (order // layout.group_size).tolist()
    for start in range(0, rest.shape[1], block):
        end = min(start + block, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for j in range(start, end):
            column = rest[:, j : j + 1]
            table = decode_levels(levels.values, group_scale[:, groups[j]])  # [N, L]
            places = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, column.contiguous())  # [N, 1]
            codes[:, order[j]] = (places[:, 0] + levels.first_code).to(torch.uint8)
            error = (column - table.gather(1, places)) / spread[j, j]
            rest[:, j:end] -= error * spread[j, j:end]
            errors[:, j - start : j - start + 1] = error
        # the columns after the block get its errors in one product, which is faster than one by one
        rest[:, end:] -= errors @ spread[start:end, end:]
    return GroupedWeight(
        codes=pack_codes(codes, layout.bits),
        group_scale=plain.group_scale,
        scale=plain.scale,
        bits=layout.bits,
        codebook=levels.codebook,
    )


def draw_grouped_weight(
    rows: int, columns: int, layout: GroupLayout, generator: torch.Generator
) -> GroupedWeight:
    """A weight of random codes, on the generator's device: for measurements, without rounding anything.

    Args:
        rows: N.
        columns: K, without an obstacle of the layout.
        layout: bits and group size.
        generator: gives the numbers.
    """
    device = generator.device
    codes = torch.randint(1, 2**layout.bits, (rows, columns), generator=generator, device=device)
    n_groups = columns // layout.group_size
    share = 0.5 + 0.5 * torch.rand(rows, n_groups, generator=generator, device=device)
    codebook = torch.tensor(FIXED_LEVELS, device=device) if layout.bits == 4 else None
    largest = 1.0 if codebook is not None else EVEN_LEVELS
    row_scale = torch.rand(rows, 1, generator=generator, device=device) + 0.5
    return GroupedWeight(
        codes=pack_codes(codes.to(torch.uint8), layout.bits),
        group_scale=to_scale_dtype(share * INT8_MAX / largest),
        scale=row_scale / (INT8_MAX * columns**0.5),
        bits=layout.bits,
        codebook=codebook,
    )
