"""Sums over the rows of two weights, without a tensor of their products.

`residue` and `rounding_check` use them.
"""

import torch
from torch import Tensor


def sum_products(first: Tensor, second: Tensor) -> Tensor:
    """The sum over each row of the products of two weights.

    A row is added in float32, whose error of about 1e-6 is far below every limit; rows are added in float64.

    Args:
        first: float32 [n, K].
        second: likewise.

    Returns:
        float64 [n].
    """
    return torch.bmm(first[:, None, :], second[:, :, None]).flatten().double()
