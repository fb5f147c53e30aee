"""The INT8 linear layer, written to be read: exact integer product, then the two scales and the bias."""

import torch
from torch import Tensor


def int8_linear(q: Tensor, x_scale: Tensor, qdata: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`y = (q @ qdata.T) * w_scale * x_scale + bias`.

    The product is taken in float64, which holds every sum of int8 products exactly for K < 2**38.

    Args:
        q: int8 [M, K] activations.
        x_scale: float32 [M, 1], of each row of activations.
        qdata: int8 [N, K] weight.
        w_scale: float32 [N], of each output column.
        bias: [N] or None.

    Returns:
        float32 [M, N].
    """
    accumulated = (q.double() @ qdata.double().T).to(torch.float32)  # [M, K] x [K, N] -> [M, N]
    y = accumulated * w_scale * x_scale
    return y if bias is None else y + bias
