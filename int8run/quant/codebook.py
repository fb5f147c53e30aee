"""The levels of 4-bit codes: a table for weights of the usual kind, or one that is fitted to a weight.

Levels are relative to the largest number of their group. Where scales come from is told in
`grouped_rounding.py`.
"""

import torch
from torch import Tensor

# The Lloyd-Max quantizer of normal numbers in groups of 16, each divided by its largest, as comfy-kitchen
# 0.2.40 writes it into files of `asym_w4a8_int8`.
FIXED_LEVELS = (
    -0.980602,
    -0.794529,
    -0.638165,
    -0.500986,
    -0.377321,
    -0.263187,
    -0.155210,
    -0.050720,
    0.052541,
    0.156985,
    0.265284,
    0.379533,
    0.502636,
    0.638953,
    0.794876,
    0.980671,
)
NUM_LEVELS = len(FIXED_LEVELS)
# excess kurtosis of numbers that are relative to their group: about -0.5 for normal ones
MAX_KURTOSIS = -0.1
SAMPLE_SIZE = 2**19
ITERATIONS = 25


def choose_codebook(weight: Tensor, group_size: int) -> Tensor:
    """The fixed levels; for a weight with heavy tails ones that are fitted to it.

    Args:
        weight: float32 [N, K], transformed already.
        group_size: columns that share a scale.

    Returns:
        float32 [16], rising.
    """
    relative = sample_relative_numbers(weight, group_size)
    if compute_excess_kurtosis(relative) <= MAX_KURTOSIS:
        return torch.tensor(FIXED_LEVELS, device=weight.device)
    return fit_codebook(relative)


def find_sample_step(shape: tuple[int, int]) -> int:
    """Of how many rows one is looked at; of the rows that it leaves, each one is. shape: N and K."""
    rows, columns = shape
    return max(1, rows * columns // SAMPLE_SIZE)


def sample_relative_numbers(weight: Tensor, group_size: int) -> Tensor:
    """Numbers of a weight over the largest of their group: of all rows, or of rows at equal distances.

    Args:
        weight: float32 [N, K].
        group_size: columns of a group.

    Returns:
        float32 [S]; none of groups of zeros, which say nothing.
    """
    rows, columns = weight.shape
    groups = weight[:: find_sample_step((rows, columns))].reshape(-1, group_size)
    largest = groups.abs().amax(dim=1, keepdim=True)
    relative = groups / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return relative[largest[:, 0] > 0].flatten()


def compute_excess_kurtosis(numbers: Tensor) -> float:
    """How heavy the tails are; 0 for normal numbers. Minus infinity where all numbers are equal."""
    centered = numbers.double() - numbers.double().mean()
    variance = centered.square().mean()
    if not numbers.numel() or variance == 0:
        return float("-inf")
    return (centered.pow(4).mean() / variance.square() - 3).item()


def fit_codebook(numbers: Tensor) -> Tensor:
    """Levels of least squared error (Lloyd-Max), found by turns from quantiles on.

    Lloyd 1982, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28.

    Args:
        numbers: float32 [S], at least one.

    Returns:
        float32 [16], rising.
    """
    ordered = numbers.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])  # of all numbers below a place
    places = torch.linspace(0, len(ordered) - 1, NUM_LEVELS, device=ordered.device).round().long()
    levels = ordered[places]
    for _ in range(ITERATIONS):
        borders = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(ordered))])
        counts = ends.diff()
        means = sums[ends].diff() / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels)
    return levels.float()
