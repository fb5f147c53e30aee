"""Add a change to an int8 weight without its float original.

On average, random rounding keeps what is smaller than one step; rounding to the nearest would delete it.
`lora/apply.py` adds LoRAs to INT8 layers this way.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.quant.weight import QuantizedWeight

CHUNK_ELEMENTS = 2**22  # weights that are changed at a time, which limits the temporaries


@dataclass(frozen=True)
class StochasticSum:
    """A changed weight, and what its old scales could not hold."""

    weight: QuantizedWeight
    clipped_share: float  # of the weights, that the old scales would have clipped
    largest_growth: float  # of a row's scale; 1: none grew


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
