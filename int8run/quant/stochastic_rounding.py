"""Add a change to a quantized weight without its float original.

On average, random rounding keeps what is smaller than one step; rounding to the nearest would delete it.
`lora/apply.py` adds LoRAs to INT8 layers this way.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.kernels.grouped_weight.reference import compute_levels, pack_codes
from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.quant.grouped_rounding import SCALE_DTYPE, decode_levels, list_neighbors, to_scale_dtype
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight, join_rows
from int8run.quant.weight import QuantizedWeight

CHUNK_ELEMENTS = 2**22  # weights that are changed at a time, which limits the temporaries


@dataclass(frozen=True)
class StochasticSum:
    """A changed weight, and what its old scales could not hold."""

    weight: LayerWeight
    clipped_share: float  # of the weights, that the old scales would have clipped
    largest_growth: float  # of a row's scale; 1: none grew


def add_change(weight: LayerWeight, change: Tensor, generator: torch.Generator) -> StochasticSum:
    """Add a change to a weight of any bits.

    Args:
        weight: of [N, K].
        change: float [N, K], in the basis of the weight.
        generator: on the CPU, whose numbers are the same on every machine.
    """
    if isinstance(weight, GroupedWeight):
        return add_to_groups(weight, change, generator)
    return add_with_stochastic_rounding(weight, change, generator)


def add_with_stochastic_rounding(
    weight: QuantizedWeight, change: Tensor, generator: torch.Generator
) -> StochasticSum:
    """Add a change as `floor(q + change / scale + u)` with u uniform in 0..1.

    The mean over all u is the sum itself. Rounding to the nearest would delete every change below half a
    step; most LoRAs are that small. A row that would leave -127..127 gets a larger scale, never a smaller
    one, and is rounded again as a whole.

    Args:
        weight: qdata [N, K].
        change: float [N, K], in the basis of the integers.
        generator: on the CPU, whose numbers are the same on every machine.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.qdata.shape[1])
    chunks = zip(weight.qdata.split(rows), weight.scale.split(rows), change.split(rows), strict=True)
    new_qdata, new_scales = [], []
    n_clipped, largest_growth = 0, 1.0
    for qdata, scale, chunk_change in chunks:
        exact = qdata.float() + chunk_change.float() / scale  # [rows, K], in steps of the old scale
        growth = (exact.abs().amax(1, keepdim=True) / INT8_MAX).clamp(min=1.0)  # [rows, 1]
        n_clipped += int((exact.abs() > INT8_MAX).sum())
        largest_growth = max(largest_growth, growth.max().item())
        exact = exact / growth
        new_qdata.append(round_stochastically(exact, generator))
        new_scales.append(scale * growth)
    return StochasticSum(
        weight=QuantizedWeight(torch.cat(new_qdata), torch.cat(new_scales)),
        clipped_share=n_clipped / weight.qdata.numel(),
        largest_growth=largest_growth,
    )


def add_to_groups(weight: GroupedWeight, change: Tensor, generator: torch.Generator) -> StochasticSum:
    """The same for a weight of 4 or 6 bits: each number becomes the level below or above it.

    Between two levels the upper one is taken with the probability of the distance to the lower. The scale of
    a row or group that would not hold the sum grows, never shrinks.

    Args:
        weight: of [N, K]; its correction stays as it is.
        change: float [N, K], in the basis of the codes.
        generator: on the CPU.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    levels = compute_levels(weight.bits, weight.codebook).to(weight.codes.device)
    parts = []
    n_clipped, largest_growth = 0, 1.0
    for start in range(0, weight.shape[0], rows):
        chunk = weight.select_rows(start, start + rows)
        exact = chunk.decode().qdata.float() + change[start : start + rows].float() / chunk.scale
        grouped = exact.unflatten(1, (-1, weight.group_size))  # [rows, groups, g], in steps of the old scale
        table = decode_levels(levels, chunk.group_scale)  # [rows, groups, L]
        n_clipped += int(((grouped < table[..., :1]) | (grouped > table[..., -1:])).sum())
        growth = (exact.abs().amax(1, keepdim=True) / INT8_MAX).clamp(min=1.0)  # [rows, 1]
        largest_growth = max(largest_growth, growth.max().item())
        grouped = grouped / growth.unsqueeze(-1)
        group_scale = grow_group_scale(chunk.group_scale, growth, grouped, levels)
        places = choose_levels_at_random(grouped, decode_levels(levels, group_scale), generator)
        codes = pack_codes(places.to(torch.uint8).flatten(1), weight.bits)
        parts.append(replace(chunk, codes=codes, group_scale=group_scale, scale=chunk.scale * growth))
    return StochasticSum(
        weight=join_rows(parts),
        clipped_share=n_clipped / change.numel(),
        largest_growth=largest_growth,
    )


def grow_group_scale(group_scale: Tensor, growth: Tensor, grouped: Tensor, levels: Tensor) -> Tensor:
    """Scales of groups at which no number lies beyond the levels, in the dtype that they have.

    Args:
        group_scale: [n, groups].
        growth: float32 [n, 1], of the rows' scales.
        grouped: float32 [n, groups, g], in steps of the grown scales.
        levels: float32 [L], rising, from below 0 to above it.
    """
    largest, smallest = grouped.amax(2), grouped.amin(2)  # [n, groups]
    ends = decode_levels(levels[[0, -1]], group_scale)  # [n, groups, 2]
    is_within = (largest <= ends[..., 1]) & (smallest >= ends[..., 0])
    scale = group_scale.float() / growth
    needed = torch.maximum(largest / levels[-1], smallest / levels[0])
    wanted = torch.where(is_within & (growth == 1), scale, torch.maximum(scale, needed))
    if group_scale.dtype != SCALE_DTYPE:
        return wanted.to(group_scale.dtype)
    rounded = to_scale_dtype(wanted)
    _, larger = list_neighbors(rounded, 1)
    bits = torch.where(rounded.float() < wanted, larger.view(torch.uint8), rounded.view(torch.uint8))
    return bits.view(SCALE_DTYPE)


def choose_levels_at_random(grouped: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """The place of the level above or below each number, by chance.

    Args:
        grouped: float32 [n, groups, g].
        table: float32 [n, groups, L], decoded levels, rising.
        generator: on the CPU.

    Returns:
        int64 [n, groups, g].
    """
    above = torch.searchsorted(table, grouped.contiguous()).clamp(1, table.shape[2] - 1)
    lower, upper = table.gather(2, above - 1), table.gather(2, above)
    u = torch.rand(grouped.shape, generator=generator).to(grouped.device)
    takes_upper = grouped > lower + u * (upper - lower)
    return torch.where(takes_upper, above, above - 1)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round each number up with the probability of its fraction. x: float32 in -127..127 -> int8."""
    u = torch.rand(x.shape, generator=generator).to(x.device)
    below = x.floor()
    # a comparison, not floor(x + u): 126 + 0.9999999 is 127 in float32. The clamp is for the same last bit at
    # the end of the range
    return (below + (u < x - below)).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def make_generator(*words: object) -> torch.Generator:
    """A generator seeded by words, one for each layer and purpose: one seed would repeat the same error."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
