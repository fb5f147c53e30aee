"""Adding a change to an int8 weight without its float original: random rounding keeps what is smaller than one step, on average."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.quant.weight import QuantizedWeight

CHUNK_ELEMENTS = 2**22  # weights that are worked on at a time


@dataclass(frozen=True)
class StochasticSum:
    """A changed weight, and what its grid could not hold as it was."""

    weight: QuantizedWeight
    clipped_share: float  # of the weights, that the old scales would have clipped
    largest_growth: float  # of a row's scale


def add_with_stochastic_rounding(
    weight: QuantizedWeight, change: Tensor, generator: torch.Generator
) -> StochasticSum:
    """`floor(q + change / scale + u)` with u uniform in 0..1: the mean over all u is the sum itself.

    Rounding to the nearest would delete every change below half a step; most LoRAs are. A row that would leave -127..127 gets a larger
    scale, never a smaller one, and is rounded anew as a whole.

    Args:
        change: float [N, K], in the basis of the integers.
        generator: on the CPU, whose numbers are the same on every machine.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.qdata.shape[1])
    qdata, scales, clipped, growth = [], [], 0, 1.0
    for q, scale, part in zip(
        weight.qdata.split(rows), weight.scale.split(rows), change.split(rows), strict=True
    ):
        wanted = q.float() + part.float() / scale
        grown = (wanted.abs().amax(1, keepdim=True) / INT8_MAX).clamp(min=1.0)
        clipped += int((wanted.abs() > INT8_MAX).sum())
        growth = max(growth, grown.max().item())
        u = torch.rand(q.shape, generator=generator).to(q.device)
        wanted = wanted / grown
        below = wanted.floor()
        # a comparison, not a sum: 126 + 0.9999999 is 127 in float32. The clamp is for the same hair's breadth at the end of the range
        qdata.append((below + (u < wanted - below)).clamp(-INT8_MAX, INT8_MAX).to(torch.int8))
        scales.append(scale * grown)
    return StochasticSum(
        QuantizedWeight(torch.cat(qdata), torch.cat(scales)), clipped / weight.qdata.numel(), growth
    )


def make_generator(*words: object) -> torch.Generator:
    """A generator of its own for each layer and purpose: one seed for all would repeat the same error everywhere."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
